"""Tokens to text, piece by piece: never half a character, never anything of a stop string or beyond it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"
"""What tokenizers decode the first bytes of a character to."""


class TextStream:
    """The text of one answer as its tokens come.

    Args:
        tokenizer: of transformers; special tokens are left out.
        stop_strings: the text ends before the first of them.

    Attributes:
        text: all that was given out.
        stopped: a stop string came; nothing is to follow.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._ids: list[int] = []
        # Tokens from `_window` to `_read` were decoded before; decoding the new ones together with them gives the
        # spaces that stand between them.
        self._window = self._read = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that is certain from this token on."""
        self._ids.append(token_id)
        return self._given_out(self._decode_new(), is_last=False)

    def finish(self) -> str:
        """What was held back, as no token follows."""
        return self._given_out(self._decode_new(is_last=True), is_last=True)

    def fork(self) -> TextStream:
        """An independent copy."""
        twin = copy.copy(self)
        twin._ids = list(self._ids)
        return twin

    def _decode_new(self, *, is_last: bool = False) -> str:
        before = self._decode(self._ids[self._window : self._read])
        text = self._decode(self._ids[self._window :])
        if not is_last and text.endswith(_UNFINISHED):
            return ""
        self._window, self._read = self._read, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _given_out(self, new: str, *, is_last: bool) -> str:
        """The part of held and new text that no stop string can still claim."""
        if self.stopped:
            return ""
        pending = self._held + new
        found = [at for at in (pending.find(stop) for stop in self._stop_strings) if at >= 0]
        if found:
            self.stopped = True
            certain, self._held = pending[: min(found)], ""
        else:
            n_held = 0 if is_last else self._n_possible(pending)
            certain, self._held = pending[: len(pending) - n_held], pending[len(pending) - n_held :]
        self.text += certain
        return certain

    def _n_possible(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = 0
        for stop in self._stop_strings:
            lengths = range(min(len(stop) - 1, len(text)), longest, -1)
            longest = next((n for n in lengths if text.endswith(stop[:n])), longest)
        return longest
