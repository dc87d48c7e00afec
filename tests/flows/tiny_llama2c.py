"""A llama2.c model of random weights and a tokenizer with merges, as files; and the encoder of llama2.c."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SIZES = (16, 24, 3, 4, 2, 300, 96)  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len
WORDS = [" t", "he", " a", " the", "er", "in", "on", " s", "re", "ing", " there", "é", "th", " th", "the"]


def checkpoint(tied: bool = True, sizes: tuple[int, ...] = SIZES) -> bytes:
    dim, hidden, layers, heads, kv_heads, vocabulary, length = sizes
    head = dim // heads
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (vocabulary, dim), (layers, dim), (layers, dim, dim), (layers, kv_heads * head, dim),
        (layers, kv_heads * head, dim), (layers, dim, dim), (layers, dim), (layers, hidden, dim),
        (layers, dim, hidden), (layers, hidden, dim), (dim,), (length, head // 2), (length, head // 2),
    ]  # fmt: skip
    shapes += [] if tied else [(vocabulary, dim)]
    numbers = b"".join(
        (torch.randn(math.prod(shape), generator=generator) / 2).numpy().tobytes() for shape in shapes
    )
    return (
        struct.pack("<7i", dim, hidden, layers, heads, kv_heads, vocabulary if tied else -vocabulary, length)
        + numbers
    )


def tokens() -> list[tuple[float, bytes]]:
    marks = [(0.0, b"<unk>"), (0.0, b"\n<s>\n"), (0.0, b"\n</s>\n")]
    single = [(0.0, f"<0x{byte:02X}>".encode()) for byte in range(256)]
    found = [*marks, *single, *((-float(n), word.encode()) for n, word in enumerate(WORDS))]
    letters = " abcdefghijklmnopqrstuvwxyz"
    found += [
        (-float(len(found) - 259 + n), letter.encode())
        for n, letter in enumerate(letters[: 300 - len(found)])
    ]
    while len(found) < 300:
        found.append((-float(len(found) - 259), f"[{len(found)}]".encode()))
    return found


def tokenizer(entries: list[tuple[float, bytes]] | None = None) -> bytes:
    entries = tokens() if entries is None else entries
    longest = max(len(token) for _, token in entries)
    return struct.pack("<i", longest) + b"".join(
        struct.pack("<fi", score, len(token)) + token for score, token in entries
    )


def encode(text: str) -> list[int]:
    """As llama2.c does: characters, then the best neighbouring pair again and again."""
    entries = tokens()
    ids = {token.decode(): number for number, (_, token) in enumerate(entries)}
    found = [ids[" "]] if text else []
    for letter in text:
        found += [ids[letter]] if letter in ids else [byte + 3 for byte in letter.encode()]
    while True:
        best: tuple[float, int, int] | None = None
        for at in range(len(found) - 1):
            merged = ids.get(entries[found[at]][1].decode() + entries[found[at + 1]][1].decode())
            if merged is not None and (best is None or entries[merged][0] > best[0]):
                best = entries[merged][0], at, merged
        if best is None:
            return [1, *found]
        found[best[1] : best[1] + 2] = [best[2]]


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors this small are computed faster by one thread than handed to several, the more so on a machine
    that runs other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write(folder: Path, tied: bool = True) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.bin").write_bytes(checkpoint(tied))
    (folder / "tokens.bin").write_bytes(tokenizer())
    return folder / "model.bin", folder / "tokens.bin"
