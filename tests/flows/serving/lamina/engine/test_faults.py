"""A part of `make faults`: one thing goes wrong, the texts stay the same."""

from __future__ import annotations

from pathlib import Path

from benchmarks.lamina_faults import cases, run_cases
from flows.serving.lamina.slices.bundle import Bundle

EVERY = 53  # of some thousand runs


def test_no_fault_changes_a_text_or_leaves_a_page_behind(bundle: Bundle, tmp_path: Path) -> None:
    chosen = list(cases(bundle.manifest.layers))[::EVERY]
    assert len({case.part for case in chosen}) == 5
    said: list[str] = []
    results = run_cases(bundle.folder, tmp_path, chosen, said.append)
    assert [problem for _, problem, _ in results if problem] == [], said


def test_the_whole_matrix_is_a_thousand_faults_and_covers_every_place(bundle: Bundle) -> None:
    layers = bundle.manifest.layers
    every = list(cases(layers))
    assert len(every) >= 1000
    places = {(fault.kind, fault.frame, fault.layer) for case in every for fault in case.faults}
    for layer in range(layers):
        for kind in ("kill", "stop", "drop", "corrupt", "delay", "close"):
            assert {(kind, frame, layer) for frame in ("Q", "KV", "OUT")} <= places
