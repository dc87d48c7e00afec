"""Tokens from logits: the right distribution, and always the same one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from flows.serving.lamina.engine.sampling import NotFinite, _best, choose, uniform
from flows.serving.lamina.requests import Sampling

LOGITS = np.log(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625], np.float32))


def drawn(sampling: dict, count: int = 4000) -> np.ndarray:
    tokens = [choose(LOGITS, Sampling(seed=3, **sampling), index).token for index in range(count)]
    return np.bincount(tokens, minlength=len(LOGITS))


def test_randomness_is_a_function_of_seed_and_index_and_uniform() -> None:
    numbers = [uniform(5, index) for index in range(2000)]
    assert numbers == [uniform(5, index) for index in range(2000)]
    assert kstest(numbers, "uniform").pvalue > 1e-3
    assert len({uniform(seed, 0) for seed in range(1000)}) == 1000
    assert uniform(2**64 - 1, 2**40) != uniform(2**64 - 1, 2**40 + 1)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [({}, [0.5, 0.25, 0.125, 0.0625, 0.0625]),
     ({"temperature": 0.5}, np.array([0.25, 0.0625, 1 / 64, 1 / 256, 1 / 256]) / (0.3359375)),
     ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0, 0]),
     ({"top_p": 0.7}, [2 / 3, 1 / 3, 0, 0, 0]),
     ({"top_p": 0.76}, [4 / 7, 2 / 7, 1 / 7, 0, 0])],
)  # fmt: skip
def test_frequencies_are_those_of_the_distribution(sampling: dict, expected: list[float]) -> None:
    found, wanted = drawn(sampling), np.asarray(expected)
    assert (found[wanted == 0] == 0).all()
    assert chisquare(found[wanted > 0], wanted[wanted > 0] * found.sum()).pvalue > 1e-3


def test_no_temperature_takes_the_largest_and_ties_go_to_the_first() -> None:
    assert choose(np.array([1, 3, 3], np.float32), Sampling(temperature=0), 0).token == 1


def test_logprobs_are_those_of_the_model_before_temperature() -> None:
    choice = choose(LOGITS, Sampling(temperature=3.0, top_k=1, logprobs=2), 0)
    assert choice.token == 0
    assert choice.logprob == pytest.approx(np.log(0.5))
    assert [token for token, _ in choice.alternatives] == [0, 1]
    assert choose(LOGITS, Sampling(), 0).logprob is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(NotFinite, match="not finite"):
        choose(np.array([0, bad, 1], np.float32), Sampling(), 0)


def test_extremes_stay_in_the_vocabulary() -> None:
    logits = np.array([1e30, -1e30, 0], np.float32)
    for temperature in (1e-6, 100.0):
        assert choose(logits, Sampling(temperature=temperature, top_p=1e-9), 4).token == 0


@pytest.mark.parametrize("count", [1, 5, 100, 3000])
def test_the_best_are_those_of_a_full_sort(count: int) -> None:
    generator = np.random.default_rng(0)
    logits = generator.integers(0, 400, 3000).astype(np.float32)  # many equal ones
    np.testing.assert_array_equal(_best(logits, count), np.argsort(-logits, kind="stable")[:count])


@pytest.mark.parametrize("spread", [0.0, 8.0])  # flat: nearly all are within top_p; steep: a few
def test_top_p_over_a_large_vocabulary_keeps_the_fewest_that_reach_it(spread: float) -> None:
    logits = (np.random.default_rng(0).standard_normal(5000) * spread).astype(np.float32)
    weights = np.sort(np.exp(logits.astype(np.float64)))[::-1]
    kept = int(np.searchsorted(weights.cumsum(), 0.9 * weights.sum())) + 1
    allowed = set(np.argsort(-logits, kind="stable")[:kept].tolist())
    found = {choose(logits, Sampling(seed=1, top_p=0.9), index).token for index in range(1500)}
    assert found <= allowed
    assert len(found) > min(kept, 1500) / 4
