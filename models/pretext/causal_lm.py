"""Next-token prediction: the loss of a decoder on rows of packed documents.

B rows · L tokens of a row · V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.language import Decoder


@dataclass(frozen=True)
class CausalOutput:
    nats: Tensor
    """(B, L − 1): −log p of every token but the first of a row; 0 where nothing is predicted."""
    predicted: Tensor
    """bool (B, L − 1)."""
    correct: Tensor
    """bool (B, L − 1): the likeliest token was the right one."""


class CausalLM(nn.Module):
    """A decoder and its loss. In a state dict the decoder's weights have the prefix `decoder.`.

    Args:
        separate_documents: documents of one row do not see one another; off for comparison alone.
    """

    def __init__(self, decoder: Decoder, separate_documents: bool = True) -> None:
        super().__init__()
        self.decoder = decoder
        self.separate_documents = separate_documents

    def forward(self, tokens: Tensor, documents: Tensor) -> CausalOutput:
        """
        Args:
            tokens: int64 (B, L).
            documents: int64 (B, L); the tokens of a document have its number, −1 is padding. What follows a
                document's last token is not predicted, nor is padding.
        """
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        predicted = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
        logits, _ = self.decoder(inputs, documents=documents[:, :-1] if self.separate_documents else None)
        nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        nats = torch.where(predicted, nats.view_as(targets), 0.0)
        return CausalOutput(nats, predicted, predicted & (logits.argmax(-1) == targets))
