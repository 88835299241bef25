"""The text and bytes of single tokens, and which tokens of an answer its text is made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import pre_tokenizers

from twofold.infer import Delta, TokenLogprob
from twofold.infer.text_stream import TextStream

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LOWEST = -9999.0
"""In place of minus infinity, which JSON has no number for."""


def _byte_letters() -> dict[str, int]:
    """The letters with which byte-level tokenizers write bytes: those that are printed as they are, in order, then
    from U+0100 on the others."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = {chr(byte): byte for byte in printed} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
    assert set(letters) == set(pre_tokenizers.ByteLevel.alphabet())
    return letters


class TokenTexts:
    """What each token stands for.

    Args:
        tokenizer: of transformers: byte-level, or with spaces as U+2581 and single bytes as <0x..>.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._letters = _byte_letters() if "ByteLevel" in repr(getattr(backend, "decoder", None)) else None
        self._added = {i: str(token.content) for i, token in tokenizer.added_tokens_decoder.items()}

    def bytes(self, token_id: int) -> bytes:
        """In UTF-8; of a character that takes several tokens, each has a part. Empty where there is no token."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece: str | None = self.tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return b""
        if self._letters is not None and all(letter in self._letters for letter in piece):
            return bytes(self._letters[letter] for letter in piece)
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace("\u2581", " ").encode()

    def text(self, token_id: int) -> str:
        """Likewise; a part of a character as `bytes:\\xe2\\x82`, as OpenAI writes it."""
        raw = self.bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@dataclass(frozen=True, slots=True)
class Reported:
    """One token of an answer's text."""

    token_id: int
    offset: int
    """Characters of the text before it; a part of a character has that character's."""
    logprob: float
    top: tuple[tuple[int, float], ...]


class TokenReport:
    """Which tokens an answer's text is made of, as it comes: neither the end token, nor those of a stop string.

    A token is held back until text from its place on has been given out.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self._texts, self._stream = texts, TextStream(texts.tokenizer)
        self._held: list[Reported] = []
        self._n_text = 0

    def take(self, delta: Delta) -> list[Reported]:
        """Those that are certain from this delta on."""
        for token_id, logprob in zip(delta.token_ids, delta.logprobs or (), strict=True):
            self._held.append(_reported(token_id, self._offset(token_id), logprob))
        self._n_text += len(delta.text)
        certain = [token for token in self._held if token.offset < self._n_text]
        del self._held[: len(certain)]
        return certain

    def _offset(self, token_id: int) -> int:
        """Take a token in; where in the text it stands."""
        before = len(self._stream.text)
        new = self._stream.push(token_id)
        try:
            own = self._texts.bytes(token_id).decode()
        except UnicodeDecodeError:
            return before
        return before + max(0, len(new) - len(own))  # bytes before it that make no character were held back


def _reported(token_id: int, offset: int, logprob: TokenLogprob) -> Reported:
    top = tuple((other, max(value, _LOWEST)) for other, value in logprob.top)
    return Reported(token_id, offset, max(logprob.logprob, _LOWEST), top)


def joined(deltas: Sequence[Delta]) -> Delta:
    """Deltas of one answer in a row, as one."""
    if len(deltas) == 1:
        return deltas[0]
    logprobs = None
    if deltas[0].logprobs is not None:
        logprobs = tuple(value for delta in deltas for value in delta.logprobs or ())
    return Delta(
        index=deltas[0].index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=logprobs,
        finish_reason=deltas[-1].finish_reason,
    )
