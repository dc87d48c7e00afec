"""How often the intervals of the scaling law hold the exponents that made a synthetic table.

    python -m benchmarks.law_coverage [--tables 40] [--draws 100]

Tables of 4 sizes × 4 data sets × 3 lengths with known exponents and normal noise, of each form of the law.
95 % intervals should hold the truth in about 95 of 100 tables. Writes benchmarks/results/law_coverage.md.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np

from flows import files
from flows.studies import scaling_law
from flows.studies.cells import Cell

RESULT = Path("benchmarks/results/law_coverage.md")
TRUTH = {"sum": (0.3, 0.45, 0.25), "product": (0.1, 0.15, 0.2)}
IRREDUCIBLE = 0.3
NOISES = (0.0005, 0.002)


def make_table(form: str, noise: float, seed: int) -> list[Cell]:
    generator = np.random.default_rng(seed)
    a, b, c = TRUTH[form]
    cells = []
    grid = itertools.product((5e6, 2e7, 8e7, 3e8), (1e4, 4e4, 1.6e5, 6.4e5), (1e4, 4e4, 1.6e5))
    for size, images, length in grid:
        n, d, t = size / 4e7, images / 8e4, length / 4e4
        law = 0.05 * n**-a + 0.04 * d**-b + 0.06 * t**-c if form == "sum" else 0.15 * n**-a * d**-b * t**-c
        loss = IRREDUCIBLE + law + noise * generator.normal()
        cells.append(Cell(f"m{size:.0f}", size, images, length, float(loss)))
    return cells


def measure(form: str, noise: float, tables: int, draws: int) -> list[str]:
    """One row: shares of tables whose interval holds the truth, and whose form was told."""
    held = np.zeros(4)
    told = 0
    for seed in range(tables):
        fit = scaling_law.fit_law(make_table(form, noise, seed), draws, seed)
        told += fit.law.form == form
        found = [fit.exponent(name)["interval"] for name in scaling_law.FACTORS]
        found.append(fit.irreducible()["interval"])
        held += [
            low <= truth <= high
            for (low, high), truth in zip(found, (*TRUTH[form], IRREDUCIBLE), strict=True)
        ]
    return [form, str(noise), *(f"{100 * share:.0f} %" for share in (*held / tables, told / tables))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.law_coverage", description=__doc__)
    parser.add_argument("--tables", type=int, default=40)
    parser.add_argument("--draws", type=int, default=100)
    given = parser.parse_args(argv)
    rows = [measure(form, noise, given.tables, given.draws) for form in TRUTH for noise in NOISES]
    lines = [
        f"# Coverage of the scaling law's 95 % intervals: {given.tables} tables a row, {given.draws} draws",
        "",
        "| form | noise | parameters | images | iterations | irreducible loss | form told |",
        "|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    text = "\n".join(lines) + "\n"
    files.write_text(RESULT, text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
