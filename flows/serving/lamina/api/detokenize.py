"""Tokens to text while they come: never half a character, and in the end the text of all tokens at once.

What a token adds depends on its neighbours: three tokens may be one character, and the first word of a text
loses the space before it. Two kinds of tokenizers are in use for decoders, told apart by `decoder` in
tokenizer.json:

byte level (GPT-2 and its heirs)   a token is bytes. The bytes go through an incremental UTF-8 decoder.
pieces (Llama, Gemma)              a token is text, or, as a last resort, one byte: `<0xE2>`. The library
                                   makes a run of such bytes text if the whole run is UTF-8, and else one
                                   U+FFFD for each byte, so a run is held back until it ends.

Invariant: the parts that `add` and `finish` give, joined, are what the library makes of all tokens at once.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

from flows.errors import DataError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
PIECE_DECODERS = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "BPEDecoder"})
"""Under these a token never changes text that a token before it has made (byte runs aside)."""


class Detokenizer(Protocol):
    """Text of one answer."""

    def add(self, token: int) -> str:
        """What is certain after this token and was not before; often nothing."""

    def finish(self) -> str:
        """What was held back, once no token follows."""


class Vocabulary:
    """Tokens as bytes and as text, whatever the tokenizer's kind."""

    def __init__(self, tokenizer: Tokenizer, decoder: dict[str, Any] | None, hidden: frozenset[int]) -> None:
        """
        Args:
            decoder: that key of tokenizer.json.
            hidden: tokens that are never text, special ones.

        Raises:
            DataError: a kind of tokenizer whose text cannot be given out piece by piece.
        """
        self._tokenizer = tokenizer
        self._hidden = hidden
        kinds = _kinds(decoder)
        self._byte_level = kinds == ["ByteLevel"]
        self._byte_fallback = "ByteFallback" in kinds
        if not self._byte_level and (unknown := sorted(set(kinds) - PIECE_DECODERS)):
            raise DataError(f"tokenizer.json has the decoder {unknown[0]!r}, whose text cannot be streamed")

    def is_hidden(self, token: int) -> bool:
        """Whether it is never text; also of an id that only pads the model's matrix."""
        return token in self._hidden or self._tokenizer.id_to_token(token) is None

    def detokenizer(self, before: Sequence[int] = ()) -> Detokenizer:
        """
        Args:
            before: the tokens that the text continues; a piece after them keeps its leading space.
        """
        if self._byte_level:
            return _ByteLevel(self)
        for token in reversed(before):
            if not self.is_hidden(token) and not self.is_byte(token) and self.decode([token]):
                return _Pieces(self, [token])
        return _Pieces(self, [])

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def is_byte(self, token: int) -> bool:
        if not self._byte_fallback:
            return False
        piece = self._tokenizer.id_to_token(token)
        return piece is not None and BYTE_TOKEN.fullmatch(piece) is not None

    def token_bytes(self, token: int) -> bytes:
        """What the token stands for inside of a text; its name if it is never text."""
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self.is_hidden(token):
            return str(piece).encode()
        if self._byte_level:
            return _piece_bytes(piece)
        if self._byte_fallback and (byte := BYTE_TOKEN.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        return self.decode([token, token])[
            len(self.decode([token])) :
        ].encode()  # its second self has its space

    def token_text(self, token: int) -> str:
        """For lists of tokens: its text, or its bytes where they are no text by themselves."""
        data = self.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class _ByteLevel:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        if self._vocabulary.is_hidden(token):
            return ""
        return self._utf8.decode(self._vocabulary.token_bytes(token))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Pieces:
    def __init__(self, vocabulary: Vocabulary, before: list[int]) -> None:
        self._vocabulary = vocabulary
        self._before = before  # the last token whose text is out: what follows is not the beginning of a text
        self._run: list[int] = []  # bytes that may still become characters

    def add(self, token: int) -> str:
        if self._vocabulary.is_hidden(token):
            return ""
        self._run.append(token)
        if self._vocabulary.is_byte(token):
            return ""
        text = self._text()
        self._before, self._run = [token], []
        return text

    def finish(self) -> str:
        text = self._text() if self._run else ""
        self._run = []
        return text

    def _text(self) -> str:
        decode = self._vocabulary.decode
        return decode(self._before + self._run)[len(decode(self._before)) :]


def _kinds(decoder: dict[str, Any] | None) -> list[str]:
    """Types of decoders, those of a sequence one by one."""
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [kind for inner in decoder.get("decoders", ()) for kind in _kinds(inner)]
    if decoder.get("type") == "Strip" and decoder.get("stop"):
        return ["Strip at the end"]
    return [str(decoder.get("type"))]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others follow from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _piece_bytes(piece: str) -> bytes:
    """An added token may have letters that are none of the alphabet; it then stands for its own text."""
    try:
        return bytes(_ALPHABET[letter] for letter in piece)
    except KeyError:
        return piece.encode()
