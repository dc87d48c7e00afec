"""Environment that every process of the pipeline inherits: nothing calls home, embedded services by default.

Only defaults: a variable that is already set stays as it is, so that a real Prefect API or MLflow server is
chosen by configuration alone.
"""

from __future__ import annotations

import logging
import os
import signal

from flows import paths
from flows.errors import explain

QUIET = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "1",
    "PREFECT_CLI_PROMPT": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime 1.32 sends events from Linux, too, from its import on
    "HF_HUB_OFFLINE": "1",
    "NO_PROXY": "127.0.0.1,localhost",  # a proxy for the internet must not get requests to our own servers
    "TOKENIZERS_PARALLELISM": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    "PYTHONUNBUFFERED": "1",
}


def prepare() -> None:
    """Set what is not set. Call it before prefect, mlflow or dvc are imported."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("PREFECT_HOME", str(paths.home() / ".prefect"))


class _NoTraceOfMistakes(logging.Filter):
    """A user's mistake or a full disk is one line; Prefect would log its stack trace several times."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] and explain(record.exc_info[1]):
            record.exc_info = None
        return True


def hide_traces_of_mistakes() -> None:
    """For the logs of flows; call it where a flow is defined."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        if not any(isinstance(known, _NoTraceOfMistakes) for known in logger.filters):
            logger.addFilter(_NoTraceOfMistakes())


def interrupt_on_sigterm() -> None:
    """SIGTERM as Ctrl-C: the stage that runs writes a checkpoint, records are closed."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
