"""What the analysis concludes: the published figures, known truths, nothing claimed without cause."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from flows.errors import ConfigError, DataError
from flows.studies import advice, correlations, overfitting, scaling_law
from flows.studies.analysis import Analysis, AnalysisSettings, analyse, to_dict
from flows.studies.cells import Cell, check_cells, read_cells
from flows.studies.held_out import check, check_all

PUBLISHED = Path(__file__).parents[2] / "benchmarks/data_scaling/published_cells.csv"
QUICK = AnalysisSettings(draws=200, law_draws=20)


@pytest.fixture(scope="module")
def published() -> Analysis:
    return analyse(read_cells(PUBLISHED), QUICK)


def synthetic(form: str, seed: int, noise: float = 0.001, lengths=(1e4, 4e4, 1.6e5)) -> list[Cell]:
    """A grid of 4 sizes, 3 data sets and `lengths` whose law is known: `TRUTH`."""
    generator = np.random.default_rng(seed)
    cells = []
    for size, images, length in itertools.product((5e6, 2e7, 8e7, 3e8), (1e4, 8e4, 6.4e5), lengths):
        n, d, t = size / 4e7, images / 8e4, length / 4e4
        if form == "sum":
            loss = 0.3 + 0.05 * n**-0.3 + 0.04 * d**-0.45 + 0.06 * t**-0.25
        else:
            loss = 0.3 + 0.15 * n**-0.1 * d**-0.15 * t**-0.2
        loss += noise * generator.normal()
        cells.append(Cell(f"m{size:.0f}", size, images, length, loss, 90 - 60 * loss))
    return cells


TRUTH = {"sum": (0.3, 0.45, 0.25), "product": (0.1, 0.15, 0.2)}


# --------------------------------------------------------------------------------- published cells


def test_published_correlations_are_those_of_the_specification(published):
    found = published.correlations
    assert round(found["all"].pearson, 2) == -0.79
    assert round(found["all"].spearman, 2) == -0.90
    assert found["below_boundary"].cells == 51
    assert round(found["below_boundary"].pearson, 2) == -0.89
    assert found["at_or_above_boundary"].cells == 12
    assert round(found["at_or_above_boundary"].pearson, 2) == 0.23
    assert published.boundary.loss == pytest.approx(0.48, abs=0.001)
    assert published.boundary.intercept_below == pytest.approx(122.7, abs=0.05)
    assert published.boundary.slope_below == pytest.approx(-82.1, abs=0.05)
    low, high = found["at_or_above_boundary"].pearson_interval
    assert low < 0 < high  # twelve cells of five series: nobody knows


def test_overfitting_shows_in_the_loss_before_it_shows_in_the_accuracy(published):
    assert sorted(round(points, 2) for points in published.early_overfitted) == [0.42, 0.59, 0.98, 1.56]
    assert (
        "4 overfitted cells before it finetune 0.4 to 1.6 points above"
        in to_dict(published)["conclusions"]["accuracy"]
    )


def test_published_overfitting_is_that_of_the_specification(published):
    assert {(series.model, series.data) for series in published.overfitted} == {
        ("S", "IN1K 10%"), ("B", "IN1K 10%"), ("L", "IN1K 10%"),
        ("B", "IN1K 20%"), ("L", "IN1K 20%"), ("H", "IN1K 20%"),
        ("H", "IN1K 50%"), ("g", "IN1K 50%"),
    }  # fmt: skip
    falls = {
        (found["model"], found["data"]): found["change"] for found in to_dict(published)["accuracy_falls"]
    }
    assert falls == {
        ("L", "IN1K 10%"): pytest.approx(-0.19),
        ("H", "IN1K 20%"): pytest.approx(-0.91),
    }


def test_largest_published_model_is_predicted_as_well_as_is_said(published):
    held = published.held_out
    assert "g" in held.what
    assert {each.cell.model for each in held.predictions} == {"g"}
    errors = np.array([each.predicted - each.truth for each in held.predictions if each.is_fitted])
    assert held.fitted.mean_absolute == pytest.approx(np.abs(errors).mean())
    assert held.fitted.bias == pytest.approx(errors.mean())
    assert held.fitted.mean_absolute < 0.003
    by_hand = {(c.images, c.iterations): c.loss for c in read_cells(PUBLISHED).cells if c.model == "H"}
    for each in held.predictions:
        assert each.nearest == by_hand[each.cell.images, each.cell.iterations]
    assert "hardly better" in to_dict(published)["held_out"]["verdict"]


def test_held_out_model_does_not_teach_its_own_law():
    cells = synthetic("sum", 0)
    spoilt = [replace(c, validation_loss=9.0) if c.model == "m300000000" else c for c in cells]
    honest, other = check_all(cells, 0, 0)[0], check_all(spoilt, 0, 0)[0]
    assert [p.predicted for p in honest.predictions] == [p.predicted for p in other.predictions]


def test_json_has_no_nan_and_what_was_promised(published):
    said = json.loads(json.dumps(to_dict(published), allow_nan=False))
    assert {
        "correlations",
        "overfitted",
        "fit",
        "held_out",
        "left_out",
        "boundary",
        "advice",
        "notes",
    } <= set(said)
    for name in ("parameters", "images", "iterations"):
        found = said["fit"]["exponents"][name]
        assert found["interval"][0] <= found["value"] <= found["interval"][1]
    assert said["fit"]["irreducible"]["is_identified"] is False


def test_same_table_same_answer(published):
    assert to_dict(analyse(read_cells(PUBLISHED), QUICK)) == to_dict(published)


# -------------------------------------------------------------------------------------------- law


@pytest.mark.parametrize("form", ["sum", "product"])
def test_known_exponents_lie_in_their_intervals(form):
    inside = np.zeros(3)
    seeds = range(6)
    for seed in seeds:
        fit = scaling_law.fit_law(synthetic(form, seed), 60, seed)
        assert fit.law.form == form
        for at, name in enumerate(scaling_law.FACTORS):
            low, high = fit.exponent(name)["interval"]
            inside[at] += low <= TRUTH[form][at] <= high
    assert inside.sum() >= 0.8 * 3 * len(seeds)  # of 95 %, from 18 draws
    assert fit.irreducible()["interval"][0] - 0.02 < 0.3 < fit.irreducible()["interval"][1] + 0.02


def test_law_without_noise_is_exact():
    fit = scaling_law.fit_law(synthetic("sum", 0, noise=0.0), 20, 0)
    assert fit.law.exponents == pytest.approx(TRUTH["sum"], abs=1e-4)
    assert fit.law.irreducible == pytest.approx(0.3, abs=1e-4)
    for at, name in enumerate(scaling_law.FACTORS):
        low, high = fit.exponent(name)["interval"]
        assert low <= TRUTH["sum"][at] <= high
    assert fit.irreducible()["is_identified"]


def test_one_outlier_does_not_move_the_law():
    cells = synthetic("sum", 1)
    cells[7] = replace(cells[7], validation_loss=cells[7].loss + 0.03)
    fit = scaling_law.fit_law(cells, 0, 0)
    assert fit.law.exponents == pytest.approx(TRUTH["sum"], abs=0.08)


def test_two_lengths_fix_no_exponent_of_a_sum():
    fit = scaling_law.fit_law(synthetic("sum", 2, lengths=(1e4, 1.6e5)), 20, 0)
    found = fit.exponent("iterations")
    assert fit.law.form == "sum"
    assert found["form"] == "product"
    assert "two values" in found["reason"]
    assert fit.doubling_gain("iterations", synthetic("sum", 2))["value"] > 0


def test_images_of_another_source_have_a_constant_of_their_own():
    cells = [replace(c, data="A 50%" if c.images < 6e5 else "A 100%") for c in synthetic("sum", 3)]
    foreign = [
        replace(c, data="B 100%", images=3e6, validation_loss=c.loss + 0.02) for c in cells if c.images > 6e5
    ]
    fit = scaling_law.fit_law([*cells, *foreign], 0, 0)
    assert fit.law.corpora == ("A", "B")
    assert fit.law.offsets[1] == pytest.approx(0.02 + 0.04 * (8**-0.45 - 37.5**-0.45), abs=0.01)


def test_too_few_cells_name_both_numbers():
    with pytest.raises(DataError, match="needs at least 7 cells, there are 5"):
        analyse(check_cells(synthetic("sum", 0)[:2] + synthetic("sum", 0)[-3:]), QUICK)
    with pytest.raises(DataError, match="at least one has to vary"):
        analyse(check_cells([Cell("a", 1.0, 1.0, 1.0, 0.5)]), QUICK)


def test_table_that_only_overfits_has_no_law_but_the_rest():
    cells = [replace(c, validation_loss=0.5 + c.iterations / 1e6) for c in synthetic("sum", 0)]
    found = analyse(check_cells(cells), QUICK)
    assert found.fit is None
    assert found.advice is None
    assert len(found.overfitted) == 12
    json.dumps(to_dict(found), allow_nan=False)


# ----------------------------------------------------------------------- boundary and correlations


def test_straight_relation_has_no_boundary():
    cells = read_cells(PUBLISHED).cells
    found = 0
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(size=len(cells)) * 0.4
        straight = [
            replace(c, finetuned_top1=122.7 - 82.1 * c.loss + e) for c, e in zip(cells, noise, strict=True)
        ]
        boundary, reason = correlations.find_boundary(straight, 100, seed)
        found += boundary is not None
        assert boundary or reason
    assert found <= 1


def test_noise_has_no_boundary():
    cells = read_cells(PUBLISHED).cells
    found = 0
    for seed in range(20):
        tops = 80 + np.random.default_rng(seed).normal(size=len(cells))
        noise = [replace(c, finetuned_top1=float(top)) for c, top in zip(cells, tops, strict=True)]
        found += correlations.find_boundary(noise, 100, seed)[0] is not None
    assert found <= 2


def test_planted_boundary_is_found():
    generator = np.random.default_rng(0)
    losses = np.sort(generator.uniform(0.4, 0.6, 60))
    tops = 80 - 100 * np.minimum(losses, 0.5) + 0.3 * generator.normal(size=60)
    tops[losses >= 0.5] -= 3 * generator.uniform(size=(losses >= 0.5).sum())
    cells = [
        Cell(f"m{at % 5}", at % 5 + 1.0, at // 5 + 1.0, 1.0, float(x), float(y))
        for at, (x, y) in enumerate(zip(losses, tops, strict=True))
    ]
    boundary, _ = correlations.find_boundary(cells, 100, 0)
    assert boundary.plausible[0] <= 0.505
    assert boundary.plausible[1] >= 0.495
    assert boundary.loss == pytest.approx(0.5, abs=0.03)


def test_resampled_coefficients_equal_those_of_the_repeated_cells():
    generator = np.random.default_rng(3)
    x, y = generator.integers(0, 6, 15).astype(float), generator.normal(size=15)
    weights = generator.integers(0, 4, size=(5, 15)).astype(float)
    pearson = correlations._weighted_pearson(x[None], y[None], weights)
    spearman = correlations._weighted_spearman(x, y, weights)
    for row in range(5):
        repeated = np.repeat(np.arange(15), weights[row].astype(int))
        assert pearson[row] == pytest.approx(stats.pearsonr(x[repeated], y[repeated])[0])
        assert spearman[row] == pytest.approx(stats.spearmanr(x[repeated], y[repeated])[0])


@pytest.mark.parametrize("tops", [None, 80.0])
def test_accuracy_that_is_absent_or_constant_gives_no_coefficient(tops):
    cells = [replace(cell, finetuned_top1=tops) for cell in synthetic("sum", 0)]
    found = analyse(check_cells(cells), QUICK)
    assert found.correlations["all"].pearson is None
    assert found.correlations["all"].reason
    assert found.boundary is None
    assert found.fit is not None


def test_nothing_is_averaged_over_a_missing_cell():
    cells = synthetic("sum", 0)
    whole = analyse(check_cells(cells[:-1]), QUICK)
    holed = analyse(check_cells([*cells[:-1], replace(cells[-1], validation_loss=float("nan"))]), QUICK)
    first, second = to_dict(whole), to_dict(holed)
    assert second["left_out"][0]["reason"] == "validation_loss is nan"
    assert first["fit"] == second["fit"]
    assert first["correlations"] == second["correlations"]


# ------------------------------------------------------------------------- overfitting and advice


def test_series_with_one_length_is_not_judged():
    cells = [cell for cell in synthetic("sum", 0) if cell.iterations == 1e4]
    found = analyse(check_cells(cells), QUICK)
    assert {judged.verdict for judged in found.cells} == {"unknown"}
    assert not found.overfitted
    assert len(to_dict(found)["verdict_unknown"]) == 12
    assert any("one length only" in note for note in found.notes)


def test_repeated_seeds_count_as_their_mean():
    series = overfitting.find_series(
        [
            Cell("a", 1.0, 1.0, length, loss, seed=seed)
            for length, losses in ((1.0, (0.5, 0.52)), (2.0, (0.49, 0.54)))
            for seed, loss in zip("01", losses, strict=True)
        ]
    )
    found = series["a", 1.0]
    assert found.losses == pytest.approx((0.51, 0.515))
    assert found.is_overfitted


def test_risk_follows_the_nearest_evidence(published):
    judge = advice.gather_evidence(published.fit, read_cells(PUBLISHED).cells).judge
    assert judge(1.06e9, 641_000, 500_000) == "yes"
    assert judge(655e6, 200_000, 250_000) == "yes"  # as with 256,000 images already
    assert judge(195e6, 1_281_167, 500_000) == "no"
    assert judge(5e9, 1_281_167, 500_000) == "unknown"
    assert judge(1.06e9, 128_000, 230_000) == "yes"  # L rises from 125,000 on
    assert judge(195e6, 128_000, 125_000) == "yes"  # far above the law already
    assert judge(655e6, 641_000, 250_000) == "no"
    assert judge(655e6, 641_000, 370_000) == "unknown"


def test_advice_bars_models_that_overfit_and_asks_for_images(published):
    cells = read_cells(PUBLISHED).cells
    found = advice.advise(published.fit, cells, 1e18, 256_000, 2048)
    assert found.best.model not in ("H", "g")
    assert {choice.model for choice in found.choices if choice.overfits == "yes"} >= {"B", "L", "H", "g"}
    assert found.best.overfits == "no"
    assert (found.best.model, found.best.iterations) == ("B", 250_000)
    assert found.more_data.startswith("yes")
    none = advice.advise(published.fit, cells, 5e17, 60_000, 2048)
    assert none.best is None
    assert none.more_data.startswith("yes")


@pytest.mark.parametrize("images", [256_000, 641_000, 1_281_167, 14_200_000])
def test_larger_budget_is_never_advised_a_higher_loss(published, images):
    rungs = advice.climb(published.fit, read_cells(PUBLISHED).cells, images, 2048)
    losses = [rung.best.loss for rung in rungs]
    assert losses == sorted(losses, reverse=True)
    assert {rung.best.overfits for rung in rungs} == {"no"}


def test_question_outside_the_table_is_said(published):
    cells = read_cells(PUBLISHED).cells
    rich = advice.advise(published.fit, cells, 1e21, 1_281_167, 2048)
    assert any("does not cover" in limit for limit in rich.limits)
    assert rich.best.iterations <= 500_000
    poor = advice.advise(published.fit, cells, 1e12, 1_281_167, 2048)
    assert any("does not cover" in limit for limit in poor.limits)
    assert not poor.best.is_covered
    strange = advice.advise(published.fit, cells, 1e17, 5e9, 2048)
    assert any("lie outside" in limit for limit in strange.limits)


def test_law_that_misses_the_nearest_cell_is_said_to(published):
    found = advice.advise(published.fit, read_cells(PUBLISHED).cells, 5e17, 641_000, 2048)
    assert any("nearest cell, g · IN1K 50% · 250,000, has 0.4515" in limit for limit in found.limits)
    good = advice.advise(published.fit, read_cells(PUBLISHED).cells, 5e17, 1_281_167, 2048)
    assert not any("nearest cell" in limit for limit in good.limits)


def test_flops_of_the_table_are_the_unit_where_all_cells_have_them():
    cells = [replace(c, flops=7 * c.iterations) for c in synthetic("sum", 0)]
    costs = advice.count_costs(cells, 64)
    assert costs.unit == "FLOPs"
    assert set(costs.per_step.values()) == {7.0}
    half = [*cells[1:], replace(cells[0], flops=None)]
    assert advice.count_costs(half, 64).assumption


def test_impossible_settings_are_refused():
    for wrong in ({"budget": -1.0}, {"images": float("nan")}, {"draws": 1}, {"seed": -1}):
        with pytest.raises(ConfigError):
            AnalysisSettings(**wrong).check()


def test_nothing_left_to_learn_from_is_said():
    cells = [c for c in synthetic("sum", 0) if c.model == "m5000000"]
    assert check("all", cells, lambda cell: True, "parameters", 0, 0).reason
