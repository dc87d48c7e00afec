"""Every recipe end to end as a smoke run, without servers: `python tests/recipes_smoke.py [NAME …]`.

What `make run RECIPE=… SMOKE=1` does in its DVC stages, ingest to parity, one forked process per recipe in a
temporary folder, so that all of them take minutes. Prints a line per recipe; the exit code counts those that
failed.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flows import environment  # noqa: E402

environment.prepare()

from flows import params, recipes, workspace  # noqa: E402

STAGES = (
    ("ingest", []),
    ("scale", []),
    ("pretrain", []),
    ("finetune", ["--cell", "pretrained"]),
    ("evaluate", ["--cell", "pretrained"]),
    ("export", []),
    ("parity", []),
)


def run(name: str, folder: Path) -> int:
    """In this process: exit code of the first stage that fails, else 0."""
    values = workspace.merge("", name, [], smoke=True)
    params.check(values, name)
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    (folder / "constraints.txt").write_bytes((ROOT / "constraints.txt").read_bytes())
    for part in ("flows", "models", "dvc.yaml"):
        (folder / part).symlink_to(ROOT / part)
    os.chdir(folder)
    os.environ.update(TRUNKLINE_HOME=str(folder), TRUNKLINE_TRACKING="off", OMP_NUM_THREADS="1")
    for stage, arguments in STAGES:
        code = importlib.import_module(f"flows.stages.{stage}").main(arguments)
        if code:
            print(f"{name}: {stage} ended with {code}", file=sys.stderr)
            return int(code)
    return 0


def run_forked(name: str) -> int:
    with tempfile.TemporaryDirectory(prefix="trunkline-recipe-") as folder:
        log = Path(folder) / "log"
        if (child := os.fork()) == 0:
            code = 1
            try:
                with open(log, "w") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                    code = run(name, Path(folder))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            print(log.read_text()[-2000:])
        return code


def main(names: list[str]) -> int:
    os.chdir(ROOT)
    for stage, _ in STAGES:
        importlib.import_module(f"flows.stages.{stage}")
    failed = 0
    for name in names or recipes.known(ROOT):
        began = time.monotonic()
        code = run_forked(name)
        failed += code != 0
        print(f"{name}: {'failed' if code else 'ran'} in {time.monotonic() - began:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
