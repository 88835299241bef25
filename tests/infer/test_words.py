"""Words of a text, and which characters tokens stand for."""

import torch

from tests.models.tiny import assert_same
from twofold.infer.words import shares, spans_of_text, spans_of_tokens, words_of


def words(text, special=()):
    return [text[start:stop] for start, stop in words_of(text, special)]


def test_words_are_what_a_reader_points_at():
    assert words("Don't pay $3.14 -- sink-free... (ok)") == [
        "Don't", "pay", "$", "3.14", "--", "sink-free", "...", "(", "ok", ")",
    ]  # fmt: skip
    assert words("日本 naïve cafe\u0301 हिन्दी snake_case \n") == [
        "日", "本", "naïve", "cafe\u0301", "हिन्दी", "snake_case",
    ]  # fmt: skip
    assert words("a<|im_end|>\nb", [(1, 11)]) == ["a", "<|im_end|>", "b"]
    assert words("") == []


def test_spans_of_a_text_and_of_generated_tokens(byte_tokenizer):
    ids, spans = spans_of_text(byte_tokenizer, "hé<|im_end|>")
    assert spans == [(0, 1), (1, 2), (1, 2), (2, 12)]
    generated = [*ids[:2], *ids[1:]]  # the first half of é, then é, then the end: half a character is none
    text, spans = spans_of_tokens(byte_tokenizer, generated)
    assert text == "h\ufffdé"
    assert spans == [(0, 1), (1, 3), (1, 3), (1, 3), (3, 3)]
    text, spans = spans_of_tokens(byte_tokenizer, ids[:2])
    assert (text, spans) == ("h\ufffd", [(0, 1), (1, 2)])


def test_tokens_are_divided_among_words_by_characters():
    """ "ab cd,": a token inside a word, one over a gap, one of white space, one over a word and a sign, none."""
    found = shares([(0, 2), (3, 5), (5, 6)], [(0, 1), (1, 4), (2, 3), (4, 6), (6, 6)])
    assert_same(found, torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 0, 0], [0, 0.5, 0.5], [0, 0, 0]]))
