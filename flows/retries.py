"""Which tasks Prefect tries again: those that lost a process or waited for a lock in vain, nothing else.

A failed gate, a bad parameter or a diverged loss fails again. DVC alone decides what is up to date, so
nothing is cached here.
"""

from __future__ import annotations

import threading
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import State

from flows.dvc_stage import StageFailed

stopping = threading.Event()
"""Set while a flow of this process is being stopped: then nothing is tried again."""


def can_retry(task: Any, run: Any, state: State[Any]) -> bool:
    """Prefect's condition, given the state of the failed attempt."""
    try:
        state.result()
    except StageFailed as error:
        return error.can_retry and not stopping.is_set()
    except Exception:
        return False
    return False


STAGES: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": 2,
    "retry_delay_seconds": [5, 60],
    "retry_condition_fn": can_retry,
}
"""Options of a task that runs stages."""
