"""Placement: the best throughput within the budget, and never for another model or table."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving_workspace import Exported

from flows import files, paths
from flows.errors import DataError
from flows.params import Placement
from flows.placement import (
    Choice,
    Row,
    check_placement,
    choose,
    pick,
    read_placement,
    read_table,
    write_placement,
)
from flows.serving.vision.model import Release, load_model

CPU, GPU = "CPUExecutionProvider", "CUDAExecutionProvider"
LIMITS = Placement(max_latency_ms=50.0, max_memory_mb=100.0, max_wait_ms=5.0)
BOTH = {"fp32": True, "int8": True}


def row(
    variant: str, batch: int, p95: float, images_per_s: float, provider: str = CPU, mb: float = 10
) -> Row:
    return Row(provider, variant, batch, p95, p95, images_per_s, mb)


def test_the_best_throughput_within_the_budget_is_chosen() -> None:
    rows = [
        row("fp32", 1, 5, 200),
        row("fp32", 8, 24, 330),
        row("fp32", 32, 90, 350),
        row("int8", 8, 15, 320),
    ]
    (choice,), rejected = choose(rows, LIMITS, 2, BOTH)
    assert choice == Choice(CPU, "fp32", 2, 8, 2.0, 24, 330, 10)  # 50 - 2·24 ms are left for waiting
    assert len(rejected) == 3
    assert "two batches of 90 ms (p95) exceed max_latency_ms 50" in [entry.reason for entry in rejected]


def test_int8_only_if_parity_says_it_passed() -> None:
    rows = [row("fp32", 1, 5, 200), row("int8", 1, 3, 300)]
    assert choose(rows, LIMITS, 1, BOTH)[0][0].variant == "int8"
    (choice,), (refused,) = choose(rows, LIMITS, 1, {"fp32": True, "int8": False})
    assert (choice.variant, refused.variant) == ("fp32", "int8")
    assert "accuracy" in refused.reason
    assert choose(rows, LIMITS, 1, {})[0] == [], "what was not checked did not pass"


def test_every_provider_has_its_own_choice_or_none() -> None:
    rows = [row("fp32", 1, 40, 25), row("fp32", 1, 2, 500, GPU), row("fp32", 8, 4, 2000, GPU, mb=101)]
    chosen, rejected = choose(rows, LIMITS, 1, BOTH)
    assert [(choice.provider, choice.max_batch) for choice in chosen] == [(GPU, 1)]
    assert {entry.reason.split(" exceed ")[1] for entry in rejected} == {
        "max_latency_ms 50",
        "max_memory_mb 100",
    }


@pytest.mark.parametrize("text", ["", "provider,variant\nx,fp32\n", "no table"])
def test_a_table_that_is_none(text: str) -> None:
    if text in ("", "no table"):
        assert read_table("") == []
    else:
        with pytest.raises(DataError, match="not usable"):
            read_table(text)


# ---- the file and the server ----

HEADER = "provider,variant,batch,p50_ms,p95_ms,p99_ms,images_per_s,peak_memory_mb\n"
TABLE = (
    HEADER
    + f"PyTorch eager CPU,pytorch,4,9,9,9,100,50\n{CPU},fp32,1,2,2,2,500,20\n"
    + f"{CPU},fp32,4,8,8,8,450,30\n{CPU},int8,4,5,5,5,800,25\n"
)


@pytest.fixture
def folder(exported: Exported, tmp_path: Path) -> Path:
    """A folder as it is registered, with its placement."""
    folder = tmp_path / "registered"
    shutil.copytree(exported.root / paths.EXPORT, folder)
    digests = {name: variant.digest for name, variant in exported.package.manifest.variants.items()}
    checks = [{"name": f"{name} top-1 agreement", "passed": True} for name in ("fp32", "int8")]
    machine = {"processor": "Some CPU", "threads": 1}
    files.write_json(folder / "parity.json", {"digests": digests, "checks": checks, "machine": machine})
    table = tmp_path / "latency.csv"
    table.write_text(TABLE)
    write_placement(folder, table, LIMITS)
    return folder


def serve_auto(exported: Exported, folder: Path, **changes: Any) -> Any:
    settings = exported.params.serve.model_copy(update={"variant": "auto", "threads": 0} | changes)
    return load_model(Release(folder, "1", "c"), settings, 10**6)


def test_a_server_runs_what_the_placement_says(exported: Exported, folder: Path) -> None:
    assert check_placement(folder) is None
    model = serve_auto(exported, folder)
    assert (model.info.variant, model.max_batch, model.max_wait_s) == ("int8", 4, 0.005)
    assert (model.session.provider, model.session.threads) == (CPU, 1)
    assert model.placement == {
        "measured_on": "Some CPU",
        "table_sha256": files.sha256_file(folder / "latency.csv"),
    }
    assert serve_auto(exported, folder, max_batch=2).max_batch == 2
    named = serve_auto(exported, folder, variant="fp32", threads=1)
    assert (named.info.variant, named.placement) == ("fp32", None)


def other_model(folder: Path) -> None:
    placement = files.read_json(folder / "placement.json")
    placement["model_digests"]["int8"] = "0" * 64
    files.write_json(folder / "placement.json", placement)


def other_table(folder: Path) -> None:
    (folder / "latency.csv").write_text(TABLE.replace("800", "801"))


def damaged(folder: Path) -> None:
    (folder / "placement.json").write_text("{")


def missing(folder: Path) -> None:
    (folder / "placement.json").unlink()


def nothing_fits(folder: Path) -> None:
    placement = files.read_json(folder / "placement.json")
    files.write_json(folder / "placement.json", placement | {"chosen": []})


@pytest.mark.parametrize(
    ("change", "gate", "server"),
    [
        (other_model, "was made for another model", "was made for another model"),
        (other_table, "from another table", "from another table"),
        (damaged, "not valid JSON", "not valid JSON"),
        (missing, "placement.json is missing", "has no placement.json; name fp32 or int8"),
        (nothing_fits, "no variant fits the limits", "no choice for CPUExecutionProvider"),
    ],
)
def test_a_placement_for_something_else_is_refused(
    exported: Exported, folder: Path, change: Callable[[Path], None], gate: str, server: str
) -> None:
    change(folder)
    assert gate in str(check_placement(folder))
    with pytest.raises(DataError, match=server):
        serve_auto(exported, folder, providers=[CPU])


def test_parity_of_another_model_gives_no_placement(folder: Path) -> None:
    parity = files.read_json(folder / "parity.json")
    files.write_json(folder / "parity.json", parity | {"digests": {}})
    with pytest.raises(DataError, match="another model"):
        write_placement(folder, folder / "latency.csv", LIMITS)


def test_the_first_provider_that_was_measured_is_picked(folder: Path) -> None:
    placement = read_placement(folder)
    assert placement is not None
    choice = pick(placement, [GPU, CPU])
    assert choice is not None
    assert choice.provider == CPU
    assert pick(placement, [GPU]) is None
