"""A listener for served batches that can never slow down or break a request.

Batches are handed over in a bounded queue to a thread of its own. When the listener falls behind, batches are
dropped and counted; when it raises, that is logged once and counted.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flows.serving.vision.model import ServedModel

CAPACITY = 8  # batches that may wait for the listener; each keeps its images in memory


@dataclass(frozen=True)
class BatchInfo:
    """Which model answered a batch, and when."""

    name: str
    version: str
    digest: str
    variant: str
    time: float  # time.time() at the end of the batch


OnBatch = Callable[[NDArray[np.float32], dict[str, NDArray[np.float32]], BatchInfo], None]
"""Images as the network saw them, (n, 3, S, S), and its outputs by name, rows in the same order."""
OnRequest = Callable[[ServedModel, int, float], None]
"""The model that answered an inference request, the status, the seconds it took. Called on the event loop, so
it must not wait."""
_Item = tuple[NDArray[np.float32], dict[str, NDArray[np.float32]], BatchInfo]


class Observer:
    """Calls `on_batch` off the hot path."""

    def __init__(self, on_batch: OnBatch) -> None:
        self._on_batch = on_batch
        self._waiting: queue.Queue[_Item | None] = queue.Queue(CAPACITY)
        self.dropped = 0  # batches that came while CAPACITY others were waiting
        self.failed = 0  # batches on which the listener raised
        self._thread = threading.Thread(target=self._work, name="observer", daemon=True)
        self._thread.start()

    def offer(
        self, images: NDArray[np.float32], outputs: dict[str, NDArray[np.float32]], info: BatchInfo
    ) -> None:
        """Never waits."""
        try:
            self._waiting.put_nowait((images, outputs, info))
        except queue.Full:
            self.dropped += 1

    def close(self, timeout_s: float) -> None:
        """Let the listener see what waits, `timeout_s` at most."""
        try:
            self._waiting.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            try:
                self._on_batch(*item)
            except Exception as error:
                if not self.failed:
                    logging.getLogger("trunkline.serving").error("on_batch failed", exc_info=error)
                self.failed += 1
