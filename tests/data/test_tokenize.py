import numpy as np
import pytest

from twofold.data.tokenize import chunk_document, encode


def chunks(num_tokens, length):
    return [(chunk.tokens.tolist(), chunk.ends) for chunk in chunk_document(np.arange(num_tokens), length)]


def test_chunks_are_consecutive_and_the_last_one_ends():
    assert chunks(6, 4) == [([0, 1, 2, 3], False), ([4, 5], True)]
    assert chunks(4, 4) == [([0, 1, 2, 3], True)]


def test_single_tokens_are_dropped():
    assert chunks(5, 4) == [([0, 1, 2, 3], False)]
    assert chunks(1, 4) == []
    assert chunks(0, 4) == []


def test_too_short_chunks():
    with pytest.raises(ValueError, match="at least 2 tokens"):
        chunks(5, 1)


def test_encode_adds_nothing(tokenizer):
    ids = encode(tokenizer, "ab")
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == "ab"
    assert len(ids) == 2
