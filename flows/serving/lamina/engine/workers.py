"""The attention workers as the engine uses them: which ones, in which epoch, and what a loss costs (spec 14).

There may be more addresses than workers are needed; the others are spares. A worker that is lost is tried
once more, because a broken connection loses nothing: then the iteration is sent again. Otherwise a spare, or
the lost one's successor at the same address, takes its place. Every change of connections is a higher epoch,
so that what an older one still has under way counts no more.

Without a replacement in time the remaining workers go on alone. Request-level partition does not even wait:
only the requests of the lost worker are touched.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from flows.errors import DataError, ResourceError, TrunklineError
from flows.params import Lamina
from flows.serving.lamina.attention.bandwidth import ask_bandwidths
from flows.serving.lamina.attention.local import dial_local
from flows.serving.lamina.attention.partition import (
    HeadPartition,
    Partition,
    RequestPartition,
    SequencePartition,
)
from flows.serving.lamina.attention.pool import Address, AttentionPool, ModelShape, WorkerLost, name_of
from flows.serving.lamina.attention.session import Session
from flows.serving.lamina.attention.transport import Connection, Dial, dial
from flows.serving.lamina.engine.memory import pages_that_fit

PROBE_S = 1.0  # for a worker that is tried again, or a candidate, to answer
START_S = 60.0  # for all workers to answer when the engine starts
POLL_S = 0.05
RETRIES = 3  # connections to the same workers without an iteration between them

OnLost = Callable[[Address, int, str], None]
Meanwhile = Callable[[], None]


@dataclass
class Change:
    """What came of a reconnection."""

    lost: set[int] = field(default_factory=set)  # workers whose pages are gone
    rebuilt: bool = False  # another partition: nothing is where it was
    reason: str = ""


class Workers:
    """
    Args:
        addresses: of all attention workers, spares last; none: attention in this process.
        first_epoch: above that of every engine before.
        on_lost: is told address, process id and reason of each loss.
        on_epoch: is told each epoch before it is used.
        connect: how a worker is dialled; tests put a bad network here.
    """

    def __init__(
        self,
        model: ModelShape,
        settings: Lamina,
        addresses: Sequence[Address],
        token: bytes,
        *,
        first_epoch: int,
        on_lost: OnLost,
        on_epoch: Callable[[int], None],
        connect: Dial = dial,
    ) -> None:
        self.model, self.settings = model, settings
        self.epoch = first_epoch - 1
        self._token, self._on_lost, self._on_epoch = token, on_lost, on_epoch
        self._addresses: list[Address] = list(addresses)
        self._connect = connect
        if not addresses:
            self._addresses = [("this process", 0)]
            limit = settings.kv.mb_per_worker << 20
            self._connect = dial_local(Session(limit, settings.cluster.worker_threads))
        self.parity = settings.kv.redundancy == "parity"
        wanted = (settings.cluster.attention_workers or 1) + self.parity
        if wanted > len(self._addresses):
            raise DataError(f"{len(self._addresses)} attention workers at hand, {wanted} are needed")
        self._wanted = wanted
        self.assigned: list[Address | None] = list(self._addresses[:wanted])
        self._last_lost: dict[Address, float] = {}
        self._pids: dict[Address, int] = {}  # of who answered there last
        self._retries = 0
        self.pool: AttentionPool | None = None
        self.partition: Partition
        self.pages = 0
        self._stores: list[str] = []  # of the connections before: what each worker called its pages
        self._kept: list[bool] = []  # whether it still has them
        self._opening = 0  # worker that is being connected
        self._longest_s = 0.0  # that a layer has taken
        self._speeds: dict[Address, float] = {}  # of each worker, in proportion
        if isinstance(settings.cluster.weights, list):
            self._speeds = dict(zip(self._addresses, settings.cluster.weights, strict=False))
        self._divide(wanted - self.parity)

    @property
    def up(self) -> list[bool]:
        """Of each wanted worker, whether it takes part."""
        present = [self.pool is not None and address is not None for address in self.assigned]
        return present + [False] * (self._wanted - len(present))

    @property
    def down(self) -> set[int]:
        """Workers of the partition that are not there."""
        return {worker for worker, address in enumerate(self.assigned) if address is None}

    @property
    def degraded(self) -> bool:
        return not all(self.up)

    @property
    def link(self) -> AttentionPool:
        """
        Raises:
            ResourceError: there is no connection now.
        """
        if self.pool is None:
            raise ResourceError("the attention workers are not connected")
        return self.pool

    def start(self, meanwhile: Meanwhile) -> None:
        """Connect to all workers, which may still be starting. One that takes connections and says nothing is
        reported as lost, as it may be stopped and would stay so.

        Raises:
            ResourceError: not all answered.
            DataError: one refuses what it is asked, as too many pages or the wrong token.
        """
        deadline = time.monotonic() + START_S
        while True:
            began = time.monotonic()
            try:
                if self.settings.cluster.weights == "auto" and not self._speeds:
                    self._measure()
                self._open(PROBE_S * 10)
                return
            except WorkerLost as error:
                if time.monotonic() - began > PROBE_S:  # else it was refused: nobody is there yet
                    self._on_lost(self._addresses[error.worker], 0, str(error))
                if time.monotonic() > deadline:
                    raise ResourceError(f"not all attention workers have started: {error}") from None
            meanwhile()
            time.sleep(POLL_S)

    def completed(self) -> None:
        """An iteration has ended well."""
        self._retries = 0

    def reconnect(self, error: TrunklineError, meanwhile: Meanwhile) -> Change:
        """After an error of the pool: connections that work again, whatever that takes.

        Args:
            meanwhile: called again and again while nobody answers.
        """
        change = Change(reason=str(error))
        suspect = error.worker if isinstance(error, WorkerLost) else None
        self._retries += 1
        if suspect is not None and self._retries > RETRIES:
            self._give_up(suspect, str(error))
        patience = time.monotonic() + self.settings.cluster.replacement_timeout_s
        while True:
            if self.down and not self._fill(change, time.monotonic() > patience):
                meanwhile()
                time.sleep(POLL_S)
                continue
            try:
                self._open(PROBE_S)
            except WorkerLost as lost:
                change.reason = str(lost)
                self._give_up(lost.worker, str(lost))
                continue
            except DataError as refused:  # a worker of somebody else, or one that cannot hold the pages
                self._give_up(self._opening, str(refused))
                continue
            change.lost |= {j for j, kept in enumerate(self._kept) if not kept} | self.down
            return change

    def restore(self) -> Change | None:
        """When workers are missing and one has come back: take it in. Never waits."""
        if not self.degraded:
            return None
        missing = self._wanted - sum(self.up)
        found = [address for address in self._candidates() if self._answers(address)][:missing]
        if not found or (not isinstance(self.partition, RequestPartition) and len(found) < missing):
            return None
        change = Change(reason=f"{', '.join(map(name_of, found))} came back")
        if isinstance(self.partition, RequestPartition):
            for worker in sorted(self.down)[: len(found)]:
                self.assigned[worker] = found.pop(0)
        else:
            self.assigned = [*(a for a in self.assigned if a is not None), *found]
            self.parity = self.settings.kv.redundancy == "parity"
            self._divide(self._wanted - self.parity)
            change.rebuilt = True
        try:
            self._open(PROBE_S)
        except TrunklineError as error:
            later = self.reconnect(error, lambda: None)
            later.rebuilt |= change.rebuilt
            return later
        change.lost = {j for j, kept in enumerate(self._kept) if not kept}
        return change

    def move(self, addresses: Sequence[Address]) -> None:
        """From now on the workers are there. One that was left is noticed when it is spoken to."""
        self._addresses = list(addresses)

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
            self.pool = None

    # --- inside

    def _divide(self, workers: int) -> None:
        """Set the partition over so many workers, and the pages that each can hold."""
        cluster, kv = self.settings.cluster, self.settings.kv
        # a worker that took another's place, which nobody has measured, counts as the mean
        known = [self._speeds.get(address) for address in self.assigned[:workers] if address]
        mean = statistics.fmean([speed for speed in known if speed] or [1.0])
        weights = [speed or mean for speed in known]
        if cluster.partition == "head":
            self.partition = HeadPartition(self.model.kv_heads, weights)
        elif cluster.partition == "request":
            self.partition = RequestPartition(self.model.kv_heads, workers)
        else:
            self.partition = SequencePartition(self.model.kv_heads, workers)
        self.pages = pages_that_fit(
            self.partition, len(self.model.layers), self.model.head_dim, kv.mb_per_worker << 20
        )

    def _measure(self) -> None:
        """Divide by the memory bandwidth that each worker has measured."""
        found = []
        for worker, address in enumerate(self._addresses):
            try:
                found += ask_bandwidths([address], self._token, self.epoch, PROBE_S * 5)
            except TrunklineError as error:  # one that has not started yet
                raise WorkerLost(worker, str(error)) from None
        self._speeds = dict(zip(self._addresses, found, strict=True))
        self._divide(self._wanted - self.parity)

    def _open(self, timeout_s: float) -> None:
        usual = None
        if self.pool:
            usual, self._longest_s = self.pool.seconds_per_work, self.pool.longest_layer_s
        self.close()
        self.epoch += 1
        self._on_epoch(self.epoch)
        layer_ms = self.settings.cluster.layer_timeout_ms

        def connect(host: str, port: int, within_s: float) -> Connection:
            self._opening = self.assigned.index((host, port))
            return self._connect(host, port, within_s)

        self.pool = AttentionPool(
            self.assigned,
            self._token,
            self.partition,
            self.model,
            self.pages,
            epoch=self.epoch,
            layer_timeout_s=layer_ms / 1000 or None,
            connect_timeout_s=timeout_s + 2 * self._longest_s,  # HELLO waits for the layer that is computed
            dial=connect,
            seconds_per_work=usual,
            with_parity=self.parity,
        )
        # against the last connections to all, not the last answer: a successor may have been configured by an
        # attempt that failed at another worker, and a spare may have pages of a time before
        before, self._stores = self._stores, self.pool.stores
        self._kept = [bool(store) and before[j : j + 1] == [store] for j, store in enumerate(self._stores)]
        for address, pid in zip(self.assigned, self.pool.pids, strict=True):
            if address is not None:
                self._pids[address] = pid

    def _give_up(self, worker: int, reason: str) -> None:
        address = self.assigned[worker]
        if address is None:
            return
        self._on_lost(address, self._pids.pop(address, 0), reason)
        self._last_lost[address] = time.monotonic()
        self.assigned[worker] = None

    def _fill(self, change: Change, impatient: bool) -> bool:
        """Put somebody in the place of each worker that is not there, or go on without; false: wait."""
        for worker in sorted(self.down):
            for address in self._candidates():
                if self._answers(address):
                    self.assigned[worker] = address
                    break
        alive = [address for address in self.assigned if address is not None]
        if not self.down or (alive and isinstance(self.partition, RequestPartition)):
            return True
        if not impatient or not alive:
            return False
        self.assigned = list(alive)
        self.parity = False  # better all memory for what runs
        self._divide(len(alive))
        change.rebuilt = True
        return True

    def _candidates(self) -> list[Address]:
        """Addresses without a part, those that were never lost first."""
        free = [address for address in self._addresses if address not in self.assigned]
        return sorted(free, key=lambda address: self._last_lost.get(address, 0.0))

    def _answers(self, address: Address) -> bool:
        try:
            self._connect(*address, PROBE_S / 5).close()
        except TrunklineError:
            return False
        return True
