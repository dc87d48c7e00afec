"""The two shapes of an answer, whole and in parts: of /v1/completions and of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flows.serving.lamina.api.answers import Alternative, Piece, TokenInfo

Json = dict[str, Any]


@dataclass(frozen=True)
class Head:
    """What every object of one answer repeats."""

    id: str
    created: int
    model: str
    fingerprint: str


class Format(Protocol):
    def opening(self) -> list[Json]:
        """Objects before the first text."""

    def part(self, piece: Piece, finish_reason: str | None) -> Json:
        """One object of a stream."""

    def whole(self, piece: Piece, finish_reason: str) -> Json:
        """The answer in one."""

    def bare(self) -> Json:
        """An object of a stream without a choice, for usage."""


@dataclass(frozen=True)
class CompletionFormat:
    head: Head
    with_logprobs: bool

    def opening(self) -> list[Json]:
        return []

    def part(self, piece: Piece, finish_reason: str | None) -> Json:
        choice = {
            "index": 0,
            "text": piece.text,
            "logprobs": _legacy_logprobs(piece.tokens) if self.with_logprobs else None,
            "finish_reason": finish_reason,
        }
        return {**self.bare(), "choices": [choice]}

    def whole(self, piece: Piece, finish_reason: str) -> Json:
        return self.part(piece, finish_reason)

    def bare(self) -> Json:
        return _object(self.head, "text_completion")


@dataclass(frozen=True)
class ChatFormat:
    head: Head
    with_logprobs: bool

    def opening(self) -> list[Json]:
        return [self._chunk({"role": "assistant", "content": ""}, None, None)]

    def part(self, piece: Piece, finish_reason: str | None) -> Json:
        delta = {"content": piece.text} if piece.text else {}
        return self._chunk(delta, self._logprobs(piece), finish_reason)

    def whole(self, piece: Piece, finish_reason: str) -> Json:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece),
            "finish_reason": finish_reason,
        }
        return {**_object(self.head, "chat.completion"), "choices": [choice]}

    def bare(self) -> Json:
        return _object(self.head, "chat.completion.chunk")

    def _chunk(self, delta: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self.bare(), "choices": [choice]}

    def _logprobs(self, piece: Piece) -> Json | None:
        if not self.with_logprobs:
            return None
        return {
            "content": [
                {**_chat_token(token), "top_logprobs": [_chat_token(each) for each in token.top]}
                for token in piece.tokens
            ],
            "refusal": None,
        }


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _object(head: Head, kind: str) -> Json:
    return {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
        "choices": [],
    }


def _chat_token(token: Alternative) -> Json:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes)}


def _legacy_logprobs(tokens: Sequence[TokenInfo]) -> Json:
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [  # the chosen one too, be it likely or not
            {each.text: each.logprob for each in (*token.top, token)} for token in tokens
        ],
        "text_offset": [token.offset for token in tokens],
    }
