"""The same tokens for every number of workers, partition, batch mix and order of arrival."""

from __future__ import annotations

import pytest
from engines import PROMPTS, an_engine, make_engine, reference

from flows.serving.lamina.requests import Sampling
from flows.serving.lamina.slices.bundle import Bundle

TOKENS = 60


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> list[list[int]]:
    return reference(bundle, PROMPTS, TOKENS)


@pytest.mark.parametrize(
    ("workers", "partition", "micro_batches", "split"),
    [(1, "head", 1, False), (2, "head", 2, True), (2, "request", 1, True), (3, "request", 2, False),
     (2, "sequence", 1, True), (3, "sequence", 2, True)],
)  # fmt: skip
def test_tokens_do_not_depend_on_how_attention_is_divided(
    bundle: Bundle, expected: list[list[int]], workers: int, partition: str, micro_batches: int, split: bool
) -> None:
    with an_engine(
        bundle, workers, split=split, cluster__partition=partition, sched__micro_batches=micro_batches,
        sched__max_rows=7,
    ) as driven:  # fmt: skip
        for index, prompt in enumerate(PROMPTS):
            driven.submit(f"r{index}", prompt, TOKENS)
        driven.turn_until_done()
        assert [driven.tokens(f"r{index}") for index in range(len(PROMPTS))] == expected
        driven.assert_nothing_leaked()


def test_attention_in_the_engines_process_gives_the_same_tokens(
    bundle: Bundle, expected: list[list[int]]
) -> None:
    local = make_engine(bundle, [], cluster__attention_workers=0)
    for index, prompt in enumerate(PROMPTS):
        local.submit(f"r{index}", prompt, TOKENS)
    local.turn_until_done()
    assert [local.tokens(f"r{index}") for index in range(len(PROMPTS))] == expected
    local.assert_nothing_leaked()


def test_late_arrivals_and_other_chunks_change_no_bit_of_a_sampled_text(bundle: Bundle) -> None:
    sampling = Sampling(temperature=1.5, top_p=0.9, seed=7, logprobs=3)
    said = []
    for rows, company in ((64, 0), (3, 2), (11, 4)):
        with an_engine(bundle, 2, sched__max_rows=rows) as driven:
            for index in range(company):
                driven.submit(f"before{index}", PROMPTS[index % 3], 25)
            for _ in range(company * 3):
                driven.engine.turn()
            driven.submit("sampled", PROMPTS[2], 30, sampling=sampling)
            for _ in range(4):
                driven.engine.turn()
            driven.submit("after", PROMPTS[0], 9)
            driven.turn_until_done()
            said.append([event for event in driven.said if getattr(event, "type", "") == "token"
                         and event.id == "sampled"])  # fmt: skip
    assert said[0] == said[1] == said[2]
    assert len({event.token for event in said[0]}) > 5
    assert all(event.logprob is not None and len(event.alternatives) == 3 for event in said[0])


def test_pages_that_run_out_put_the_youngest_back_and_change_no_token(
    bundle: Bundle, expected: list[list[int]]
) -> None:
    with an_engine(bundle, 2, kv__reserve="watermark") as driven:
        engine = driven.engine
        pages = engine.memory.pages
        allocator = engine.memory._allocators[0]
        allocator.grow(999, pages - 9)  # almost all pages are somebody else's
        for index, prompt in enumerate(PROMPTS):
            driven.submit(f"r{index}", prompt, TOKENS)
        for _ in range(2000):
            engine.turn()
            if not (engine.scheduler.running or engine.scheduler.waiting):
                break
        assert engine.scheduler.preemptions > 0
        assert [driven.tokens(f"r{index}") for index in range(len(PROMPTS))] == expected
