"""Tokens of one request, made into text: detokenised, cut at stop strings, with probabilities.

Streamed or not, an answer comes from here, so both are the same text. Probabilities of a token go out with
the text that the token completes; tokens behind a stop string are not listed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from flows.serving.lamina.api.detokenize import Vocabulary
from flows.serving.lamina.api.stops import StopScanner
from flows.serving.lamina.api.texts import Texts
from flows.serving.lamina.requests import TokenEvent


@dataclass(frozen=True)
class Alternative:
    text: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True)
class TokenInfo(Alternative):
    """A token of the answer, where its text begins in it, and what else could have come."""

    offset: int
    top: tuple[Alternative, ...]


@dataclass
class Piece:
    """What can be shown after another token; often nothing."""

    text: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens)

    def add(self, other: Piece) -> None:
        self.text += other.text
        self.tokens += other.tokens


class Answer:
    """One answer as it grows."""

    def __init__(
        self, texts: Texts, *, continues: Sequence[int], stops: Sequence[str], alternatives: int | None
    ) -> None:
        """
        Args:
            continues: tokens that the text goes on from; none if it begins anew.
            alternatives: listed beside each token; None: no probabilities.
        """
        self._vocabulary = texts.vocabulary
        self._detokenizer = texts.detokenizer(continues)
        self._stops = StopScanner(stops)
        self._alternatives = alternatives
        self._tokens: deque[TokenInfo] = deque()  # whose text is not out yet
        self._made = self._shown = 0  # characters: detokenised, given out
        self.count = 0  # tokens, up to the one that completed a stop string

    @property
    def is_stopped(self) -> bool:
        """A stop string was found: nothing more will be shown."""
        return self._stops.found is not None

    def add(self, token: TokenEvent) -> Piece:
        if self.is_stopped:
            return Piece()
        self.count += 1
        if self._alternatives is not None and not self._vocabulary.is_hidden(token.token):
            self._tokens.append(token_info(self._vocabulary, token, self._made, self._alternatives))
        text = self._detokenizer.add(token.token)
        self._made += len(text)
        return self._show(self._stops.add(text))

    def finish(self) -> Piece:
        """What was held back."""
        if self.is_stopped:
            return Piece()
        text = self._stops.add(self._detokenizer.finish())
        if not self.is_stopped:
            text += self._stops.finish()
        piece = self._show(text)
        if not self.is_stopped:  # tokens without any text at the end
            piece.tokens += self._tokens
            self._tokens.clear()
        return piece

    def _show(self, text: str) -> Piece:
        self._shown += len(text)
        tokens = []
        while self._tokens and self._tokens[0].offset < self._shown:
            tokens.append(self._tokens.popleft())
        return Piece(text, tokens)


def token_info(vocabulary: Vocabulary, event: TokenEvent, offset: int, alternatives: int) -> TokenInfo:
    """
    Args:
        alternatives: how many of the most likely to list, the chosen one among them if it is one of these.
    """
    chosen = event.token, event.logprob if event.logprob is not None else 0.0
    likely = sorted({**dict(event.alternatives), chosen[0]: chosen[1]}.items(), key=lambda each: -each[1])
    return TokenInfo(
        *_named(vocabulary, *chosen),
        offset,
        tuple(Alternative(*_named(vocabulary, *each)) for each in likely[:alternatives]),
    )


def _named(vocabulary: Vocabulary, token: int, logprob: float) -> tuple[str, bytes, float]:
    return vocabulary.token_text(token), vocabulary.token_bytes(token), logprob
