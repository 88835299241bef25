"""Sentinels: the unused tokens of a vocabulary that stand for masked spans."""

import re
from collections.abc import Mapping

_FAMILIES = (
    # pattern, step through N
    (re.compile(r"<extra_id_(\d+)>"), 1),  # T5: span k is <extra_id_k>
    (re.compile(r"<unused(\d+)>"), -1),  # Gemma: counting down
    (re.compile(r"<\|reserved_special_token_(\d+)\|>"), 1),  # Llama 3
)
_T5GEMMA2_FIRST = 6237
"""T5Gemma 2 was trained with <unused6237>, <unused6236>, ... although <unused6241> exists."""


def find_sentinels(vocab: Mapping[str, int], count: int) -> list[int]:
    """The first `count` sentinels of a vocabulary, in the order spans use them.

    Args:
        vocab: token string to id (`tokenizer.get_vocab()`).
        count: sentinels needed (`sentinels_needed`).

    Returns:
        Ids of `<extra_id_N>` ascending in N; else of `<unusedN>`, counting down from 6237 where that exists
        (T5Gemma 2) and from the highest N elsewhere; else of `<|reserved_special_token_N|>` ascending. The
        first of these families that has enough.

    Raises:
        ValueError: no family has enough.
    """
    if count < 0:
        raise ValueError(f"count must be 0 or more, got {count}")
    most: list[int] = []
    for pattern, step in _FAMILIES:
        by_number = {int(match[1]): vocab[token] for token in vocab if (match := pattern.fullmatch(token))}
        if pattern.pattern.startswith("<unused") and _T5GEMMA2_FIRST in by_number:
            by_number = {number: i for number, i in by_number.items() if number <= _T5GEMMA2_FIRST}
        ids = [by_number[number] for number in sorted(by_number, reverse=step < 0)]
        if len(ids) >= count:
            return ids[:count]
        most = max(most, ids, key=len)
    raise ValueError(
        f"{count} sentinels are needed, the vocabulary has {len(most)} unused tokens for them (<extra_id_N>, "
        "<unusedN> or <|reserved_special_token_N|>); add some with twofold.adapt.add_sentinels, or use "
        "shorter sequences"
    )
