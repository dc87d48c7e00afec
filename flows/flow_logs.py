"""Prefect's log: a user's mistake is one line there; Prefect would write its stack trace several times."""

from __future__ import annotations

import logging

from flows.errors import TrunklineError


class _NoTraceOfMistakes(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], TrunklineError):
            record.exc_info = None
        return True


_FILTER = _NoTraceOfMistakes()


def hide_traces_of_mistakes() -> None:
    """Once per process; further calls change nothing."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_FILTER)
