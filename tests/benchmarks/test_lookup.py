"""What the lookup benchmark counts, and how it compares."""

from pathlib import Path

import pytest

from twofold.infer import Engine

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_counts_are_those_of_one_answer(text_model):
    from lookup import TimedBackend, answer

    engine = Engine(text_model(tie_word_embeddings="none", layout="separate", reads="final"), device="cpu")
    backend = engine.loop.backend = TimedBackend(engine.model)
    expected, plain = answer(engine, backend, "aaaa", n_new=40, lookup=0)
    found, guessing = answer(engine, backend, "aaaa", n_new=40, lookup=8)
    assert found == expected
    assert (plain.tokens, plain.steps, plain.verifications, plain.guessed) == (39, 39, 0, 0)
    assert guessing.tokens == 39
    assert 0 < guessing.verifications < guessing.steps < 39
    assert guessing.verifications <= guessing.guessed <= 8 * guessing.verifications
    assert min(plain.encode_s, plain.decode_s, guessing.decode_s) > 0


def test_speeds_are_compared_by_tokens():
    from lookup import Counts, compared

    plain = Counts(tokens=20, steps=20, encode_s=1.0, decode_s=4.0) + Counts(
        tokens=20, steps=20, decode_s=4.0
    )
    guessing = Counts(tokens=30, steps=10, verifications=5, guessed=40, encode_s=1.0, decode_s=2.0)
    assert compared(plain, guessing) == {
        "decode_speedup": 3.0,
        "total_speedup": pytest.approx(10 / (40 / 9)),
        "tokens_per_step": 3.0,
        "right_per_verification": 4.0,
        "right_share_of_guessed": 0.5,
        "plain_decode_tokens_per_s": 5.0,
        "decode_tokens_per_s": 15.0,
    }
