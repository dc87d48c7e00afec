"""llama2.c files → Hugging Face folders: the same logits, the same tokens, and one error for a bad file."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_llama2c
import torch
from torch import Tensor
from typer.testing import CliRunner

from flows.cli import app
from flows.errors import ConfigError, DataError
from flows.language import import_llama2c
from models.language import Decoder, DecoderConfig
from models.language.llama2c import read_checkpoint

TINY_LLM = Path(__file__).resolve().parents[3] / "shared" / "data" / "tiny_llm"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny_llama2c.one_thread():
        yield


def run_llama2c(content: bytes, ids: list[int]) -> Tensor:
    """Logits by the definition of llama2.c, one loop at a time, neighbouring pairs turned."""
    dim, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack_from("<7i", content)
    numbers = torch.frombuffer(bytearray(content[28:]), dtype=torch.float32)
    head, at = dim // heads, 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        at += torch.Size(shape).numel()
        return numbers[at - torch.Size(shape).numel() : at].view(shape)

    kv = kv_heads * head
    embedding, norm1, wq, wk, wv, wo, norm2, w1, w2, w3, last = (
        take(abs(vocabulary), dim), take(layers, dim), take(layers, dim, dim), take(layers, kv, dim),
        take(layers, kv, dim), take(layers, dim, dim), take(layers, dim), take(layers, hidden, dim),
        take(layers, dim, hidden), take(layers, hidden, dim), take(dim),
    )  # fmt: skip
    take(length, head)  # the tables of RoPE
    output = embedding if vocabulary > 0 else take(-vocabulary, dim)

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.pow(2).mean() + 1e-5).sqrt()

    def turn(x: Tensor, position: int) -> Tensor:
        x = x.clone()
        for start in range(0, len(x), 2):
            angle = torch.tensor(position * 10000.0 ** -((start % head) / head))
            a, b = x[start].clone(), x[start + 1].clone()
            x[start], x[start + 1] = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
        return x

    keys: list[list[Tensor]] = [[] for _ in range(layers)]
    values: list[list[Tensor]] = [[] for _ in range(layers)]
    answers = []
    for position, token in enumerate(ids):
        x = embedding[token]
        for layer in range(layers):
            h = rms(x, norm1[layer])
            q = turn(wq[layer] @ h, position)
            keys[layer].append(turn(wk[layer] @ h, position))
            values[layer].append(wv[layer] @ h)
            mixed = []
            for number in range(heads):
                part = slice((number * kv_heads // heads) * head, (number * kv_heads // heads + 1) * head)
                scores = torch.stack([k[part] @ q[number * head : (number + 1) * head] for k in keys[layer]])
                weights = (scores / head**0.5).softmax(0)
                mixed.append(sum(w * v[part] for w, v in zip(weights, values[layer], strict=True)))
            x = x + wo[layer] @ torch.cat(mixed)
            h = rms(x, norm2[layer])
            x = x + w2[layer] @ (torch.nn.functional.silu(w1[layer] @ h) * (w3[layer] @ h))
        answers.append(output @ rms(x, last))
    return torch.stack(answers)


@pytest.mark.parametrize("tied", [True, False])
def test_imported_weights_compute_what_llama2c_computes(tied: bool) -> None:
    content = tiny_llama2c.checkpoint(tied)
    config, weights = read_checkpoint(content)
    decoder = Decoder(config).eval()
    assert decoder.load_state_dict(weights, strict=False).missing_keys == (["lm_head.weight"] if tied else [])
    ids = [1, 270, 9, 281, 44, 270]
    with torch.no_grad():
        found = decoder(torch.tensor([ids]))[0][0]
    torch.testing.assert_close(found, run_llama2c(content, ids), rtol=1e-4, atol=1e-4)


def test_folder_is_read_by_transformers_with_the_same_logits_and_tokens(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokens = tiny_llama2c.write(tmp_path, tied=False)
    lines = import_llama2c(model, tokens, tmp_path / "hf")
    assert "3 layers of 16" in lines[0]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("the there  then", " a thé", "", "in\nthe Ω ☃", "ereinonthereing", "x" * 40):
        expected = tiny_llama2c.encode(text)
        assert tokenizer(text).input_ids == expected, text
        assert tokenizer.decode(expected, skip_special_tokens=True) == text
    config, weights = read_checkpoint(model.read_bytes())
    decoder = Decoder(config).eval()
    decoder.load_state_dict(weights)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.tensor([[1, 270, 9, 281]])
    with torch.no_grad():
        torch.testing.assert_close(peer(ids).logits, decoder(ids)[0], rtol=1e-4, atol=1e-4)
    assert DecoderConfig.from_dict(peer.config.to_dict()).rope_theta == 10_000


def test_real_model_tells_the_reference_story(tmp_path: Path) -> None:
    if not TINY_LLM.is_dir():
        pytest.skip(f"{TINY_LLM} is not here")
    from transformers import AutoTokenizer

    import_llama2c(TINY_LLM / "stories260K.bin", TINY_LLM / "tok512.bin", tmp_path / "hf")
    config, weights = read_checkpoint((TINY_LLM / "stories260K.bin").read_bytes())
    decoder = Decoder(config).eval()
    decoder.load_state_dict(weights, strict=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = tokenizer("Zoo").input_ids
    # llama2.c takes 60 steps in all, the first from the begin token
    text = decoder.generate(torch.tensor([prompt]), 61 - len(prompt))[0]
    expected = (TINY_LLM / "reference_output.txt").read_text().rstrip("\n")
    assert tokenizer.decode(text, skip_special_tokens=True) == expected


def _changed(content: bytes, number: int, value: int) -> bytes:
    return content[: 4 * number] + struct.pack("<i", value) + content[4 * number + 4 :]


MODEL = tiny_llama2c.checkpoint()
TOKENS = tiny_llama2c.tokens()
BAD = {
    "empty": (b"", None, "0 bytes"),
    "truncated": (MODEL[:-10], None, "is truncated"),
    "too long": (MODEL + b"0" * 8, None, "is too long"),
    "pickle": (b"PK\3\4" + MODEL, None, "dim is"),
    "no layers": (_changed(MODEL, 2, 0), None, "n_layers is 0"),
    "absurd": (_changed(MODEL, 0, 2**31 - 1), None, "dim is 2147483647"),
    "negative": (_changed(MODEL, 4, -2), None, "n_kv_heads is -2"),
    "uneven heads": (_changed(MODEL, 3, 3), None, "impossible header"),
    "not finite": (MODEL[:40] + struct.pack("<f", float("nan")) + MODEL[44:], None, "not finite"),
    "tokenizer empty": (MODEL, b"", "has no header"),
    "tokenizer short": (MODEL, tiny_llama2c.tokenizer(TOKENS[:-1]), "299 tokens, the model 300"),
    "tokenizer long": (MODEL, tiny_llama2c.tokenizer([*TOKENS, (0.0, b"zz")]), "more than the model's 300"),
    "tokenizer cut": (MODEL, tiny_llama2c.tokenizer()[:-3], "truncated"),
    "tokenizer other": (MODEL, tiny_llama2c.tokenizer([(0.0, b"x%d" % n) for n in range(300)]), "token 3"),
    "tokenizer twice": (MODEL, tiny_llama2c.tokenizer([*TOKENS[:-1], TOKENS[260]]), "twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_one_error_and_writes_nothing(case: str, tmp_path: Path) -> None:
    model, tokens = tiny_llama2c.write(tmp_path)
    content, vocabulary, words = BAD[case]
    model.write_bytes(content)
    tokens.write_bytes(tiny_llama2c.tokenizer() if vocabulary is None else vocabulary)
    with pytest.raises(DataError, match=words) as raised:
        import_llama2c(model, tokens, tmp_path / "hf")
    assert str(model if vocabulary is None else tokens) in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "tokens.bin"]


def test_existing_folder_is_replaced_only_when_asked_and_only_if_it_is_a_model(tmp_path: Path) -> None:
    model, tokens = tiny_llama2c.write(tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "thesis.txt").write_text("years of work")
    for force, words in ((False, "--force"), (True, "something else")):
        with pytest.raises(ConfigError, match=words):
            import_llama2c(model, tokens, tmp_path / "hf", force=force)
    assert (tmp_path / "hf" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(DataError, match="does not exist"):
        import_llama2c(tmp_path / "none.bin", tokens, tmp_path / "new")


def test_commands(tmp_path: Path) -> None:
    model, tokens = tiny_llama2c.write(tmp_path)
    done = CliRunner().invoke(app, ["import", "llama2c", str(model), str(tokens), str(tmp_path / "hf")])
    assert done.exit_code == 0
    assert "3 layers of 16, 4 query and 2 kv heads" in done.stdout
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    done = CliRunner().invoke(app, ["export", "language", str(tmp_path / "none"), str(tmp_path / "out")])
    assert isinstance(done.exception, DataError)
    assert "config.json does not exist" in str(done.exception)
