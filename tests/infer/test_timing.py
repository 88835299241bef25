"""What is counted and when the clock stops; no figure is held to a value."""

import mmap

import pytest
import torch

from tests.models.tiny import build, pair_config, stack
from twofold.infer import Engine, Request, generate
from twofold.infer import timing as timing_module
from twofold.infer.timing import (
    NotAvailableError,
    Timed,
    forget_peak,
    make_engine,
    peak_bytes,
    random_ids,
    request_of,
    resident_bytes,
    time_batch,
)


def test_rows_that_came_earlier_count_for_what_they_have():
    """The third source is encoded a step after the others, which have two tokens each by then."""
    model = build(pair_config(stack()))
    engine = Engine(model, device="cpu", batch_size=3, encode_tokens=12)
    ids = [[5, 6, 7, 8, 9, 10], [6] * 6, [7] * 6]
    timed, answers = time_batch(engine, [request_of(one, model.config, 4) for one in ids])
    assert (timed.n_tokens, timed.n_tokens_at_first) == (12, 2 + 2 + 1)
    assert 0 < timed.first_s < timed.total_s
    expected = generate(model, ids, [[2]] * 3, max_new_tokens=4, stop_token_ids=())
    assert [a.token_ids for (a,) in answers] == [row.token_ids for row in expected]


def test_rates():
    timed = Timed(first_s=1.0, total_s=3.0, n_tokens=20, n_tokens_at_first=4)
    assert timed.decode_tokens_per_s == 8.0
    assert Timed(first_s=1.0, total_s=1.0, n_tokens=4, n_tokens_at_first=4).decode_tokens_per_s is None
    model = build(pair_config(stack()))
    only_first, _ = time_batch(Engine(model, device="cpu"), [request_of([5, 6], model.config, 1)])
    assert only_first.decode_tokens_per_s is None


def test_requests_follow_the_convention_and_never_end_early():
    config = pair_config(stack(), decoder_start="last_source_token", source_bos=True)
    request = request_of([5, 6, 7], config, 9, num_beams=2)
    assert (request.source_ids, request.prefix_ids) == ([2, 5, 6], [7])
    assert (request.max_new_tokens, request.stop_token_ids, request.num_beams) == (9, (), 2)


def test_random_sources():
    ids = random_ids(40, 3, 50, seed=1)
    assert [len(row) for row in ids] == [50] * 3
    assert min(map(min, ids)) >= 16
    assert max(map(max, ids)) < 40
    assert ids == random_ids(40, 3, 50, seed=1) != random_ids(40, 3, 50, seed=2)


def test_engines():
    model = build(pair_config(stack()))
    engine = make_engine(model, backend="torch", precision="bfloat16", batch_size=3, threads=1)
    assert engine.batch_size == 3
    assert model.lm_head.out_proj.weight.dtype == torch.bfloat16


def test_what_cannot_be_had_is_not_available(monkeypatch):
    model = build(pair_config(stack()))
    with pytest.raises(
        NotAvailableError, match=r"backend='torch' with precision='int8' .* float32 and bfloat16"
    ):
        make_engine(model, backend="torch", precision="int8")

    def missing(model, **settings):
        raise ImportError("pip install openvino")

    monkeypatch.setattr(timing_module, "Engine", missing)
    with pytest.raises(NotAvailableError, match=r"'openvino'.*pip install openvino"):
        make_engine(model, backend="openvino")


def test_peak_memory_begins_anew():
    if resident_bytes() is None:
        pytest.skip("only Linux tells")
    size, part = 200_000_000, 1_000_000
    forget_peak()  # of earlier tests, which may have had more
    before = peak_bytes()
    with mmap.mmap(-1, size) as block:  # given back for certain, which an allocator may not do
        for _ in range(size // part):
            block.write(b"\1" * part)  # memory that was never written to takes none
        high = peak_bytes()
    assert high >= before + size // 2
    assert high >= size
    forget_peak()
    assert peak_bytes() < high - size // 2


def test_beams_report_their_tokens():
    model = build(pair_config(stack()))
    request = request_of([5, 6, 7], model.config, 4, num_beams=2)
    timed, answers = time_batch(Engine(model, device="cpu"), [request])
    assert len(answers[0][0].token_ids) == 4
    assert timed.n_tokens == 4
    assert isinstance(request, Request)
