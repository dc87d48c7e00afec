"""A decoder → one flat graph of aten operators with a marker for each attention.

Nothing of the model is edited: attention goes through the marker (marker.py), and torch.export records the
rest for one sequence of T tokens, T free, without a cache. What the graph holds besides the computation
(assertions on dtypes, casts to the dtype a value already has) is removed, since it would become operators at
every boundary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from flows import exporting
from flows.errors import DataError

EXAMPLE_ROWS = 6  # any number but 0 and 1, which the tracer takes for constants
MAX_ROWS = 1 << 20
INPUTS = ("input_ids", "position_ids")
MARKER = "trunkline::attention"
ASSERTIONS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "_assert_async")


@dataclass(frozen=True)
class Marker:
    """One attention of the graph, with what its worker has to know."""

    node: fx.Node
    layer: int
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    window: int
    soft_cap: float

    @property
    def qkv(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        q, k, v = self.node.args[:3]
        assert isinstance(q, fx.Node)
        assert isinstance(k, fx.Node)
        assert isinstance(v, fx.Node)
        return q, k, v


@dataclass(frozen=True)
class Trace:
    """The whole decoder; every tensor is (1, T, …) or free of T."""

    graph: fx.Graph
    weights: dict[fx.Node, Tensor]  # placeholders of parameters, buffers and constants
    names: dict[fx.Node, str]  # what the model calls them
    markers: tuple[Marker, ...]
    logits: fx.Node

    def inputs(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder" and node not in self.weights]


class _Decoder(nn.Module):
    """The two inputs that a row of tokens has, one output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        return logits


def trace(model: nn.Module, layers: int) -> Trace:
    """Record a model whose attention implementation is `marker.ATTENTION`.

    Raises:
        DataError: it cannot be traced with a free number of tokens, or not every one of its `layers` has one
            attention that goes through transformers' interface.
    """
    example = (torch.zeros(1, EXAMPLE_ROWS, dtype=torch.int64), torch.arange(EXAMPLE_ROWS)[None])
    rows = torch.export.Dim("rows", min=1, max=MAX_ROWS)
    try:
        # Without gradients from the outside, the ones that rotary embeddings switch off leave no region.
        with torch.no_grad(), exporting.quiet_exporter():
            program = torch.export.export(
                _Decoder(model),
                example,
                dynamic_shapes={name: {1: rows} for name in INPUTS},
                strict=False,
            )
            if _has_regions(program):
                program = program.run_decompositions({})  # flattens regions, decomposes nothing
    except DataError:
        raise
    except Exception as error:  # the exporter's exception types share no base class
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{type(model).__name__} cannot be traced for a free number of tokens: {reason}"
        ) from error
    return _flatten(program, type(model).__name__, layers)


def _has_regions(program: ExportedProgram) -> bool:
    return any(
        isinstance(node.target, torch._ops.HigherOrderOperator)
        for node in program.graph.nodes
        if node.op == "call_function"
    )


def _flatten(program: ExportedProgram, name: str, layers: int) -> Trace:
    graph = program.graph
    for node in reversed(graph.nodes):
        if node.op == "call_function" and any(word in str(node.target) for word in ASSERTIONS):
            graph.erase_node(node)
    for node in list(graph.nodes):
        if (source := _unchanged(node)) is not None:
            node.replace_all_uses_with(source)
    graph.eliminate_dead_code()

    signature = program.graph_signature
    lifted: dict[str, str] = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    weights: dict[fx.Node, Tensor] = {}
    names: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            raise DataError(f"{name} keeps {node.target} where the exporter cannot reach it")
        if node.op == "placeholder" and node.name in lifted:
            key = lifted[node.name]
            value = program.state_dict[key] if key in program.state_dict else program.constants[key]
            assert isinstance(value, Tensor)
            weights[node] = value.detach()
            names[node] = key.removeprefix("model.")
    markers = tuple(_read_marker(node) for node in graph.nodes if is_marker(node))
    found = [marker.layer for marker in markers]
    if found != list(range(layers)):
        raise DataError(
            f"{name} has {layers} layers, but attention that goes through transformers' interface only in "
            f"{found or 'none'}; Lamina needs exactly one per layer, in order"
        )
    (output,) = (node for node in graph.nodes if node.op == "output")
    return Trace(graph, weights, names, markers, output.args[0][0])


def is_marker(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "name", str)().split(".")[0] == MARKER


def _unchanged(node: fx.Node) -> fx.Node | None:
    """The argument of a cast to the dtype it has already, or of a dropout that is switched off."""
    if node.op == "call_function" and str(node.target) == "aten.dropout.default" and node.args[2] is False:
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    if node.op != "call_function" or not str(node.target).startswith(("aten.to.", "aten._to_copy.")):
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.meta["val"].dtype != node.meta["val"].dtype:
        return None
    return source


def _read_marker(node: fx.Node) -> Marker:
    q, k = (value.meta["val"].shape for value in node.args[:2])  # type: ignore[union-attr]
    layer, scale, window, soft_cap = (_number(value) for value in node.args[3:])
    return Marker(node, int(layer), int(q[1]), int(k[1]), int(q[3]), scale, int(window), soft_cap)


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)):
        raise DataError(f"an attention property is computed while the model runs ({value}); it must be fixed")
    return value
