"""The decoder against transformers on shared random weights, and its cache against itself."""

from __future__ import annotations

import pytest
import torch

from models.language import Decoder, DecoderConfig

SIZES = {
    "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_greedy_text_are_those_of_transformers(tied: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    ours = DecoderConfig(**SIZES, rope_theta=500.0, tie_word_embeddings=tied)
    torch.manual_seed(0)
    peer = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**ours.to_dict(), initializer_range=0.3), attn_implementation="eager"
    ).eval()
    decoder = Decoder(ours).eval()
    decoder.load_state_dict(peer.state_dict())  # the same names and shapes, none missing
    ids = torch.randint(0, 97, (2, 11))

    with torch.no_grad():
        logits, _ = decoder(ids)
        expected = peer(ids).logits
        text = peer.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0)

    assert expected.abs().max() > 1  # the comparison is of something
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert decoder.generate(ids, 20).tolist() == text.tolist()
    assert (decoder.lm_head.weight is decoder.model.embed_tokens.weight) == tied


def test_cache_in_pieces_of_any_size_gives_the_logits_of_the_whole_text() -> None:
    torch.manual_seed(1)
    decoder = Decoder(DecoderConfig(**SIZES)).eval()
    ids = torch.randint(0, 97, (1, 12))
    with torch.no_grad():
        whole, _ = decoder(ids)
        past, pieces = None, []
        for piece in ids.split([1, 5, 2, 4], 1):
            logits, past = decoder(piece, past)
            pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-6)


def test_generation_stops_at_the_end_token_and_at_the_last_position() -> None:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**SIZES)).eval()
    ids = torch.tensor([[5, 6]])
    said = decoder.generate(ids, 4)[0, 2:].tolist()
    assert decoder.generate(ids, 4, end=said[0]).shape == (1, 3)
    with pytest.raises(ValueError, match="2 tokens and 63 more"):
        decoder.generate(ids, 63)


def test_config_survives_config_json_and_refuses_what_the_decoder_lacks() -> None:
    config = DecoderConfig(**SIZES, rope_theta=500.0)
    assert DecoderConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="attention_bias"):
        DecoderConfig.from_dict({**config.to_dict(), "attention_bias": True})
    with pytest.raises(ValueError, match="llama3"):
        DecoderConfig.from_dict({**config.to_dict(), "rope_parameters": {"rope_type": "llama3"}})
    with pytest.raises(ValueError, match="do not share"):
        DecoderConfig(**{**SIZES, "num_key_value_heads": 4})
