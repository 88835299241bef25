"""Logits of the backend's steps against whole forward passes without cache or batch."""

import random

import pytest
import torch
from torch import Tensor

from tests.models.tiny import MEETINGS, assert_same, build, gemma_stack, meeting_id, pair_config, stack
from twofold.infer.backends import Start, TorchBackend
from twofold.models import EncoderDecoder

SOURCES = [(5, 6, 7, 8, 9, 10, 11), (), (13, 14, 15), (20,) * 12]
PREFIXES = [(2,), (2, 20, 21), (22, 23, 24, 25, 26), (2,)]
N_NEW = 7
"""With the prefixes beyond the window of 3; rings go around twice."""


@torch.no_grad()
def whole_logits(model: EncoderDecoder, source: tuple[int, ...], ids: list[int]) -> Tensor:
    """[V] after the last of `ids`."""
    source_ids = torch.tensor([source or (0,)], dtype=torch.int64)
    mask = torch.ones_like(source_ids).bool() if source else torch.zeros_like(source_ids).bool()
    return model(source_ids, mask, torch.tensor([ids])).logits[0, -1]


def start(i: int, n_rows: int = 1, n_verified: int = 0, n_new: int = N_NEW) -> Start:
    return Start(
        source_ids=SOURCES[i],
        prefix_ids=PREFIXES[i],
        n_rows=n_rows,
        n_tokens=len(PREFIXES[i]) + n_new - 1,
        n_verified=n_verified,
    )


@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
def test_steps_equal_whole_forward_passes(meeting):
    """Requests of unequal lengths, of which the last ones join later."""
    config = pair_config(gemma_stack(), encoder_mask=("sink", "bidirectional", "causal"), **meeting)
    model = build(config, qk_factor=2.0)
    backend = TorchBackend(model)
    running: dict[int, tuple] = {}
    logits: dict[int, Tensor] = {}
    written: dict[int, list[int]] = {}
    for step in range(N_NEW + 2):
        joining = {0: (0, 1), 2: (2, 3)}.get(step, ())
        for i, (held, first) in zip(
            joining, backend.start([start(i) for i in joining]) if joining else (), strict=True
        ):
            running[i], logits[i], written[i] = held, first, list(PREFIXES[i])
        for i in written:
            if len(written[i]) < len(PREFIXES[i]) + N_NEW:
                assert_same(logits[i], whole_logits(model, SOURCES[i], written[i]))
                written[i].append((7 * step + 3 * i) % 37 + 3)
        going = [i for i in written if len(written[i]) < len(PREFIXES[i]) + N_NEW]
        found = backend.step([running[i] for i in going], [[written[i][-1]] for i in going]) if going else []
        logits.update((i, logits_RV[0]) for i, logits_RV in zip(going, found, strict=True))
    assert sorted(len(ids) - len(PREFIXES[i]) for i, ids in written.items()) == [N_NEW] * 4


@pytest.mark.parametrize("meeting", [MEETINGS[i] for i in (0, 15)], ids=meeting_id)
def test_rows_of_one_source_move_and_leave(meeting):
    model = build(pair_config(gemma_stack(), **meeting), qk_factor=2.0)
    backend = TorchBackend(model)
    (held, first), (other, _) = backend.start([start(0, n_rows=3), start(2)])
    assert_same(first, whole_logits(model, SOURCES[0], list(PREFIXES[0])))
    texts = [[2], [2], [2]]
    for parents in ([0, 1, 2], [2, 0, 0], [1, 1, 2], [2, 0], [0, 1], [1]):
        held.select(parents)
        texts = [[*texts[parent], 5 + 3 * row + len(texts[parent])] for row, parent in enumerate(parents)]
        logits_RV = backend.step([other, held], [[9], [ids[-1] for ids in texts]])[1]
        assert held.n_rows == len(texts)
        for row, ids in enumerate(texts):
            assert_same(logits_RV[row], whole_logits(model, SOURCES[0], ids))


def test_memory_is_what_was_announced():
    """Sliding layers hold no more than the window of 3; the source lies there once, whatever the rows."""
    backend = TorchBackend(build(pair_config(stack(), layout="merged")))
    for i, n_rows in ((0, 1), (1, 2), (2, 5), (3, 3)):
        asked = start(i, n_rows)
        (held, _), *_ = backend.start([asked])
        n_source, n_own = len(asked.source_ids), asked.n_tokens
        values = 3 * n_source + n_rows * (n_own + min(3, n_own) + n_own)
        assert held.n_bytes == backend.bytes_needed(asked) == values * 2 * 2 * 8 * 4
    guessing = start(0, n_verified=5)
    (held, _), *_ = backend.start([guessing])
    assert held.n_bytes == backend.bytes_needed(guessing)
    assert held.n_bytes - backend.bytes_needed(start(0)) == 3 * 5 * 2 * 2 * 8 * 4


def test_a_failed_step_can_be_repeated(monkeypatch):
    model = build(pair_config(stack()))
    backend = TorchBackend(model)
    (held, _), *_ = backend.start([start(0)])
    backend.step([held], [[5]])
    with monkeypatch.context() as patch:
        patch.setattr(model.lm_head, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            backend.step([held], [[6]])
    assert_same(backend.step([held], [[6]])[0][0], whole_logits(model, SOURCES[0], [2, 5, 6]))


@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
def test_verified_tokens_get_the_logits_of_whole_forward_passes(meeting):
    """Runs within and beyond the window of 3 and all around the ring, of which any number is accepted; beside plain
    steps, and beside runs of which nothing is accepted."""
    config = pair_config(gemma_stack(), encoder_mask=("sink", "bidirectional", "causal"), **meeting)
    model = build(config, qk_factor=2.0)
    backend = TorchBackend(model)
    rng = random.Random(meeting_id(meeting))
    for i in range(4):
        (held, first), *_ = backend.start([start(i, n_verified=6, n_new=20)])
        assert_same(first, whole_logits(model, SOURCES[i], list(PREFIXES[i])))
        ids = list(PREFIXES[i])
        while (n_left := len(PREFIXES[i]) + 19 - len(ids)) > 0:
            tokens = [rng.randrange(3, 40) for _ in range(rng.randrange(1, min(n_left, 6) + 1))]
            logits_TV = backend.verify(held, tokens)
            for n in range(1, len(tokens) + 1):
                assert_same(logits_TV[n - 1], whole_logits(model, SOURCES[i], [*ids, *tokens[:n]]))
            if rng.random() < 0.3:
                tokens = [rng.randrange(3, 40)]
                logits_V = backend.step([held], [tokens])[0][0]
                assert_same(logits_V, whole_logits(model, SOURCES[i], [*ids, *tokens]))
                ids += tokens
            elif rng.random() < 0.8:
                n_right = rng.randrange(1, len(tokens) + 1)
                held.accept(n_right)
                ids += tokens[:n_right]


def test_a_failed_verification_can_be_repeated(monkeypatch):
    model = build(pair_config(stack()))
    backend = TorchBackend(model)
    (held, _), *_ = backend.start([start(0, n_verified=3)])
    with monkeypatch.context() as patch:
        patch.setattr(model.lm_head, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            backend.verify(held, [5, 6, 7])
    found = backend.verify(held, [8, 9])
    assert_same(found[0], whole_logits(model, SOURCES[0], [2, 8]))
    assert_same(found[1], whole_logits(model, SOURCES[0], [2, 8, 9]))
