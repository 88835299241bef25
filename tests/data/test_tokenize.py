from twofold.data.tokenize import encode


def test_encode_adds_nothing(tokenizer):
    ids = encode(tokenizer, "ab")
    assert ids.dtype.name == "int64"
    assert tokenizer.decode(ids) == "ab"
    assert len(ids) == 2
