"""The frame around every stage: checked params, signals, one-line errors, exit codes, a receipt.

A stage module reads:

    def run(params: Params, stage: Stage) -> None: ...      # files and params in, files out

    def main(argv: list[str] | None = None) -> int:
        return run_stage("ingest", run, argv)

    if __name__ == "__main__":
        raise SystemExit(main())

and may look at `stage.cell` (matrix stages), `stage.stop_requested()` (long work) and `stage.run` (tracking).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flows import files, params, paths, tracking
from flows.errors import TrunklineError, explain_os_error
from flows.params import Params

ORPHAN_CHECK_S = 1.0


@dataclass
class Stage:
    """One execution of a stage in this process."""

    name: str
    cell: str | None = None
    run: tracking.Run = field(default_factory=tracking.Run)
    device_hours: float = 0.0
    """Accelerator or CPU-process hours spent; training adds to it over all processes."""
    _stop: threading.Event = field(default_factory=threading.Event)

    @property
    def label(self) -> str:
        """DVC's name of the stage: `finetune@scratch`."""
        return f"{self.name}@{self.cell}" if self.cell else self.name

    @property
    def receipt_path(self) -> os.PathLike[str]:
        return paths.RECEIPTS / f"{self.name}{'-' + self.cell if self.cell else ''}.json"

    def stop_requested(self) -> bool:
        """True after SIGINT or SIGTERM, or when the process that started this one is gone."""
        return self._stop.is_set()

    def request_stop(self) -> None:
        self._stop.set()


def is_main_process() -> bool:
    """True on rank 0, and everywhere outside torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def run_stage(
    name: str,
    body: Callable[[Params, Stage], None],
    argv: list[str] | None = None,
    cells: list[str] | None = None,
) -> int:
    """Run `body`, turn errors into a line and an exit code (flows.errors), write the receipt on rank 0."""
    parser = argparse.ArgumentParser(
        prog=f"python -m flows.stages.{name}", description=sys.modules[body.__module__].__doc__
    )
    if cells:
        parser.add_argument("--cell", required=True, choices=cells)
    cell: str | None = getattr(parser.parse_args(argv), "cell", None)
    stage = Stage(name, cell)
    started = time.monotonic()
    try:
        paths.workspace()
        checked = params.load()
        _watch_signals(stage)
        with tracking.stage_run(stage.name, stage.cell, checked) as stage.run:
            body(checked, stage)
            duration = time.monotonic() - started
            if is_main_process():
                _write_receipt(stage, duration)
        return 0
    except TrunklineError as error:
        return _fail(stage, str(error), error.exit_code)
    except OSError as error:
        explained = explain_os_error(error)
        if explained is None:
            raise
        return _fail(stage, str(explained), explained.exit_code)


def _fail(stage: Stage, message: str, exit_code: int) -> int:
    if is_main_process():
        print(f"error: {stage.label}: {message}", file=sys.stderr, flush=True)
    return exit_code


def _write_receipt(stage: Stage, duration_s: float) -> None:
    files.write_json(
        paths.RECEIPTS / os.path.basename(stage.receipt_path),
        {
            "stage": stage.label,
            "run_id": stage.run.run_id,
            "git": tracking.git_commit(),
            "duration_s": round(duration_s, 3),
            "device_hours": round(stage.device_hours or duration_s / 3600, 6),
        },
    )


def _watch_signals(stage: Stage) -> None:
    """Ask the stage to stop on SIGINT/SIGTERM (a second signal ends it at once) and when its parent dies.

    The parent check covers what a process group cannot: a killed DVC or flow would leave the stage running as
    an orphan beside the next attempt (DVC ignores SIGINT while a command runs and does not forward SIGTERM).
    """

    def handle(signum: int, frame: object) -> None:
        if stage.stop_requested():
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        stage.request_stop()

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handle)

    watched = [os.getppid()] if "DVC_STAGE" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ else []
    flow = int(os.environ.get("TRUNKLINE_FLOW_PID", "0"))

    def orphaned() -> bool:
        return bool(watched and os.getppid() != watched[0]) or bool(flow and not _alive(flow))

    def watch() -> None:
        while not stage.stop_requested():
            if orphaned():
                stage.request_stop()
            time.sleep(ORPHAN_CHECK_S)

    threading.Thread(target=watch, daemon=True, name="orphan-watch").start()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
