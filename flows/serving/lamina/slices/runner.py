"""Running a bundle: the steps in order, with whatever computes attention between them.

`Slices` knows rows and nothing of sequences: any mix of tokens that are decoded and of prompt chunks. Who
knows which rows belong together is the attention, behind three calls per layer: Q goes out first, K and V
when they are there, then the output is awaited. `LocalAttention` is the reference for it, in this process and
in plain torch; `greedy` is a whole server in one function, to compare with.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flows.errors import ConfigError, DataError
from flows.serving import session
from flows.serving.lamina.slices.bundle import Bundle, LayerAttention, Program, Step

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class Attention(Protocol):
    """Attention of the rows of one iteration; q, k, v and the output are (rows, heads, head size)."""

    def send_q(self, layer: int, q: Floats) -> None: ...

    def send_kv(self, layer: int, k: Floats, v: Floats) -> None: ...

    def receive(self, layer: int) -> Floats: ...


class Slices:
    """The loaded programs of a bundle; made by `open_slices`."""

    def __init__(self, bundle: Bundle, sessions: dict[tuple[int, str], Any], split: bool) -> None:
        self.bundle = bundle
        self.split = split
        self._sessions = sessions

    def run(self, input_ids: Ints, position_ids: Ints, attention: Attention) -> Floats:
        """Logits, (rows, vocabulary), of rows of tokens at their positions, both (rows,)."""
        run = self.start(input_ids, position_ids, attention)
        while run.step():
            pass
        return run.logits

    def start(
        self, input_ids: Ints, position_ids: Ints, attention: Attention, wanted: Ints | None = None
    ) -> Run:
        """A run to be stepped through, so that several can take turns.

        Args:
            wanted: rows whose logits are asked for; None: all.
        """
        return Run(self, input_ids, position_ids, attention, wanted)

    def execute(self, layer: int, program: Program, values: dict[str, NDArray[Any]]) -> None:
        """Run one program of a step; its outputs are added to `values`."""
        feeds = {f"x{index}": values[value.name] for index, value in enumerate(program.inputs)}
        answers = self._sessions[layer, program.kind].run(None, feeds)
        values.update((value.name, answer) for value, answer in zip(program.outputs, answers, strict=True))


class Run:
    """One pass through the decoder. `step` does what lies between two attentions and sends q, k and v."""

    def __init__(
        self,
        slices: Slices,
        input_ids: Ints,
        position_ids: Ints,
        attention: Attention,
        wanted: Ints | None,
    ) -> None:
        self._slices, self._attention, self._wanted = slices, attention, wanted
        self._steps = iter(slices.bundle.manifest.steps)
        self._values: dict[str, NDArray[Any]] = {"input_ids": input_ids, "position_ids": position_ids}
        self._pending: Step | None = None  # whose attention was sent and is to be received
        self.seconds: dict[str, float] = {}  # by kind of program, and of waiting for attention

    @property
    def logits(self) -> Floats:
        """(wanted rows, vocabulary), once `step` has said that there is no further one."""
        return self._values["logits"]

    def step(self) -> bool:
        """Do the next step; false when it was the last."""
        values = self._receive()
        step = next(self._steps)
        layer = step.layer
        last = layer == self._slices.bundle.manifest.layers
        if last and self._wanted is not None:  # every operation is one of rows, so the others can be left out
            if not len(self._wanted):
                vocabulary = self._slices.bundle.manifest.vocab_size
                self._values = {"logits": np.empty((0, vocabulary), np.float32)}
                return False
            values = {name: value[self._wanted] for name, value in values.items()}
        sent = False
        programs = step.chosen(self._slices.split)
        for program in programs:
            began = time.perf_counter()
            self._slices.execute(layer, program, values)
            self._count(program.kind, began)
            if last:
                self._values = values
                return False
            if program is programs[0]:
                self._attention.send_q(layer, values[f"q_{layer}"])
            if not sent and f"k_{layer}" in values and f"v_{layer}" in values:
                self._attention.send_kv(layer, values[f"k_{layer}"], values[f"v_{layer}"])
                sent = True
        self._values = {name: values[name] for name in step.context}
        self._pending = step
        return True

    def _receive(self) -> dict[str, NDArray[Any]]:
        values = self._values
        if self._pending is not None:
            began = time.perf_counter()
            layer = self._pending.layer
            values = {**values, f"attention_{layer}": self._attention.receive(layer)}
            self._count("attention", began)
        return values

    def _count(self, part: str, began: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began


def open_slices(
    bundle: Bundle,
    *,
    split: bool = True,
    threads: int = 0,
    providers: Sequence[str] = (session.CPU,),
    spin: bool = True,
) -> Slices:
    """Load the programs of a verified bundle: those that let Q leave first, or without `split` one per step.

    Raises:
        ConfigError, ResourceError, DataError: as `session.open_runtime`, or a graph that is not what the
            manifest says.
    """
    sessions: dict[tuple[int, str], Any] = {}
    for step in bundle.manifest.steps:
        for program in step.chosen(split):
            weights = {f"w{index}": bundle.tensor(name) for index, name in enumerate(program.weights)}
            runtime = session.open_runtime(
                bundle.folder / program.graph,
                list(providers),
                threads or session.available_threads(),
                weights,
                spin,
            )
            found = ([v.name for v in runtime.get_inputs()], [v.name for v in runtime.get_outputs()])
            if found != ([f"x{n}" for n in range(len(program.inputs))],
                         [f"y{n}" for n in range(len(program.outputs))]):  # fmt: skip
                raise DataError(
                    f"{bundle.folder / program.graph} has other inputs or outputs than the manifest says; "
                    "export the model again"
                )
            sessions[step.layer, program.kind] = runtime
    return Slices(bundle, sessions, split)


@dataclass(frozen=True)
class Row:
    """One token of one request at its position."""

    request: int
    position: int


class LocalAttention:
    """Exact attention in this process, one row after the other. K and V are kept by position."""

    def __init__(self, properties: Sequence[LayerAttention]) -> None:
        self._properties = properties
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (request, layer) → (tokens, KV, hd)
        self._rows: Sequence[Row] = ()
        self._q: Floats | None = None

    def begin(self, rows: Sequence[Row]) -> None:
        """Say what the rows of the next run are. A request's rows come in order, without gaps."""
        self._rows = rows

    def end(self, request: int) -> None:
        """Forget a request."""
        for layer in range(len(self._properties)):
            self._kept.pop((request, layer), None)

    def send_q(self, layer: int, q: Floats) -> None:
        self._q = q

    def send_kv(self, layer: int, k: Floats, v: Floats) -> None:
        for row, new_k, new_v in zip(self._rows, torch.from_numpy(k), torch.from_numpy(v), strict=True):
            keys, values = self._kept.get((row.request, layer), (new_k[None][:0], new_v[None][:0]))
            keys, values = keys[: row.position], values[: row.position]
            assert len(keys) == row.position, (
                f"request {row.request} skips from {len(keys)} to {row.position}"
            )
            self._kept[row.request, layer] = (
                torch.cat((keys, new_k[None])),
                torch.cat((values, new_v[None])),
            )

    def receive(self, layer: int) -> Floats:
        assert self._q is not None
        outputs = [
            self._attend(layer, row, q) for row, q in zip(self._rows, torch.from_numpy(self._q), strict=True)
        ]
        answer: Floats = torch.stack(outputs).numpy()
        return answer

    def _attend(self, layer: int, row: Row, q: Tensor) -> Tensor:
        properties = self._properties[layer]
        first = max(0, row.position + 1 - properties.window) if properties.window else 0
        k, v = (kept[first : row.position + 1] for kept in self._kept[row.request, layer])
        grouped = q.view(k.shape[1], -1, q.shape[-1])  # (KV, heads of the group, hd)
        scores = torch.einsum("kgd,tkd->kgt", grouped, k) * properties.scale
        if properties.soft_cap:
            scores = properties.soft_cap * torch.tanh(scores / properties.soft_cap)
        return torch.einsum("kgt,tkd->kgd", scores.softmax(-1), v).reshape(q.shape)


@dataclass(frozen=True)
class Continuation:
    """What came after one prompt: token ids, and the logits each was chosen from."""

    tokens: tuple[int, ...]
    logits: Floats  # (tokens, vocabulary)


def greedy(
    slices: Slices, prompts: Sequence[Sequence[int]], max_tokens: int, *, chunk_rows: int = 16
) -> list[Continuation]:
    """Continue all prompts at once: in each iteration a row per running request, and in at most `chunk_rows`
    further rows the next pieces of the prompts.

    A request ends with an end token of the manifest, which is part of its continuation, or after
    `max_tokens`.

    Raises:
        ConfigError: an empty prompt, an unknown token, or more tokens than the model has positions.
    """
    manifest = slices.bundle.manifest
    for prompt in prompts:
        _check_prompt(prompt, max_tokens, manifest.vocab_size, manifest.max_context)
    attention = LocalAttention(manifest.attention)
    texts = [list(prompt) for prompt in prompts]
    done = [0] * len(prompts)  # rows that were run
    logits: list[list[Floats]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    while running:
        rows: list[Row] = []
        room = chunk_rows
        for request in sorted(running):
            decoding = done[request] >= len(prompts[request])
            count = 1 if decoding else min(room, len(texts[request]) - done[request])
            room -= 0 if decoding else count
            rows += [Row(request, done[request] + offset) for offset in range(count)]
        attention.begin(rows)
        answers = slices.run(
            np.array([texts[row.request][row.position] for row in rows], np.int64),
            np.array([row.position for row in rows], np.int64),
            attention,
        )
        for row, answer in zip(rows, answers, strict=True):
            done[row.request] = row.position + 1
            if row.position + 1 < len(texts[row.request]):
                continue
            token = int(answer.argmax())
            texts[row.request].append(token)
            logits[row.request].append(answer)
            made = len(logits[row.request])
            if made == max_tokens or token in manifest.eos_token_ids:
                running.remove(row.request)
                attention.end(row.request)
    return [
        Continuation(tuple(text[len(prompt) :]), np.stack(made))
        for text, prompt, made in zip(texts, prompts, logits, strict=True)
    ]


def _check_prompt(prompt: Sequence[int], max_tokens: int, vocabulary: int, positions: int) -> None:
    if not prompt or max_tokens < 1:
        raise ConfigError("a prompt needs at least one token, and at least one has to be asked for")
    if not all(0 <= token < vocabulary for token in prompt):
        raise ConfigError(f"a prompt has tokens outside the vocabulary of {vocabulary}")
    if len(prompt) + max_tokens > positions:
        raise ConfigError(
            f"a prompt of {len(prompt)} tokens and {max_tokens} more are over the model's {positions} "
            "positions"
        )
