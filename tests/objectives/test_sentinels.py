import pytest

from twofold.objectives.sentinels import find_sentinels


def test_t5_counts_its_names_up():
    vocab = {f"<extra_id_{n}>": 32099 - n for n in range(100)} | {"a": 0}
    assert find_sentinels(vocab, 3) == [32099, 32098, 32097]


def test_t5gemma2_starts_at_6237_and_counts_down():
    vocab = {f"<unused{n}>": 256002 + n - 100 for n in range(100, 6242)}
    assert find_sentinels(vocab, 6138)[:2] == [262139, 262138]
    assert find_sentinels(vocab, 6138)[-1] == 256002
    with pytest.raises(ValueError, match="6139 sentinels are needed, the vocabulary has 6138"):
        find_sentinels(vocab, 6139)


def test_other_gemma_starts_at_its_highest():
    vocab = {f"<unused{n}>": 7 + n for n in range(99)}
    assert find_sentinels(vocab, 2) == [105, 104]


def test_llama3():
    vocab = {f"<|reserved_special_token_{n}|>": 128002 + n for n in range(12)}
    assert find_sentinels(vocab, 11) == list(range(128002, 128013))


def test_the_first_family_with_enough():
    vocab = {"<extra_id_0>": 1, "<unused0>": 2, "<unused1>": 3}
    assert find_sentinels(vocab, 1) == [1]
    assert find_sentinels(vocab, 2) == [3, 2]


def test_too_few():
    with pytest.raises(
        ValueError, match=r"2 sentinels are needed, the vocabulary has 1 .*adapt\.add_sentinels"
    ):
        find_sentinels({"<extra_id_0>": 1, "x<extra_id_1>": 2}, 2)
    with pytest.raises(ValueError, match="0 or more, got -1"):
        find_sentinels({}, -1)
    assert find_sentinels({}, 0) == []
