"""The next-token loss against a loop in double precision and transformers; documents of a row kept apart."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from models.language import Decoder, DecoderConfig
from models.pretext.causal_lm import CausalLM

SIZES = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors are tiny: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(separate: bool = True, **changes: object) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(Decoder(DecoderConfig(**{**SIZES, **changes})), separate).eval()  # type: ignore[arg-type]
    for parameter in model.parameters():  # large enough that every token matters
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    """A row of documents 7, 3 and 9 and padding, and one of a single document."""
    tokens = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(1))
    documents = torch.full((2, 24), -1)
    documents[0, :9], documents[0, 9:10], documents[0, 10:19] = 7, 3, 9
    documents[1] = 4
    return tokens, documents


def test_loss_is_that_of_a_loop_over_documents_in_double_precision() -> None:
    model, (tokens, documents) = make(), packed()
    with torch.no_grad():
        found = model(tokens, documents)
        model.double()
        for row in range(2):
            for place in range(23):
                here, there = documents[row, place], documents[row, place + 1]
                if here != there or here < 0:
                    assert found.nats[row, place] == 0
                    assert not found.predicted[row, place]
                    continue
                begin = int((documents[row] == here).nonzero()[0])
                logits = model.decoder(tokens[None, row, begin : place + 1])[0][0, -1]
                total = sum(math.exp(float(value)) for value in logits)
                nats = math.log(total) - float(logits[tokens[row, place + 1]])
                assert float(found.nats[row, place]) == pytest.approx(nats, abs=1e-4), (row, place)
                assert bool(found.correct[row, place]) == (int(logits.argmax()) == tokens[row, place + 1])
    assert int(found.predicted.sum()) == 8 + 8 + 23


def test_loss_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    model, (tokens, documents) = make(), packed()
    config = transformers.AutoConfig.for_model(**model.decoder.config.to_dict())
    peer = transformers.AutoModelForCausalLM.from_config(config).eval()
    peer.load_state_dict(model.decoder.state_dict())
    with torch.no_grad():
        found = model(tokens, documents)
        expected = peer(tokens[1:], labels=tokens[1:]).loss
        first = peer(tokens[:1, :9], labels=tokens[:1, :9]).loss
    torch.testing.assert_close(found.nats[1].mean(), expected)
    torch.testing.assert_close(found.nats[0, :8].mean(), first)


def test_without_separation_documents_see_one_another() -> None:
    tokens, documents = packed()
    changed = tokens.clone()
    changed[0, :9] += 1
    changed %= 61
    with torch.no_grad():
        for separate in (True, False):
            model = make(separate)
            before, after = model(tokens, documents), model(changed, documents)
            assert torch.equal(before.nats[0, 10:18], after.nats[0, 10:18]) == separate
            assert torch.equal(before.predicted, after.predicted)


@pytest.mark.parametrize(
    "change", [{"rope": False}, {"num_key_value_heads": 6}, {"tie_word_embeddings": True}]
)
def test_switches_change_the_network_and_transformers_knows_what_remains(change: dict[str, object]) -> None:
    transformers = pytest.importorskip("transformers")
    model = make(**change)
    config = model.decoder.config
    assert DecoderConfig.from_dict(config.to_dict()) == config
    loaded = transformers.AutoConfig.for_model(**config.to_dict())
    peer = transformers.AutoModelForCausalLM.from_config(loaded, attn_implementation="eager").eval()
    peer.load_state_dict(model.decoder.state_dict())
    tokens, _ = packed()
    with torch.no_grad():
        found, _ = model.decoder(tokens)
        torch.testing.assert_close(found, peer(tokens).logits, rtol=0, atol=2e-5)
        shuffled = tokens[:, [1, 0, *range(2, 24)]]
        moved = (model.decoder(shuffled)[0][:, 2:] - found[:, 2:]).abs().max()
    assert moved > 1e-3  # order is known, also to the causal mask alone


def test_recomputed_layers_give_the_same_gradients() -> None:
    tokens, documents = packed()
    gradients = []
    for layers in (0, 1, 2):
        model = make().train()
        model.decoder.recomputed_layers = layers
        model(tokens, documents).nats.sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))  # type: ignore[arg-type]
