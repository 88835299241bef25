"""Tokens and the words they stand for, by the characters each covers.

A word is what a reader would point at: a run of letters and digits with the marks inside it ("don't", "3.14",
"sink-free"), one character of a script without spaces, a special token, or a run of one other sign. White space
belongs to no word.

Letters: W words, L tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from twofold.infer.text_stream import TextStream

Span = tuple[int, int]
"""First character, and the one after the last."""

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Thai, Lao, Burmese, Khmer, Japanese kana, Chinese characters."""
_MARKS = (
    "\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u06d6-\u06dc\u0900-\u0963\u0966-\u0dff"
)
"""Accents and vowel signs, which `re` does not count as letters, and the Indic scripts that use them."""
_LETTER = rf"(?:[^\W_{_UNSPACED}]|[{_MARKS}])"
_WORD = re.compile(
    rf"[{_UNSPACED}][\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u3099\u309a]*"
    rf"|{_LETTER}+(?:['\u2019.,:_-]?{_LETTER})*"
    r"|([^\w\s]|_)\1*"
)


def words_of(text: str, special: Sequence[Span] = ()) -> list[Span]:
    """The words of a text from left to right.

    Args:
        special: spans that are one word each whatever they look like, in order: those of special tokens.
    """
    words: list[Span] = []
    done = 0
    for start, stop in (*special, (len(text), len(text))):
        words += [found.span() for found in _WORD.finditer(text, done, start)]
        if start < stop:
            words.append((start, stop))
        done = stop
    return words


def spans_of_text(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    """Token ids of a text, with nothing added, and the characters each stands for.

    Raises:
        ValueError: the tokenizer cannot tell.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "this tokenizer does not say which characters a token stands for; load the model with a tokenizer.json "
            "in its folder"
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(found["input_ids"]), [(start, stop) for start, stop in found["offset_mapping"]]


def spans_of_tokens(tokenizer: Any, token_ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text of generated tokens, as the engine streams it, and the characters each stands for.

    Tokens that make a character together all get it; special tokens, which leave no text, get an empty span.
    """
    special = set(tokenizer.all_special_ids)
    stream = TextStream(tokenizer)
    spans: list[Span] = []
    waiting: list[int] = []
    at = 0
    for number, token in enumerate(token_ids):
        new = stream.push(token)
        spans.append((at, at))
        if token not in special:
            waiting.append(number)
        if new:
            for i in waiting:
                spans[i] = (at, at + len(new))
            waiting, at = [], at + len(new)
    rest = stream.finish()
    for i in waiting:
        spans[i] = (at, at + len(rest))
    return stream.text, spans


def shares(words: Sequence[Span], tokens: Sequence[Span]) -> Tensor:
    """How tokens are divided among words: float32 [L, W], the part of a token's characters in each word, of those it
    has in any. A token that touches no word, as white space, has a row of zeros."""
    found = torch.zeros(len(tokens), len(words))
    first = 0
    for i, (start, stop) in enumerate(tokens):
        while first < len(words) and words[first][1] <= start:
            first += 1
        # Neighbouring tokens may share a character, so that the next one begins its search here again.
        for j in range(first, len(words)):
            if words[j][0] >= stop:
                break
            found[i, j] = min(stop, words[j][1]) - max(start, words[j][0])
    return found / found.sum(dim=1, keepdim=True).clamp(min=1.0)
