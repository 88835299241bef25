"""Guesses from what stands in a text already, against a plain scan of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofold.infer.lookup import Guesser, Lookup, Pace


def scanned(text, n, max_ngram, min_ngram):
    """From the longest run at the end of the text to the shortest: where it stood last, and what came then."""
    for length in range(min(max_ngram, len(text)), min_ngram - 1, -1):
        for end in range(len(text) - 1, length - 1, -1):
            if text[end - length : end] == text[-length:]:
                longer = list(text)
                for i in range(n):
                    longer.append(longer[end + i])
                return longer[len(text) :]
    return []


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2], 2, [3, 4]),
        ([1, 2, 3, 9, 2, 4, 1, 2], 1, [3]),  # two tokens before one, though the one stood later
        ([1, 2, 3, 1, 2, 4, 1, 2], 1, [4]),  # the later of two
        ([5, 1, 2, 3, 8, 0, 1, 2, 4, 8, 5, 1, 2], 2, [3, 8]),  # three tokens before two
        ([1, 2, 3], 4, []),
        ([1, 2, 7, 1, 2], 7, [7, 1, 2, 7, 1, 2, 7]),  # what repeats itself
        ([4, 4, 4], 3, [4, 4, 4]),
        ([4, 4], 3, []),
        ([1, 2, 3, 9, 2], 1, []),  # one token is not enough
        ([4], 3, []),
        ([], 3, []),
        ([1, 2, 1, 2], 0, []),
    ],
)
def test_goes_on_as_before(text, n, expected):
    assert Lookup(text).following(n) == expected


def test_a_single_token_may_be_enough():
    lookup = Lookup([1, 2, 3, 9, 2], min_ngram=1)
    assert lookup.following(2) == [3, 9]
    lookup.add(9)
    assert lookup.following(2) == [2, 9]


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 4), st.integers(0, 3), st.integers(0, 12))
def test_equals_a_scan_of_the_whole_text_after_every_token(text, min_ngram, more, n):
    lookup = Lookup(text[:5], max_ngram=min_ngram + more, min_ngram=min_ngram)
    for n_known in range(5, len(text) + 1):
        assert lookup.following(n) == scanned(text[:n_known], n, min_ngram + more, min_ngram)
        lookup.add(text[n_known] if n_known < len(text) else 0)


class TestPace:
    def test_follows_what_was_right(self):
        pace = Pace(10)
        found = []
        for n_right in (10, 2, 5, 10, 1, 0):
            found.append(pace.next())
            pace.learn(n_right)
        assert [*found, pace.next()] == [10, 10, 5, 10, 10, 3, 3]

    def test_rests_longer_and_longer_until_a_guess_is_right(self):
        pace = Pace(4)
        rests = []
        for _ in range(9):
            rests.append(0)
            while (n := pace.next()) == 0:
                rests[-1] += 1
            pace.learn(0)
        assert rests == [0, 0, 1, 3, 7, 15, 31, 31, 31]
        assert n == 3
        while pace.next() == 0:
            pass
        pace.learn(2)
        assert pace.next() == 4
        pace.learn(0)
        assert pace.next() == 3

    def test_never_more_than_was_asked_for(self):
        pace = Pace(1)
        for n_right in (1, 0):
            assert pace.next() == 1
            pace.learn(n_right)
        assert pace.next() == 1


def test_never_guesses_what_may_not_be_written():
    """The last token is never guessed: writing it takes no step after."""
    guesser = Guesser([0, 1, 2, 3, 4, 5, 6, 0, 1], most=4, max_new_tokens=4)
    assert guesser.guess() == [2, 3, 4]
    guesser.add(2)
    assert guesser.guess() == [3, 4]
    guesser.add(3)
    assert guesser.guess() == [4]
    guesser.add(4)
    assert guesser.guess() == []
