"""Attention workers for tests: threads of this process behind real sockets, and the sums to match."""

import socket
import threading
from contextlib import contextmanager

import numpy as np
import torch

from flows.serving.lamina.attention.pool import AttentionPool, ModelShape
from flows.serving.lamina.attention.session import LayerSettings, Session
from flows.serving.lamina.attention.worker import Server
from flows.serving.lamina.rows import PAGE_TOKENS, RowKind, RowTable, Span, TableDelta

TOKEN = b"a token for tests, 32 bytes long"
BLOCK = 32
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 8
LAYERS = (
    LayerSettings(scale=HEAD_DIM**-0.5),
    LayerSettings(scale=0.5, window=21, soft_cap=3.0),
)
MODEL = ModelShape(LAYERS, HEADS, KV_HEADS, HEAD_DIM)


@contextmanager
def serving(count, threads=1, kernel="fused"):
    """Servers of `count` workers and their addresses; ended at the end."""
    torch.set_num_threads(1)
    servers, running, addresses = [], [], []
    for _ in range(count):
        listener = socket.create_server(("127.0.0.1", 0))
        addresses.append(("127.0.0.1", listener.getsockname()[1]))
        server = Server(listener, TOKEN, Session(1 << 24, threads, kernel=kernel), drain_timeout_s=0.1)
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        servers.append(server)
        running.append(thread)
    try:
        yield servers, addresses
    finally:
        for server in servers:
            server.stopping.set()
        for thread in running:
            thread.join(20)


def connect(addresses, partition, **options):
    options = {"pages": 64, "block_tokens": BLOCK, "debug": True, "layer_timeout_s": 60.0} | options
    return AttentionPool(addresses, TOKEN, partition, MODEL, **options)


class Requests:
    """Random queries, keys and values of some requests, by layer and position."""

    def __init__(self, lengths, seed=0):
        generator = np.random.default_rng(seed)
        self.lengths = lengths
        shapes = (HEADS, KV_HEADS, KV_HEADS)
        self.tensors = {
            slot: [
                [generator.standard_normal((length, heads, HEAD_DIM), dtype=np.float32) for heads in shapes]
                for _ in LAYERS
            ]
            for slot, length in lengths.items()
        }

    def rows(self, table, layer):
        """q, k and v of a row table."""
        parts = [
            [tensor[span.position : span.end] for tensor in self.tensors[span.slot][layer]]
            for span in table.spans
        ]
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    def expected(self, slot, layer):
        """float64 attention of the whole request, (length, H, hd)."""
        q, k, v = (tensor.astype(np.float64) for tensor in self.tensors[slot][layer])
        rule = LAYERS[layer]
        k, v = (np.repeat(tensor, HEADS // KV_HEADS, 1) for tensor in (k, v))
        scores = np.einsum("rhd,thd->hrt", q, k) * rule.scale
        if rule.soft_cap:
            scores = rule.soft_cap * np.tanh(scores / rule.soft_cap)
        at = np.arange(len(q))
        hidden = at[None] > at[:, None]
        if rule.window:
            hidden |= at[None] <= at[:, None] - rule.window
        scores[:, hidden] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("hrt,thd->rhd", weights / weights.sum(-1, keepdims=True), v)


def run(pool, requests, plans, tables):
    """Outputs by slot and layer, (length, H, hd), of iterations: lists of (slot, position, length)."""
    out = {
        slot: [np.full((length, HEADS, HEAD_DIM), np.nan, np.float32) for _ in LAYERS]
        for slot, length in requests.lengths.items()
    }
    known = dict.fromkeys(requests.lengths, 0)
    for iteration, plan in enumerate(plans, 1):
        spans, deltas = [], []
        for slot, position, length in plan:
            spans.append(Span(slot, position, length, RowKind.CHUNK if length > 1 else RowKind.DECODE))
            needed = -(-(position + length) // PAGE_TOKENS)
            if needed > known[slot]:
                deltas.append(TableDelta(slot, known[slot], tuple(tables[slot][known[slot] : needed])))
                known[slot] = needed
        table = RowTable(tuple(spans), tuple(deltas))
        pool.plan(table, iteration)
        for layer in range(len(LAYERS)):
            q, k, v = requests.rows(table, layer)
            pool.send_q(layer, q, iteration)
            answer = pool.kv(layer, k, v, iteration)
            for index, (slot, position, length) in enumerate(plan):
                rows = slice(table.starts[index], table.starts[index + 1])
                out[slot][layer][position : position + length] = answer[rows]
    pool.free(list(tables))
    return out
