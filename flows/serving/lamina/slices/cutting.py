"""Where to cut: the values that have to be kept while attention runs elsewhere (arXiv 2405.01814, section 4).

Slice j+1 needs the attention's output and a few values of slice j. Carrying whatever is alive there would
carry cosines and sines through every layer; a minimum cut that may compute cheap operators again finds less,
usually the residual and the positions.

The network of one boundary: an edge per use of a value, a capacity per value (its bytes), a source behind
inputs and operators too dear to repeat, a sink behind what the next slice produces. Values that depend on the
attention's output cannot be kept; weights are free, each slice has its own; sizes cost nothing, they are read
off a slice's input again. Boundaries are cut from the last to the first, because what boundary j+1 keeps is
among the things that slice j+1 has to produce: cut one by one they could ask for what an earlier one dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor, fx

from flows.serving.lamina.slices.tracing import Trace, is_marker

NOMINAL_ROWS = 64
"""Bytes are compared at this many rows; a value that does not grow with the rows is then cheap, as it is."""
DEAR = (
    "aten.linear", "aten.mm.", "aten.matmul", "aten.bmm", "aten.addmm", "aten.baddbmm", "aten.einsum",
    "aten.embedding", "aten.conv", "aten.scaled_dot_product_attention",
)  # fmt: skip

VIEWS = ("aten.unsqueeze", "aten.squeeze", "aten.view", "aten.reshape", "aten.transpose", "aten.permute")
"""Of the same size as what they show."""


@dataclass(frozen=True)
class Boundary:
    """What is kept while one attention runs, and what would be without computing anything again."""

    kept: tuple[fx.Node, ...]  # in graph order
    bytes: int  # at NOMINAL_ROWS
    naive_bytes: int


def cut(trace: Trace) -> list[Boundary]:
    """One boundary per marker, first to last."""
    order = {node: index for index, node in enumerate(trace.graph.nodes)}
    fixed = find_fixed(trace)
    boundaries: list[Boundary] = []
    needed: list[fx.Node] = [trace.logits]
    for marker in reversed(trace.markers):
        later = descendants(marker.node)
        kept = sorted(_min_cut(needed, marker.node, later, fixed), key=order.__getitem__)
        naive = _alive(marker.node, later, fixed)
        boundaries.append(Boundary(tuple(kept), sum(map(size, kept)), sum(map(size, naive))))
        needed = [*marker.qkv, *kept]
    return boundaries[::-1]


def is_dear(node: fx.Node) -> bool:
    """Whether computing it again costs more than keeping it."""
    return node.op == "call_function" and (str(node.target).startswith(DEAR) or is_marker(node))


def is_size(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), Tensor)


def find_fixed(trace: Trace) -> set[fx.Node]:
    """Weights, and what is computed from weights and sizes alone: every slice has them for free."""
    fixed: set[fx.Node] = set(trace.weights)
    for node in trace.graph.nodes:
        if node.op == "call_function" and all(
            source in fixed or is_size(source) for source in node.all_input_nodes
        ):
            fixed.add(node)
    return fixed


def descendants(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = {node}
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if user not in found:
                found.add(user)
                waiting.append(user)
    return found


def size(node: fx.Node) -> int:
    """Bytes of a value at NOMINAL_ROWS."""
    value = node.meta["val"]
    total = int(value.element_size())
    for length in value.shape:
        total *= rows_of(length)
    return total


def rows_of(length: int | torch.SymInt, rows: int = NOMINAL_ROWS) -> int:
    """A length of a traced shape for a number of rows."""
    if isinstance(length, int):
        return length
    expression = length.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, rows)))


def _alive(marker: fx.Node, later: set[fx.Node], fixed: set[fx.Node]) -> set[fx.Node]:
    """Values used after the marker that do not depend on it: what plain liveness would keep. Several views of
    one value are that value once."""
    return {
        _behind_views(source)
        for node in later - {marker}
        for source in node.all_input_nodes
        if source not in later and source not in fixed and not is_size(source)
    }


def _behind_views(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and str(node.target).startswith(VIEWS):
        node = node.all_input_nodes[0]
    return node


def _min_cut(
    needed: Iterable[fx.Node], marker: fx.Node, later: set[fx.Node], fixed: set[fx.Node]
) -> set[fx.Node]:
    network = nx.DiGraph()
    network.add_nodes_from(("source", "sink"))
    seen: set[fx.Node] = set()
    waiting = list(needed)
    for node in waiting:
        if node not in later:
            network.add_edge((node, "out"), "sink")  # an edge without capacity is never cut
    while waiting:
        node = waiting.pop()
        if node in seen or node is marker or node in fixed or is_size(node):
            continue
        seen.add(node)
        if node in later:
            for source in node.all_input_nodes:
                if source not in later:
                    network.add_edge((source, "out"), "sink")
                waiting.append(source)
            continue
        network.add_edge((node, "in"), (node, "out"), capacity=size(node))
        if node.op == "placeholder" or is_dear(node):
            network.add_edge("source", (node, "in"))
            continue
        for source in node.all_input_nodes:
            network.add_edge((source, "out"), (node, "in"))
            waiting.append(source)
    _, (reachable, _) = nx.minimum_cut(network, "source", "sink")
    return {node for node in seen if (node, "in") in reachable and (node, "out") not in reachable}
