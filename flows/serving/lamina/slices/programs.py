"""The cut graph → one small graph per step: QX, then KVX, then POST fused with the next QX.

    step 0        input_ids, position_ids                  → q, context, carry
    step j        attention of layer j-1, context          → q, context, carry
    step L        attention of layer L-1, context          → logits
    KVX of step j  carry, what step j itself was given     → k, v, the rest of the context

QX holds what Q needs and nothing dear beside it, so that Q can leave first; KVX holds the other dear
operators, which run while attention workers already read old tokens (section 4 of the paper). A family whose
Q, K and V come out of one projection has no KVX: its K and V are there with Q. Where there is a KVX there is
also one program for both: two runs cost more than one, and calibration decides whether leaving early pays.

Programs are numbered, not named: inputs, outputs and weights are x0…, y0…, w0… in the order of first use, so
that layers which compute the same have equal graphs. The names of the values are kept beside.

Everything at a boundary has the rows first: (1, T, …) of the trace becomes (rows, …), and q, k, v and the
attention's output are (rows, heads, head size).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from flows.serving.lamina.slices import cutting
from flows.serving.lamina.slices.cutting import Boundary
from flows.serving.lamina.slices.tracing import Trace

aten = torch.ops.aten


@dataclass(frozen=True)
class Value:
    """A tensor at the border of a program."""

    name: str  # unique in the bundle
    node: fx.Node
    per_head: bool = False  # q, k, v: (1, heads, T, head size) in the trace

    def shape(self) -> tuple[int | str, ...]:
        """As it crosses the border, with "rows" for the number of rows."""
        lengths = [_length(length) for length in self.node.meta["val"].shape]
        if self.per_head:
            return lengths[2], lengths[1], lengths[3]
        return tuple(lengths[self.leading_ones() :])

    def leading_ones(self) -> int:
        """Axes of length 1 before the one of the rows, left out at the border."""
        lengths = [_length(length) for length in self.node.meta["val"].shape]
        before = lengths.index("rows") if "rows" in lengths else 0
        return before if all(length == 1 for length in lengths[:before]) else 0

    @property
    def dtype(self) -> str:
        return str(self.node.meta["val"].dtype).removeprefix("torch.")


@dataclass(frozen=True, eq=False)
class Program:
    """One graph to export, or to share with another program of the same `signature`."""

    kind: str  # qx, kvx, post_qx, post; qx_kvx and post_qx_kvx for both in one
    graph: fx.Graph  # placeholders: inputs, then weights
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    weights: tuple[fx.Node, ...]  # of the trace
    signature: tuple[Any, ...]


@dataclass(frozen=True)
class Step:
    """What runs between two attentions."""

    layer: int  # whose q, k and v it makes; the number of layers for the last step
    first: Program
    kvx: Program | None = None
    fused: Program | None = None  # instead of both
    boundary: Boundary | None = None
    context: tuple[Value, ...] = ()


def build_steps(trace: Trace, boundaries: Sequence[Boundary]) -> list[Step]:
    """n attentions → n + 1 steps."""
    # Whatever is kept at two boundaries keeps its name and passes the step between them by.
    given = {node: Value(node.name, node) for node in trace.inputs()}
    steps = []
    known: dict[fx.Node, Value] = given
    for layer, (marker, boundary) in enumerate(zip(trace.markers, boundaries, strict=True)):
        q, k, v = marker.qkv
        context = tuple(known.get(node) or Value(f"context_{layer}.{n}", node)
                        for n, node in enumerate(boundary.kept))  # fmt: skip
        made = tuple(value for value in context if value.node not in known)
        kind = "post_qx" if layer else "qx"
        heads = tuple(
            Value(f"{name}_{layer}", node, True) for name, node in zip("qkv", (q, k, v), strict=True)
        )
        steps.append(_build_step(trace, layer, kind, known, heads, made, boundary, context))
        attention = Value(f"attention_{layer}", marker.node)
        known = {value.node: value for value in (attention, *context)}
    last = Value("logits", trace.logits)
    steps.append(Step(len(trace.markers), _build_program(trace, "post", known, [last])))
    return steps


def _build_step(
    trace: Trace,
    layer: int,
    kind: str,
    known: dict[fx.Node, Value],
    heads: tuple[Value, ...],
    made: tuple[Value, ...],
    boundary: Boundary,
    context: tuple[Value, ...],
) -> Step:
    q = heads[0]
    early = _ancestors([q.node], known)
    dear = {node for node in early if cutting.is_dear(node)}
    soon = [value for value in (*heads[1:], *made) if _dear_ancestors(value.node, known) <= dear]
    late = [value for value in (*heads[1:], *made) if value not in soon]
    if not late:
        first = _build_program(trace, kind, known, [q, *soon])
        return Step(layer, first, boundary=boundary, context=context)
    early |= _ancestors([value.node for value in soon], known)
    fixed = cutting.find_fixed(trace)
    outside = {
        source
        for node in _ancestors([value.node for value in late], known) - early
        for source in node.all_input_nodes
        if source in early and source not in fixed and not cutting.is_size(source) and source not in known
    }
    order = {node: index for index, node in enumerate(trace.graph.nodes)}
    handed = {value.node for value in soon}
    carry = [Value(f"carry_{layer}.{n}", node)
             for n, node in enumerate(sorted(outside - handed, key=order.__getitem__))]  # fmt: skip
    first = _build_program(trace, kind, known, [q, *soon, *carry])
    found = known | {value.node: value for value in (*soon, *carry) if not value.per_head}
    kvx = _build_program(trace, "kvx", found, late)
    fused = _build_program(trace, f"{kind}_kvx", known, [*heads, *made])
    return Step(layer, first, kvx, fused, boundary, context)


def _ancestors(nodes: Iterable[fx.Node], known: dict[fx.Node, Value]) -> set[fx.Node]:
    """The nodes, and what they are computed from, down to what is known."""
    found: set[fx.Node] = set()
    waiting = [node for node in nodes if node not in known]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        if cutting.is_size(node) and _length(node.meta["val"]) == "rows":
            continue  # read off an input again
        waiting += [source for source in node.all_input_nodes if source not in known]
    return found


def _dear_ancestors(node: fx.Node, known: dict[fx.Node, Value]) -> set[fx.Node]:
    return {found for found in _ancestors([node], known) if cutting.is_dear(found)}


# --- one program ------------------------------------------------------------------------------------------


def _build_program(trace: Trace, kind: str, known: dict[fx.Node, Value], outputs: Sequence[Value]) -> Program:
    wanted = _ancestors([value.node for value in outputs], known)
    body = [node for node in trace.graph.nodes if node in wanted]
    used = dict.fromkeys(source for node in body for source in node.all_input_nodes)  # in order of first use
    inputs = [known[node] for node in used if node in known and not _only_sizes(node, wanted)]
    if not inputs:  # nothing but sizes is read of them
        inputs = [known[node] for node in used if node in known][:1]
    weights = [node for node in used if node in trace.weights]
    place = {node: index for index, node in enumerate(body)}
    outputs = sorted(outputs, key=lambda value: -1 if value.per_head else place[value.node])  # q, k, v first

    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    borders = [graph.placeholder(f"x{index}") for index in range(len(inputs))]
    for index, weight in enumerate(weights):
        copies[weight] = graph.placeholder(f"w{index}")
        copies[weight].meta["val"] = weight.meta["val"]
    rows = _count_rows(graph, inputs, borders)
    for value, border in zip(inputs, borders, strict=True):
        for _ in range(value.leading_ones()):
            border = graph.call_function(aten.unsqueeze.default, (border, 0))
        copies[value.node] = border
    for node in body:
        if node in copies:
            continue
        if cutting.is_size(node) and _length(node.meta["val"]) == "rows":
            copies[node] = rows
            continue
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = {}
    answers = []
    for value in outputs:
        answer = copies[value.node]
        if value.per_head:
            answer = graph.call_function(aten.permute.default, (answer, [0, 2, 1, 3]))
        for _ in range(1 if value.per_head else value.leading_ones()):
            answer = graph.call_function(aten.squeeze.dim, (answer, 0))
        answers.append(answer)
    graph.output(tuple(answers))
    graph.lint()
    shapes = tuple((value.shape(), value.dtype) for value in (*inputs, *outputs))
    stored = tuple((tuple(node.meta["val"].shape), str(node.meta["val"].dtype)) for node in weights)
    return Program(
        kind, graph, tuple(inputs), tuple(outputs), tuple(weights), (kind, shapes, stored, _describe(graph))
    )


def _only_sizes(node: fx.Node, wanted: set[fx.Node]) -> bool:
    return all(cutting.is_size(user) for user in node.users if user in wanted)


def _count_rows(graph: fx.Graph, inputs: Sequence[Value], borders: Sequence[fx.Node]) -> fx.Node:
    for value, border in zip(inputs, borders, strict=True):
        if "rows" in value.shape():
            return graph.call_function(aten.sym_size.int, (border, value.shape().index("rows")))
    raise AssertionError("no input of this program has rows")


def _length(length: Any) -> int | str:
    """A traced length; "rows" for T, and other multiples of it are not met at borders."""
    if isinstance(length, int):
        return length
    expression = getattr(getattr(length, "node", None), "expr", None)
    return "rows" if expression is not None and expression.is_Symbol else str(length)


def _describe(graph: fx.Graph) -> tuple[Any, ...]:
    """What a graph computes, without names: equal for equal graphs."""
    numbers = {node: index for index, node in enumerate(graph.nodes)}

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", numbers[value])
        if isinstance(value, (list, tuple)):
            return tuple(map(plain, value))
        if isinstance(value, dict):
            return tuple((key, plain(entry)) for key, entry in value.items())
        return repr(value)

    return tuple(
        (
            node.op,
            str(node.target) if node.op == "call_function" else "",
            plain(node.args),
            plain(node.kwargs),
        )
        for node in graph.nodes
    )
