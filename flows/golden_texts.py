"""Golden prompts as a client of the HTTP server meets them: prompt in, text out.

The text is what the recorded tokens read as, put together in the way of the server; prompts go over as
token ids, so that nothing depends on how a text is cut into tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from flows.golden_prompts import read_golden
from flows.serving.lamina.api.answers import Answer
from flows.serving.lamina.api.texts import Texts
from flows.serving.lamina.requests import TokenEvent
from flows.serving.lamina.slices.bundle import read_bundle

COMPLETIONS = "/v1/completions"


@dataclass(frozen=True)
class GoldenText:
    name: str
    prompt: tuple[int, ...]
    tokens: int  # of the answer
    text: str

    def body(self, model: str, *, stream: bool = False) -> dict[str, Any]:
        """Of a request, greedy."""
        return {
            "model": model,
            "prompt": list(self.prompt),
            "max_tokens": self.tokens,
            "temperature": 0,
            "stream": stream,
        }

    def problem(self, text: str) -> str:
        """What is wrong with an answer; empty: nothing."""
        if text == self.text:
            return ""
        pairs = zip(text, self.text, strict=False)
        place = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(text), len(self.text)))
        return f"golden prompt {self.name}: the answer differs from the recorded one at character {place}"


def read_texts(folder: Path) -> list[GoldenText]:
    """Of a registered bundle.

    Raises:
        DataError: there are none, or the tokenizer is of no use.
    """
    texts = Texts.of(read_bundle(folder))
    found = []
    for prompt in read_golden(folder):
        answer = Answer(texts, continues=prompt.prompt, stops=(), alternatives=None)
        pieces = [
            answer.add(TokenEvent(id="golden", index=index, token=token))
            for index, token in enumerate(prompt.continuation)
        ]
        text = "".join(piece.text for piece in [*pieces, answer.finish()])
        found.append(GoldenText(prompt.name, prompt.prompt, len(prompt.continuation), text))
    return found


def ask_texts(client: httpx.Client, model: str, texts: Sequence[GoldenText]) -> str:
    """Send every prompt to a server; the first problem, or empty."""
    for golden in texts:
        try:
            answer = client.post(COMPLETIONS, json=golden.body(model))
            if answer.status_code != 200:
                return f"golden prompt {golden.name}: status {answer.status_code}: {answer.text[:200]}"
            body = answer.json()
            text, tokens = str(body["choices"][0]["text"]), body["usage"]["completion_tokens"]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            return f"golden prompt {golden.name}: {str(error) or type(error).__name__}"
        if problem := golden.problem(text):
            return problem
        if tokens != golden.tokens:
            return f"golden prompt {golden.name}: {tokens} tokens instead of the recorded {golden.tokens}"
    return ""
