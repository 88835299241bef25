"""Logits of the backends' steps against whole forward passes without cache or batch."""

import random

import pytest
import torch
from torch import Tensor

from tests.models.tiny import (
    MEETINGS,
    assert_same,
    build,
    differ,
    gemma_stack,
    meeting_id,
    pair_config,
    stack,
)
from twofold.infer.backends import Start, TorchBackend
from twofold.infer.backends.openvino import backend as backend_module
from twofold.infer.backends.openvino import encoder as encoder_module
from twofold.infer.backends.openvino.backend import OpenVinoBackend
from twofold.infer.backends.paged import PagedBackend
from twofold.models import EncoderDecoder

SOURCES = [(5, 6, 7, 8, 9, 10, 11), (), (13, 14, 15), (20,) * 12]
PREFIXES = [(2,), (2, 20, 21), (22, 23, 24, 25, 26), (2,)]
N_NEW = 7
"""With the prefixes beyond the window of 3; rings go around twice."""


def openvino(model: EncoderDecoder) -> OpenVinoBackend:
    """As it is used: some calls by graphs, some by our own kernels."""
    return OpenVinoBackend(model, "float32", threads=1)


def graphs(model: EncoderDecoder) -> OpenVinoBackend:
    """All calls by OpenVINO's graphs."""
    backend = openvino(model)
    backend._n_narrow = 0
    return backend


def narrow(model: EncoderDecoder) -> OpenVinoBackend:
    """All calls by our own kernels."""
    backend = openvino(model)
    backend._n_narrow = 1000
    return backend


def paged(model: EncoderDecoder) -> PagedBackend:
    """Pages so small that every text has several."""
    return PagedBackend(model, page_tokens=4)


every_backend = pytest.mark.parametrize(
    "make",
    [TorchBackend, openvino, graphs, narrow, paged],
    ids=["torch", "openvino", "graphs", "narrow", "paged"],
)


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


@every_backend
@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
def test_steps_equal_whole_forward_passes(make, meeting):
    """Requests of unequal lengths, of which the last ones join later."""
    config = pair_config(gemma_stack(), encoder_mask=("sink", "bidirectional", "causal"), **meeting)
    model = build(config, qk_factor=2.0)
    backend = make(model)
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


@every_backend
@pytest.mark.parametrize("meeting", [MEETINGS[i] for i in (0, 15)], ids=meeting_id)
def test_rows_of_one_source_move_and_leave(make, meeting):
    model = build(pair_config(gemma_stack(), **meeting), qk_factor=2.0)
    backend = make(model)
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


@every_backend
def test_many_rows_of_which_one_after_another_leaves(make):
    """Beyond `decoder._EXACT_TOKENS`, where OpenVINO's calls are filled up with rows that nobody asked for."""
    model = build(pair_config(gemma_stack()), qk_factor=2.0)
    backend = make(model)
    (held, _), (other, _) = backend.start([start(0, n_rows=13), start(2)])
    texts = [[2, 4 + row] for row in range(13)]
    for n_rows in (13, 12, 11, 10, 8):
        held.select(range(n_rows))
        texts = texts[:n_rows]
        others, logits_RV = backend.step([other, held], [[9], [ids[-1] for ids in texts]])
        assert others.isfinite().all()
        for row, ids in enumerate(texts):
            assert_same(logits_RV[row], whole_logits(model, SOURCES[0], ids))
            ids.append((5 * row + len(ids)) % 30 + 3)
    if make is graphs:
        assert list(backend._decoder._bound) == [6, 16, 12]


def test_memory_of_torch_is_what_was_announced():
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


@pytest.mark.parametrize(("precision", "per_value"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_memory_of_openvino_is_what_was_announced(precision, per_value):
    """No rings; in int8 a scale for each token and head."""
    backend = OpenVinoBackend(build(pair_config(stack(), layout="merged")), precision, threads=1)
    for i, n_rows, n_verified in ((0, 1, 0), (1, 2, 0), (2, 5, 0), (3, 1, 4)):
        asked = start(i, n_rows, n_verified)
        (held, _), *_ = backend.start([asked])
        columns = len(asked.source_ids) + n_rows * asked.n_tokens + n_verified
        per_head = 8 * per_value + (4 if precision == "int8" else 0)
        assert held.n_bytes == backend.bytes_needed(asked) == columns * 3 * 2 * 2 * per_head


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


@every_backend
@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
def test_verified_tokens_get_the_logits_of_whole_forward_passes(make, meeting):
    """Runs within and beyond the window of 3 and all around the ring, of which any number is accepted; beside plain
    steps, and beside runs of which nothing is accepted."""
    config = pair_config(gemma_stack(), encoder_mask=("sink", "bidirectional", "causal"), **meeting)
    model = build(config, qk_factor=2.0)
    backend = make(model)
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


@torch.no_grad()
def test_a_failed_step_of_openvino_can_be_repeated(monkeypatch):
    """Keys and values of the failed step lie where the next ones are put."""
    model = build(pair_config(stack()))
    backend = openvino(model)
    (held, _), *_ = backend.start([start(0)])
    backend.step([held], [[5]])
    with monkeypatch.context() as patch:
        patch.setattr(backend_module, "attend", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            backend.step([held], [[7]])
    assert_same(backend.step([held], [[6]])[0][0], whole_logits(model, SOURCES[0], [2, 5, 6]))


@pytest.mark.parametrize("name", ["llama", "qkv_bias", "qwen3", "gemma", "own_projections", "unequal"])
def test_openvino_for_every_kind_of_stack(name):
    """Biases, norms of q and k, activations, projections of the source's own, unequal sides."""
    kinds = {
        "llama": {"layout": "merged"},
        "qkv_bias": {"layout": "merged"},
        "qwen3": {},
        "gemma": {},
        "own_projections": {"layout": "merged", "source_projections": "own"},
        "unequal": {},
    }
    stacks = {
        "qkv_bias": stack(qkv_bias=True, output_bias=True, mlp_bias=True, hidden_activation="gelu"),
        "qwen3": stack(qk_norm=True),
        "gemma": gemma_stack(),
    }
    decoder = stacks.get(name, stack())
    encoder = stack(hidden_size=48, num_hidden_layers=2, layer_types=("full_attention",) * 2)
    reader = encoder if name in ("own_projections", "unequal") else decoder
    model = build(pair_config(reader, decoder, **kinds[name]))
    backend = openvino(model)
    for i in range(4):
        (held, first), *_ = backend.start([start(i)])
        assert_same(first, whole_logits(model, SOURCES[i], list(PREFIXES[i])))
        logits_V = backend.step([held], [[9]])[0][0]
        assert_same(logits_V, whole_logits(model, SOURCES[i], [*PREFIXES[i], 9]))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("share", [0.05, 0.4])
def test_openvino_limits_what_later_tokens_get(softcap, share):
    model = build(pair_config(stack(attn_logit_softcapping=softcap), layout="merged"), qk_factor=2.0)
    free = openvino(model).start([start(0)])[0][1]
    model.set_encoder_mask("sink", future_share=share)
    for group in ([0], [0, 2, 3]):
        for i, (_, first) in zip(group, openvino(model).start([start(i) for i in group]), strict=True):
            # The factor divides by what may be small: rounding is enlarged.
            assert_same(first, whole_logits(model, SOURCES[i], list(PREFIXES[i])), 5e-5)
    assert share > 0.1 or differ(free, first)


def test_long_sources_are_read_by_the_model_itself(monkeypatch):
    model = build(pair_config(gemma_stack()))
    backend = openvino(model)
    graph = backend.start([start(0), start(3)])
    monkeypatch.setattr(encoder_module, "MAX_SCORES", 100)
    monkeypatch.setattr(backend._encoder, "run", lambda *_: 1 / 0)
    for (_, theirs), (_, ours) in zip(graph, backend.start([start(0), start(3)]), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize(("precision", "most"), [("bfloat16", 0.01), ("int8", 0.02), ("int4", 0.2)])
def test_lower_precisions_are_near(precision, most):
    """Relative to the spread of the logits, for weights as models start with."""
    model = EncoderDecoder(pair_config(stack(), layout="merged")).eval()
    model.initialise_randomly(0)
    exact, near = openvino(model), OpenVinoBackend(model, precision, threads=1)
    starts = [start(i) for i in (0, 2, 3)]
    for (held, theirs), (other, ours) in zip(exact.start(starts), near.start(starts), strict=True):
        for tokens in ([[5]], [[9]]):
            error = (ours - theirs).square().mean().sqrt() / theirs.std()
            assert 1e-4 < error < most
            (theirs,), (ours,) = exact.step([held], tokens)[0], near.step([other], tokens)[0]


def test_sources_are_padded_to_few_lengths():
    """OpenVINO remembers every shape; what padding adds is bounded."""
    lengths = [backend_module.padded_length(n) for n in range(1, 4097)]
    assert all(n <= length <= max(n * 9 / 8, n + 7) for n, length in enumerate(lengths, start=1))
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 64 / 8 + 6 * 8
    backend = openvino(build(pair_config(stack(), layout="merged")))
    seen, run = [], backend._encoder.run
    backend._encoder.run = lambda ids, is_real: (
        seen.append((tuple(ids.shape), is_real.sum(1).tolist())) or run(ids, is_real)
    )
    backend.start([start(0), start(3)])
    assert seen == [((2, 16), [7, 12])]
