import json
import logging

import numpy as np
import pytest

from twofold.config.data import DataConfig
from twofold.data.convention import Convention
from twofold.data.split import Corpus, drop_overlaps, open_corpora, split_documents
from twofold.data.store import text_hash

CONVENTION = Convention(
    decoder_start="last_source_token",
    bos_token_id=256,
    source_bos=False,
    stop_token_ids=(257,),
    pad_token_id=257,
)


def corpus(tokenizer, texts):
    return Corpus.from_records([{"text": text} for text in texts], tokenizer, CONVENTION)


def texts(tokenizer, corpora):
    return [tokenizer.decode(c.store.document(i)) for c in corpora for i in c.indices()]


def test_hash_ignores_case_and_white_space():
    same = {text_hash({"text": text}) for text in ("A b\nc", "a  B c ", "a b c")}
    assert len(same) == 1
    assert text_hash({"text": "ab c"}) not in same
    pairs = [{"prompt": "a", "completion": "b c"}, {"prompt": "a b", "completion": "c"}]
    assert len({text_hash(pair) for pair in pairs}) == 2
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "b"}]
    assert text_hash({"messages": turns}) == text_hash({"prompt": "a", "completion": "B"})


def test_copies_are_on_one_side(tokenizer):
    names = [f"Document {n}" for n in range(40)]
    corpora = [
        corpus(tokenizer, names + names[:20]),
        corpus(tokenizer, [name.upper() + " " for name in names]),
    ]
    for seed in range(5):
        train, held_out = split_documents(corpora, 0.3, seed)
        learnt, kept = ({t.lower().strip() for t in texts(tokenizer, side)} for side in (train, held_out))
        assert not learnt & kept
        assert len(learnt | kept) == 40
        assert len(texts(tokenizer, train)) + len(texts(tokenizer, held_out)) == 100
        assert 3 <= len(kept) <= 22


def test_the_share_and_the_seed(tokenizer):
    many = [corpus(tokenizer, [f"document {n}" for n in range(2000)])]
    sizes = [len(split_documents(many, 0.1, seed)[1][0]) for seed in range(3)]
    assert all(140 < size < 260 for size in sizes)  # 200, and 4.5 times its deviation of 13.4
    one, same, other = (texts(tokenizer, split_documents(many, 0.1, seed)[1]) for seed in (0, 0, 1))
    assert one == same != other


def test_each_side_gets_a_document(tokenizer):
    two = [corpus(tokenizer, ["a", "b"])]
    for fraction in (1e-9, 0.5, 1 - 1e-9):
        for seed in range(4):
            train, held_out = split_documents(two, fraction, seed)
            assert (len(train[0]), len(held_out[0])) == (1, 1)
    with pytest.raises(ValueError, match=r"3 document\(s\) with one text: at least 2 different"):
        split_documents([corpus(tokenizer, ["a", "A", "a "])], 0.5, 0)
    with pytest.raises(ValueError, match="between 0 and 1, got 0"):
        split_documents(two, 0, 0)


def words(first, last):
    return " ".join(f"w{n:03d}" for n in range(first, last))


def naive_share(text, held_out, ngram):
    grams = [text[i : i + ngram] for i in range(len(text) - ngram + 1)]
    taken = {other[i : i + ngram] for other in held_out for i in range(len(other) - ngram + 1)}
    return sum(gram in taken for gram in grams) / len(grams) if grams else 0.0


def test_overlaps_are_those_of_a_naive_count(tokenizer):
    # One token per byte, so a token n-gram is a piece of n characters.
    held_out = [words(0, 20), words(50, 60), "unrelated text"]
    train = [words(a, b) for a, b in ((0, 20), (0, 30), (0, 200), (10, 25), (55, 70), (300, 320))]
    train += ["unrelated", words(0, 3), "x", "of another kind altogether"]
    for ngram in (1, 5, 13):
        for share in (0.2, 0.5, 0.9, 1.0):
            (kept,) = drop_overlaps([corpus(tokenizer, train)], [corpus(tokenizer, held_out)], ngram, share)
            expected = [text for text in train if naive_share(text, held_out, ngram) < share]
            assert texts(tokenizer, [kept]) == expected
            if len(expected) < len(train):
                (reason,) = kept.dropped
                assert reason == f"{ngram}-grams in common with held-out documents"
                assert kept.dropped[reason] == len(train) - len(expected)


def test_text_that_most_held_out_documents_have_is_no_overlap(tokenizer):
    template = "You are a helpful assistant of somebody. "
    held_out = corpus(tokenizer, [template + word * 9 for word in ("one", "two", "six", "ten")])
    (kept,) = drop_overlaps([corpus(tokenizer, [template + "abc", "six" * 6])], [held_out], 8, 0.5)
    assert texts(tokenizer, [kept]) == [template + "abc"]


def test_blocks_of_documents_change_nothing(tokenizer, monkeypatch):
    held_out, train = (
        corpus(tokenizer, [words(0, 40)]),
        corpus(tokenizer, [words(n, n + 9) for n in range(60)]),
    )
    (whole,) = drop_overlaps([train], [held_out], 13, 0.5)
    monkeypatch.setattr("twofold.data.split._BLOCK_TOKENS", 50)
    (parts,) = drop_overlaps([train], [held_out], 13, 0.5)
    assert 0 < len(whole) < 60
    assert np.array_equal(whole.indices(), parts.indices())


def opened(tokenizer, tmp_path, train, held_out=None, **changes):
    def written(name, texts):
        (tmp_path / name).write_text("\n".join(json.dumps({"text": text}) for text in texts))
        return {"path": str(tmp_path / name)}

    config = DataConfig(
        sources=[written(f"{n}.jsonl", texts) for n, texts in enumerate(train)],
        held_out=[written("held.jsonl", held_out)] if held_out else [],
        source_length=8, target_length=8, rows_per_batch=1, cache=str(tmp_path / "cache"),
        tokenize_workers=1, **changes,
    )  # fmt: skip
    return open_corpora(config, tokenizer, CONVENTION)


def test_open_corpora(tokenizer, tmp_path, caplog):
    train, held_out = opened(tokenizer, tmp_path, [["aa", "bb"], ["cc"]])
    assert texts(tokenizer, train) == ["aa", "bb", "cc"]
    assert held_out == []
    with caplog.at_level(logging.WARNING):
        train, held_out = opened(tokenizer, tmp_path, [["aa", "bb"], ["cc", "BB"]], ["bb ", "dd"])
    assert texts(tokenizer, train) == ["aa", "cc"]
    assert [one.dropped for one in train] == [{"held out too, as the same text": 1}] * 2
    assert "1.jsonl: 1 documents dropped: held out too, as the same text" in caplog.text
    assert texts(tokenizer, held_out) == ["bb ", "dd"]
    with pytest.raises(ValueError, match="nothing is left"):
        opened(tokenizer, tmp_path, [["aa"]], ["AA"])
    train, held_out = opened(tokenizer, tmp_path, [[f"text {n}" for n in range(9)]], held_out_fraction=0.3)
    assert sorted(texts(tokenizer, train + held_out)) == [f"text {n}" for n in range(9)]
    train, _ = opened(tokenizer, tmp_path, [[words(0, 10), words(50, 60)]], [words(0, 12)], held_out_ngram=13)
    assert texts(tokenizer, train) == [words(50, 60)]


def test_too_many_bad_records(tokenizer, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        opened(tokenizer, tmp_path, [["fine", 3]], max_bad_share=0.5)
    assert "1 of 2 records skipped (1 wrong type); first: " in caplog.text
    with pytest.raises(ValueError, match=r"0.jsonl, line 2: column 'text'.* more than max_bad_share=0.05"):
        opened(tokenizer, tmp_path, [["fine", 3]])
    opened(tokenizer, tmp_path, [["fine", ""]])  # empty ones are only counted
    assert "1 empty text" in caplog.text


def test_records_in_memory(tokenizer):
    assert len(corpus(tokenizer, ["a", ""])) == 1
    with pytest.raises(ValueError, match="no records"):
        corpus(tokenizer, [])
    with pytest.raises(ValueError, match="record 0: column 'text' must be a str"):
        corpus(tokenizer, [3])
