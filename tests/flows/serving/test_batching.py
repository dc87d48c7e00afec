"""The batcher against a network of one line, so that each row's owner can be told."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flows.serving.vision.batching import Batch, Batcher, Expired, QueueFull, Stopped, Work

POISON = 666.0


class Doubler:
    """Answers 2x for x; images that hold POISON fail. The gate holds a batch while it is closed."""

    def __init__(self, max_batch: int = 8, max_wait_s: float = 0.0) -> None:
        self.max_batch = max_batch
        self.max_wait_s = max_wait_s
        self.sizes: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.entered.set()
        assert self.gate.wait(30)
        self.sizes.append(len(images))
        if (images == POISON).any():
            raise ValueError("cannot digest this")
        return {"features": images, "logits": 2 * images}


def work(model: Doubler, values: list[float], deadline: float = math.inf) -> Work:
    loop = asyncio.get_running_loop()
    return Work(model, np.asarray(values, dtype=np.float32)[:, None], deadline, loop, loop.create_future())


async def entered(model: Doubler) -> None:
    await asyncio.to_thread(model.entered.wait, 30)


def run(scenario: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_requests_of_all_sizes_get_their_own_rows() -> None:
    async def scenario() -> None:
        model, batches = Doubler(max_batch=8), []
        batcher = Batcher(1000, batches.append)
        generator = np.random.default_rng(0)
        works = [work(model, generator.random(size).tolist()) for size in generator.integers(1, 20, 40)]
        for entry in works:
            batcher.submit(entry)
        for entry in works:
            np.testing.assert_array_equal(await entry.future, 2 * entry.images)
        total = sum(len(entry.images) for entry in works)
        assert sum(model.sizes) == total  # each image once
        assert max(model.sizes) == 8
        assert model.sizes.count(8) >= total // 8 - 1, "requests are split to fill batches"
        assert [len(batch.images) for batch in batches] == model.sizes
        assert sum(len(batch.waited_s) for batch in batches) == len(works)
        assert batcher.queued_images == 0
        batcher.close(10)

    run(scenario)


def test_what_arrives_during_a_batch_is_run_together() -> None:
    async def scenario() -> None:
        model = Doubler()
        batcher = Batcher(100)
        model.gate.clear()
        works = [work(model, [float(i)]) for i in range(6)]
        batcher.submit(works[0])
        await entered(model)
        for entry in works[1:]:
            batcher.submit(entry)
        model.gate.set()
        for entry in works:
            await entry.future
        assert model.sizes == [1, 5]
        batcher.close(10)

    run(scenario)


def test_an_idle_server_does_not_wait_for_company() -> None:
    async def scenario() -> None:
        model = Doubler(max_wait_s=1000.0)
        batcher = Batcher(100)
        batcher.approaching = 3
        entry = work(model, [1.0])
        batcher.submit(entry)
        assert await entry.future == 2.0
        batcher.close(10)

    run(scenario)


def test_a_busy_server_waits_for_what_is_on_its_way_but_not_for_nobody() -> None:
    async def scenario() -> None:
        model = Doubler(max_batch=3, max_wait_s=1000.0)
        batcher = Batcher(100)
        for approaching, sizes in ((1, [1, 3]), (0, [1, 2, 1])):
            model.sizes.clear()
            model.entered.clear()
            model.gate.clear()
            batcher.approaching = approaching
            works = [work(model, [float(i)]) for i in range(4)]
            batcher.submit(works[0])
            await entered(model)
            batcher.submit(works[1])
            batcher.submit(works[2])
            model.gate.set()
            await works[0].future
            if not approaching:
                await works[2].future
            else:
                await asyncio.sleep(0.05)
                assert not works[1].future.done()
            batcher.submit(works[3])
            for entry in works:
                await entry.future
            assert model.sizes == sizes
        batcher.close(10)

    run(scenario)


def test_a_bad_request_fails_alone() -> None:
    async def scenario() -> None:
        model = Doubler(max_batch=4)
        batcher = Batcher(100)
        model.gate.clear()
        first = work(model, [0.0])
        batcher.submit(first)
        await entered(model)
        good = [work(model, [1.0, 2.0]), work(model, [4.0] * 3)]
        bad = work(model, [POISON] * 6)  # also split over batches
        for entry in (good[0], bad, good[1]):
            batcher.submit(entry)
        model.gate.set()
        for entry in (first, *good):
            np.testing.assert_array_equal(await entry.future, 2 * entry.images)
        with pytest.raises(ValueError, match="digest"):
            await bad.future
        assert batcher.queued_images == 0
        batcher.close(10)

    run(scenario)


def test_models_are_never_mixed_in_a_batch() -> None:
    async def scenario() -> None:
        old, new = Doubler(), Doubler()
        batcher = Batcher(100)
        old.gate.clear()
        works = [work(model, [1.0]) for model in (old, old, old, new, new, old)]
        batcher.submit(works[0])
        await entered(old)
        for entry in works[1:]:
            batcher.submit(entry)
        old.gate.set()
        for entry in works:
            await entry.future
        assert (old.sizes, new.sizes) == ([1, 2, 1], [2])
        batcher.close(10)

    run(scenario)


def test_the_queue_is_bounded_in_images_and_says_when_there_is_room() -> None:
    async def scenario() -> None:
        model = Doubler(max_batch=2)
        batcher = Batcher(5)
        measured = work(model, [0.0])
        batcher.submit(measured)
        await measured.future
        model.entered.clear()
        model.gate.clear()
        running = work(model, [0.0])
        batcher.submit(running)
        await entered(model)
        waiting = [work(model, [1.0] * 2), work(model, [1.0] * 3)]
        for entry in waiting:
            batcher.submit(entry)
        batcher._images_per_s = 0.5
        with pytest.raises(QueueFull) as caught:
            batcher.submit(work(model, [1.0]))
        assert caught.value.retry_after_s == 10  # 5 images at 0.5 images/s
        batcher.drop(waiting[0])
        assert batcher.queued_images == 3
        batcher.submit(again := work(model, [7.0]))  # it made room at once
        model.gate.set()
        assert await again.future == 14.0
        assert sum(model.sizes) == 1 + 1 + 3 + 1  # what was dropped is not computed
        batcher.close(10)

    run(scenario)


def test_late_work_is_not_computed() -> None:
    async def scenario() -> None:
        model = Doubler()
        batcher = Batcher(100)
        model.gate.clear()
        first, late, other = work(model, [0.0]), work(model, [1.0], time.monotonic()), work(model, [2.0])
        batcher.submit(first)
        await entered(model)
        batcher.submit(late)
        batcher.submit(other)
        model.gate.set()
        assert await other.future == 4.0
        with pytest.raises(Expired):
            await late.future
        assert model.sizes == [1, 1]
        batcher.close(10)

    run(scenario)


def test_closing_answers_everything() -> None:
    async def scenario() -> None:
        model = Doubler()
        batcher = Batcher(100)
        model.gate.clear()
        running, waiting = work(model, [1.0]), work(model, [2.0])
        batcher.submit(running)
        await entered(model)
        batcher.submit(waiting)
        batcher.close(0)
        with pytest.raises(Stopped):
            await waiting.future
        with pytest.raises(Stopped):
            batcher.submit(work(model, [3.0]))
        model.gate.set()
        assert await running.future == 2.0
        assert batcher._thread is not None
        await asyncio.to_thread(batcher._thread.join, 30)
        assert not batcher._thread.is_alive()

    run(scenario)


def test_a_listener_that_raises_does_not_end_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    def listen(batch: Batch) -> None:
        raise RuntimeError("listener broke")

    async def scenario() -> None:
        model = Doubler()
        batcher = Batcher(100, listen)
        for value in (1.0, 2.0):
            batcher.submit(entry := work(model, [value]))
            assert await entry.future == 2 * value
        batcher.close(10)

    run(scenario)
    assert "listener broke" in caplog.text
