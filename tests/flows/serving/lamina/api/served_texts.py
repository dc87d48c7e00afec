"""Tokenizers small enough to write down, a manifest without a model, and a server on a free port."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from flows import params
from flows.params.language import Lamina
from flows.serving.lamina.api.gateway import ApiKey
from flows.serving.lamina.api.hooks import Hooks
from flows.serving.lamina.api.server import Server, uvicorn_config
from flows.serving.lamina.api.service import Service
from flows.serving.lamina.api.texts import Texts
from flows.serving.lamina.slices.bundle import Manifest
from flows.serving.listening import listening_socket, server_url


def new_client() -> httpx.Client:
    """Reading the certificates that http needs none of takes most of the time of making one."""
    return httpx.Client(timeout=20, verify=False)


http = new_client()
END = 256  # the token that ends a text, in the byte-level tokenizer
MERGED = ["he", "ll", "hell", "hello", " w", "or", "ld", " wor", " world", "Ã©"]
CONTEXT = 512
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_level() -> Tokenizer:
    """256 bytes, the end, and a few merges: as GPT-2's, but one byte is one token where nothing merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    vocabulary["<end>"] = END
    merges = []
    for word in MERGED:
        piece = word.replace(" ", "Ġ")
        cut = next(at for at in range(1, len(piece)) if piece[:at] in vocabulary and piece[at:] in vocabulary)
        merges.append((piece[:cut], piece[cut:]))
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return tokenizer


def write_byte_level(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    byte_level().save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"eos_token": "<end>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_byte_fallback(folder: Path) -> Path:
    """As `trunkline import llama2c` writes it."""
    import tiny_llama2c  # imports torch, which most tests here can do without

    from flows.language import describe_tokenizer
    from models.language.llama2c import read_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = read_tokenizer(tiny_llama2c.tokenizer(), 300)
    (folder / "tokenizer.json").write_text(json.dumps(describe_tokenizer(vocabulary)))
    return folder


def manifest(vocab_size: int = 300) -> Manifest:
    parity = {
        "samples": 1, "tokens": 1, "longest_context": 1, "max_abs_error": 0.0, "max_relative_error": 0.0,
        "argmax_agreement": 1.0, "tolerance": 1e-4, "covers_windows": True,
    }  # fmt: skip
    return Manifest.model_validate(
        {
            "format": 1, "kind": "lamina", "name": "tiny", "architecture": "none", "source_sha256": "ab" * 32,
            "dtype": "float32", "opset": 18, "vocab_size": vocab_size, "hidden_size": 1, "layers": 1,
            "heads": 1, "kv_heads": 1, "head_size": 1, "max_context": CONTEXT,
            "position_scheme": "rope:default",
            "bos_token_id": None, "eos_token_ids": [END], "attention": [], "steps": [], "tensors": [],
            "graphs": [], "weights": [], "tokenizer": [], "parity": parity, "exporter": {},
        }
    )  # fmt: skip


def settings(**http: Any) -> Lamina:
    lamina = params.load(Path(__file__).parents[5] / "params.yaml").lamina
    return with_settings(lamina, {"http": {"port": 0, **http}, "cluster": {"heartbeat_ms": 20}})


def with_settings(lamina: Lamina, changes: Mapping[str, Mapping[str, Any]]) -> Lamina:
    values = lamina.model_dump()
    for section, entries in changes.items():
        values[section].update(entries)
    return Lamina.model_validate(values)


@dataclass
class Running:
    url: str
    server: Server
    service: Service
    thread: threading.Thread

    @property
    def texts(self) -> Texts:
        return self.service.texts

    def ids(self, text: str) -> list[int]:
        return self.texts.encode_prompt(text)


@contextmanager
def running_server(
    folder: Path,
    socket_path: Path,
    lamina: Lamina | None = None,
    *,
    hooks: Hooks | None = None,
    key: str | None = None,
    send_buffer: int | None = None,
) -> Iterator[Running]:
    """A server in a thread, ended at the end."""
    import socket

    lamina = lamina or settings()
    service = Service(manifest(), Texts(folder, [END]), lamina, socket_path, hooks=hooks)
    with listening_socket("127.0.0.1", 0, "lamina.http") as listener:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        server = Server(service, uvicorn_config(service, ApiKey(key) if key else None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield Running(server_url(listener), server, service, thread)
        finally:
            server.drain()
            server.drain()
            thread.join(20)
            assert not thread.is_alive()


def wait_until(condition: Any, limit_s: float = 10.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "did not come true"
        time.sleep(0.005)
