"""Next-token prediction: what `language_pretrain` trains the decoder of params.yaml to do.

The loss of a step is the sum over all tokens that it predicts, divided by their number, however the rows are
divided among processes and micro-steps. The validation loss is the same mean over the validation split,
every document by itself.
"""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import torch

from flows.decoders import Judged, judge
from flows.errors import ConfigError
from flows.params import Decoder as DecoderSection
from flows.params import Params
from flows.pretexts.interface import Pretext
from flows.text.batches import TokenBatch
from flows.text.corpus import TokenSplit
from flows.training import Processes
from models.language import Decoder, DecoderConfig
from models.pretext.causal_lm import CausalLM


def decoder_config(section: DecoderSection, vocab_size: int) -> DecoderConfig:
    """
    Raises:
        ConfigError: sizes that do not fit one another.
    """
    try:
        return DecoderConfig(
            vocab_size=vocab_size,
            hidden_size=section.hidden_size,
            intermediate_size=section.intermediate_size,
            num_hidden_layers=section.layers,
            num_attention_heads=section.heads,
            num_key_value_heads=section.kv_heads,
            head_dim=section.head_size,
            max_position_embeddings=section.max_context,
            rope=section.rope,
            rope_theta=section.rope_theta,
            tie_word_embeddings=section.tie_embeddings,
        )
    except ValueError as error:
        raise ConfigError(f"params.yaml: `decoder`: {error}") from None


class CausalLMPretext(Pretext[TokenBatch, TokenSplit]):
    model: CausalLM

    def __init__(self, params: Params, vocab_size: int, processes: Processes) -> None:
        settings = params.language_pretrain
        super().__init__(params, settings.training, processes)
        self.settings, self.config = settings, decoder_config(params.decoder, vocab_size)
        asked = settings.training.activation_checkpointing
        layers = params.decoder.layers if asked is True else min(int(asked), params.decoder.layers)
        self.model = CausalLM(Decoder(self.config, layers), settings.separate_documents)

    def loss(self, engine: Any, batch: TokenBatch) -> torch.Tensor:
        device = self.processes.device
        output = engine(batch.tokens.to(device), batch.documents.to(device))
        value: torch.Tensor = output.nats.sum() / batch.predicted
        return value

    def loss_on(self, data: TokenSplit, engine: Any) -> float:
        return self.judge(data, engine).loss

    def judge(self, data: TokenSplit, engine: Any) -> Judged:
        """Every document of `data`, over all processes."""
        context, processes = self.settings.context, self.processes
        mine = judge(
            engine,
            data,
            context,
            self.micro_batch,
            processes.device,
            processes.rank,
            processes.world_size,
        )
        return reduce(add, processes.gather(mine))

    def describe(self) -> dict[str, Any]:
        return {
            "context": self.settings.context,
            "separate_documents": self.settings.separate_documents,
            "steps": self.settings.training.steps,
        }
