"""Prompt lookup: guess how a text goes on from what stands in its source, or earlier in itself.

Summaries, edits and extractions repeat what they were made from. The guesses cost nothing to make, and the model checks
several in one step; what comes out is what it would have written anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

_FEWEST = 3
"""Fewer guesses at a time save nothing: on a CPU two or three rows take longer than four (SmolLM2-135M, float32, one
core: a step 65 ms; verifying two tokens 97, three 118, four 87, eight 112, sixteen 140)."""

_MOST_MISSES = 6
"""More wrong guesses in a row lengthen the pause no more: after 31 steps a passage that is copied is to be noticed."""


class Lookup:
    """An index of where each short run of tokens stood last, which grows with the text.

    Args:
        ids: what is given: the source, and the decoder's prefix after it.
        max_ngram: a guess follows the last occurrence of so many of the last tokens, or else of fewer.
        min_ngram: but not of fewer than these.
    """

    def __init__(self, ids: Sequence[int], *, max_ngram: int = 3, min_ngram: int = 2) -> None:
        assert 1 <= min_ngram <= max_ngram
        self._lengths = range(max_ngram, min_ngram - 1, -1)
        self._text: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        """Runs of tokens, and the place after the last one of each; the end of the text is not among them."""
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """The text has gone on with this token."""
        place = len(self._text)
        for length in self._lengths:
            if length <= place:
                self._next[tuple(self._text[place - length :])] = place
        self._text.append(token)

    def following(self, n: int) -> list[int]:
        """The next `n` tokens, if it goes on as it did where its end stood before; empty where that was nowhere."""
        n_text = len(self._text)
        for length in self._lengths:
            place = self._next.get(tuple(self._text[-length:])) if length <= n_text else None
            if place is not None:
                # Beyond the end of the text: as what repeats itself goes on repeating itself.
                period = n_text - place
                return [self._text[place + i % period] for i in range(n)]
        return []


class Pace:
    """How many tokens are guessed at a time: more while guesses are right, and none for a while when they are not.

    Args:
        most: at one time, at least 1.
    """

    def __init__(self, most: int) -> None:
        self._most = self._n = most
        self._n_misses = self._n_paused = 0

    def next(self) -> int:
        """For this step; 0 in a pause."""
        if self._n_paused > 0:
            self._n_paused -= 1
            return 0
        return self._n

    def learn(self, n_right: int) -> None:
        """So many of the last guesses were right. A pause follows the second miss in a row, and doubles with each."""
        self._n = min(self._most, max(_FEWEST, 2 * n_right + 1))
        self._n_misses = 0 if n_right else min(self._n_misses + 1, _MOST_MISSES)
        self._n_paused = 2 ** max(0, self._n_misses - 1) - 1


class Guesser:
    """Guesses for one request.

    Args:
        ids: source and decoder prefix.
        most: tokens at a time.
        max_new_tokens: of the request.
    """

    def __init__(self, ids: Sequence[int], *, most: int, max_new_tokens: int) -> None:
        self._lookup, self._pace = Lookup(ids), Pace(most)
        self._n_left = max_new_tokens

    def add(self, token: int) -> None:
        """This token was written."""
        self._lookup.add(token)
        self._n_left -= 1

    def guess(self) -> list[int]:
        """The tokens after it, as far as more than one may still be written; empty without a guess."""
        n = min(self._pace.next(), self._n_left - 1)
        return self._lookup.following(n) if n > 0 else []

    def learn(self, n_right: int) -> None:
        """So many tokens of the last guess, which was not empty, were right."""
        self._pace.learn(n_right)
