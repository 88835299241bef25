import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models.tiny import (
    MEETINGS,
    assert_same,
    build,
    differ,
    gemma_stack,
    pair_config,
    random_ids,
    stack,
)
from twofold.models import DecoderCache
from twofold.models.attention import Attention, Backend, _choose_backend, attend, attend_everything
from twofold.models.cache import KeyValues
from twofold.models.layers import rope_tables, rotate
from twofold.models.masks import AttentionMask, Rule, Tokens


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None,
    is_later: Tensor | None = None,
    share: float = 1.0,
) -> Tensor:
    """One score at a time, in float64. `is_later` [B, T, S]: keys that together get at most `share` of a query."""
    n_batch, n_heads, n_queries, head_dim = q.shape
    n_groups = n_heads // k.shape[1]
    out = torch.zeros_like(q)
    for b in range(n_batch):
        for n in range(n_heads):
            keys, values = k[b, n // n_groups].double(), v[b, n // n_groups].double()
            for t in range(n_queries):
                weights = []
                for s in range(len(keys)):
                    score = scale * sum(
                        x * y for x, y in zip(q[b, n, t].tolist(), keys[s].tolist(), strict=True)
                    )
                    if softcap is not None:
                        score = softcap * math.tanh(score / softcap)
                    weights.append(math.exp(score) if visible[b, t, s] else 0.0)
                if is_later is not None:
                    after = is_later[b, t].tolist()
                    later = sum(w for w, a in zip(weights, after, strict=True) if a)
                    earlier = sum(weights) - later
                    if later > share * (later + earlier):  # the odds of a share are share : 1 - share
                        down = share / (1 - share) * earlier / later
                        weights = [w * down if a else w for w, a in zip(weights, after, strict=True)]
                total = sum(weights)
                row = torch.zeros(head_dim, dtype=torch.float64)
                for weight, value in zip(weights, values, strict=True):
                    row += value * weight / total if total else 0.0
                out[b, n, t] = row
    return out


def qkv(n_queries: int, n_keys: int, *, n_heads: int = 4, n_kv_heads: int = 2, seed: int = 0) -> list[Tensor]:
    """Scores of order 10 before scaling."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, n_heads, n_queries, 8), (2, n_kv_heads, n_keys, 8), (2, n_kv_heads, n_keys, 8)]
    return [2 * torch.randn(shape, generator=generator) for shape in shapes]


def holey_mask() -> AttentionMask:
    """Two rows of 5 queries over 3 source and 5 own keys; in row 1 queries 0, 1 and 4 see nothing."""
    source = Tokens.from_segments(torch.tensor([[1, 1, 1], [0, 0, 0]]))
    own = Tokens.from_segments(torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0]]))
    return AttentionMask(own, (source, Rule()), (own, Rule(past=1, future=0)))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_eager_against_a_naive_loop(softcap: float | None, n_kv_heads: int) -> None:
    q, k, v = qkv(5, 8, n_kv_heads=n_kv_heads)
    mask = holey_mask()
    out = attend(q, k, v, mask, scale=0.4, softcap=softcap, backend="eager")
    assert_same(out, naive(q, k, v, mask.dense, 0.4, softcap), 1e-6)
    uncapped = attend(q, k, v, mask, scale=0.4, backend="eager")
    assert (softcap is not None) == differ(out, uncapped)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("backend", "softcap"),
    [("eager", None), ("eager", 2.0), ("sdpa", None), ("flex", None), ("flex", 2.0), ("segments", None),
     ("segments", 2.0)],
)  # fmt: skip
@pytest.mark.parametrize("share", [0.6, 0.05])
def test_later_keys_get_no_more_than_a_share(backend: Backend, softcap: float | None, share: float) -> None:
    """Against the naive loop; two segments and padding in the first row, other places in the second."""
    ids = torch.tensor([[1, 1, 1, 2, 2, 0], [0, 1, 1, 1, 1, 1]])
    tokens = Tokens.from_segments(ids)
    mask = AttentionMask(tokens, (tokens, Rule(sink=True, future_share=share)))
    index = torch.arange(6)
    is_later = (index[None, :] > index[:, None]).expand(2, 6, 6)
    visible = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] > 0)
    for row, first in ((0, 0), (0, 3), (1, 1)):
        visible[row, first, first + 1 :] = False
    q, k, v = qkv(6, 6)
    with torch.no_grad():
        out = attend(q, k, v, mask, scale=0.4, softcap=softcap, backend=backend)
    assert_same(out, naive(q, k, v, visible, 0.4, softcap, is_later, share), 2e-6)
    assert differ(out, naive(q, k, v, visible, 0.4, softcap))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex", "segments"])
def test_queries_that_see_later_keys_only_are_not_limited(backend: Backend) -> None:
    queries = Tokens.from_segments(torch.ones(2, 3, dtype=torch.int64))
    keys = queries.continued_after(queries)
    q, k, v = qkv(3, 3)
    limited, free = (AttentionMask(queries, (keys, Rule(future_share=share))) for share in (0.3, 1.0))
    with torch.no_grad():
        wanted = attend(q, k, v, free, scale=0.4, backend="eager")
        assert_same(attend(q, k, v, limited, scale=0.4, backend=backend), wanted, 1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex", "segments"])
def test_a_query_without_keys_gives_zeros(backend: Backend) -> None:
    """Rule R16."""
    q, k, v = qkv(5, 8)
    with torch.no_grad():
        out = attend(q, k, v, holey_mask(), scale=0.4, backend=backend)
    for query in (0, 1, 4):
        assert torch.equal(out[1, :, query], torch.zeros(4, 8))
    assert (out[1, :, 2:4].abs().amax(-1) > 0).all()
    assert (out[0].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("backend", ["eager", "sdpa", "segments"])
def test_gradients_are_finite_beside_empty_rows(backend: Backend) -> None:
    leaves = [t.requires_grad_() for t in qkv(5, 8)]
    attend(*leaves, holey_mask(), scale=0.4, backend=backend).square().sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
    q, k, _ = leaves
    assert q.grad is not None
    assert k.grad is not None
    assert q.grad[1, :, [0, 1, 4]].abs().max() == 0
    assert k.grad[1, :, :5].abs().max() == 0  # the source and the padding of row 1


RULES = st.builds(
    Rule,
    past=st.none() | st.integers(0, 3),
    future=st.none() | st.integers(0, 3),
    sink=st.booleans(),
)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_backends_agree_on_random_masks(data: st.DataObject) -> None:
    rows = st.lists(st.integers(0, 2), min_size=6, max_size=6).map(sorted)
    shift = data.draw(st.integers(0, 5))

    def tokens() -> Tokens:
        ids = torch.tensor([data.draw(rows), data.draw(rows)]).roll(shift, dims=1)
        return Tokens.from_segments(torch.where(ids.cummax(1).values == ids, ids, 0))

    own, source = tokens(), tokens()
    share = data.draw(st.sampled_from([1.0, 0.5, 0.01]))
    rules = [dataclasses.replace(data.draw(RULES), future_share=share) for _ in range(2)]
    mask = AttentionMask(own, (source, rules[0]), (own, rules[1]))
    q, k, v = qkv(6, 12, seed=data.draw(st.integers(0, 99)))
    with torch.no_grad():
        eager = attend(q, k, v, mask, scale=0.4, backend="eager")
        assert_same(attend(q, k, v, mask, scale=0.4, backend="sdpa"), eager, 1e-6)
        assert_same(attend(q, k, v, mask, scale=0.4, backend="flex"), eager, 1e-6)
        capped = attend(q, k, v, mask, scale=0.4, softcap=2.0, backend="eager")
        assert_same(attend(q, k, v, mask, scale=0.4, softcap=2.0, backend="flex"), capped, 1e-6)


@pytest.mark.parametrize(
    "rule", [Rule(), Rule(future=0), Rule(past=2, future=0)], ids=["open", "causal", "window"]
)
@pytest.mark.parametrize("is_plain", [True, False])
def test_sdpa_shortcuts_equal_eager(rule: Rule, is_plain: bool) -> None:
    tokens = Tokens.from_segments(torch.ones(2, 6, dtype=torch.int64), is_plain=is_plain)
    mask = AttentionMask(tokens, (tokens, rule))
    q, k, v = qkv(6, 6)
    wanted = naive(q, k, v, mask.dense, 0.4, None)
    assert_same(attend(q, k, v, mask, scale=0.4, backend="sdpa"), wanted, 1e-6)


def test_eager_softmax_is_float32() -> None:
    """With bfloat16 inputs the result stays near the exact one: scores are not rounded before the softmax."""
    q, k, v = (t.to(torch.bfloat16) for t in qkv(5, 8))
    mask = holey_mask()
    out = attend(q, k, v, mask, scale=0.4, softcap=2.0, backend="eager")
    assert out.dtype == torch.bfloat16
    assert_same(out.float(), naive(q.float(), k.float(), v.float(), mask.dense, 0.4, 2.0), 2e-2)


def test_dropout_drops_weights_in_eager_and_sdpa() -> None:
    q, k, _ = qkv(5, 8)
    ones = torch.ones(2, 2, 8, 8)
    mask = holey_mask()
    for backend in ("eager", "sdpa"):
        torch.manual_seed(0)
        out = attend(q, k, ones, mask, scale=0.1, dropout_p=0.5, backend=backend)  # type: ignore[arg-type]
        # A row of weights sums to 1; with half of them dropped and the rest doubled it does no more.
        assert differ(out[0], torch.ones(4, 5, 8))


def test_what_a_backend_cannot_do_is_refused() -> None:
    q, k, v = qkv(5, 8)
    mask = holey_mask()
    with pytest.raises(
        ValueError, match=r"'sdpa' has no soft-cap, and this model caps scores at 50.0; use 'eager'"
    ):
        attend(q, k, v, mask, scale=1.0, softcap=50.0, backend="sdpa")
    with pytest.raises(ValueError, match=r"'flex' has no dropout, got 0.1"):
        attend(q, k, v, mask, scale=1.0, dropout_p=0.1, backend="flex")
    with pytest.raises(ValueError, match=r"'segments' has no dropout, got 0.1"):
        attend(q, k, v, mask, scale=1.0, dropout_p=0.1, backend="segments")
    with pytest.raises(
        ValueError, match="'segments' is made for the CPU, got tensors on meta; use 'auto' or"
    ):
        attend(*(x.to("meta") for x in (q, k, v)), mask, scale=1.0, backend="segments")
    for leaf in (q, k, v):
        leaf.requires_grad_()
        with pytest.raises(ValueError, match="'flex' has no gradient on CPU; use 'segments' or 'eager'"):
            attend(q, k, v, mask, scale=1.0, backend="flex")
        leaf.requires_grad_(False)
    with pytest.raises(
        ValueError, match="unknown attention backend 'flash'; use one of auto, eager, sdpa, flex, segments"
    ):
        attend(q, k, v, mask, scale=1.0, backend="flash")  # type: ignore[arg-type]


def test_auto_keeps_the_soft_cap_and_trains() -> None:
    """D1: never a silent drop."""
    q, k, v = (t.requires_grad_() for t in qkv(5, 8))
    mask = holey_mask()
    for softcap in (None, 2.0):
        auto = attend(q, k, v, mask, scale=0.4, softcap=softcap)
        assert_same(auto, attend(q, k, v, mask, scale=0.4, softcap=softcap, backend="eager"), 1e-6)
        auto.sum().backward()


@pytest.mark.parametrize(
    ("device", "n_queries", "is_plain", "softcap", "dropout_p", "chosen"),
    [
        ("cpu", 100, False, None, 0.0, "segments"),
        ("cpu", 100, False, 2.0, 0.0, "segments"),
        ("cpu", 100, True, None, 0.0, "sdpa"),
        ("cpu", 100, True, 2.0, 0.0, "segments"),
        ("cpu", 1, False, None, 0.0, "sdpa"),
        ("cpu", 1, True, 2.0, 0.0, "eager"),
        ("cpu", 100, False, None, 0.1, "sdpa"),
        ("cpu", 100, False, 2.0, 0.1, "eager"),
        ("cuda", 200, False, None, 0.0, "flex"),
        ("cuda", 200, False, 2.0, 0.0, "flex"),
        ("cuda", 200, True, None, 0.0, "sdpa"),
        ("cuda", 1, False, None, 0.0, "sdpa"),
        ("cuda", 1, False, 2.0, 0.0, "flex"),
        ("cuda", 200, False, 2.0, 0.1, "eager"),
        ("meta", 200, False, 2.0, 0.0, "eager"),
        ("meta", 200, False, None, 0.0, "sdpa"),
    ],
)
def test_what_auto_chooses(
    device: str, n_queries: int, is_plain: bool, softcap: float | None, dropout_p: float, chosen: str
) -> None:
    class Queries:
        shape = (1, 4, n_queries, 8)

    Queries.device = torch.device(device)  # type: ignore[attr-defined]
    tokens = Tokens.from_segments(torch.ones(1, n_queries, dtype=torch.int64), is_plain=is_plain)
    for rule in (Rule(), Rule(future=0)):
        mask = AttentionMask(tokens, (tokens, rule))
        assert _choose_backend(Queries(), mask, softcap, dropout_p) == chosen  # type: ignore[arg-type]


def test_compiled_flex_is_not_compiled_anew_for_new_masks() -> None:
    """Dynamo's part alone: one graph serves other segments, other rules' numbers and other lengths.

    (A first call whose number of blocks happens to be that of the heads would be compiled once more.)
    """
    from torch.nn.attention.flex_attention import flex_attention

    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled: Any = torch.compile(flex_attention, dynamic=True, backend=count)
    for n_queries, n_keys, window in ((300, 500, 5), (300, 500, 7), (420, 290, 5), (513, 700, 9)):
        generator = torch.Generator().manual_seed(n_queries + window)
        own, source = (
            Tokens.from_segments((torch.rand(2, n, generator=generator) < 0.1).cumsum(1))
            for n in (n_queries, n_keys)
        )
        mask = AttentionMask(own, (source, Rule()), (own, Rule(past=window, future=0)))
        q, k, v = qkv(n_queries, n_keys + n_queries)
        with torch.no_grad():
            found = compiled(q, k, v, block_mask=mask.block_mask, scale=0.4, enable_gqa=True)
            assert_same(found, attend(q, k, v, mask, scale=0.4, backend="eager"), 2e-6)
    assert graphs == 1


@pytest.mark.slow
def test_compiled_flex_reads_the_block_lists() -> None:
    """The uncompiled form looks at `mask_mod` alone; a kernel skips empty blocks and takes full ones unasked.

    Static shapes: for dynamic ones torch 2.13 writes C++ that does not compile on CPU.
    """
    from torch.nn.attention.flex_attention import flex_attention

    ids = torch.tensor([[1] * 300 + [2] * 90 + [0] * 10, [0] * 5 + [1] * 100 + [2] * 295])
    own = Tokens.from_segments(ids)
    mask = AttentionMask(own, (own, Rule()), (own, Rule(past=200, future=0)))
    is_empty, is_full = mask.block_kinds(128)
    assert is_empty.any()
    assert is_full.any()
    q, k, v = qkv(400, 800)
    with torch.no_grad():
        found: Any = torch.compile(flex_attention, dynamic=False)(
            q, k, v, block_mask=mask.block_mask, scale=0.4, enable_gqa=True
        )
        assert_same(found, attend(q, k, v, mask, scale=0.4, backend="eager"), 2e-6)


# The module around it.


def test_queries_and_keys_are_normed_before_they_are_rotated() -> None:
    torch.manual_seed(0)
    module = Attention(gemma_stack(), memory_size=20)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    rope = rope_tables(gemma_stack().rope["full_attention"], 8, torch.arange(5)[None])
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 5, 20)
    q = (x @ module.q_proj.weight.T).view(2, 5, 4, 8).transpose(1, 2)
    k = (memory @ module.k_proj.weight.T).view(2, 5, 2, 8).transpose(1, 2)
    v = (memory @ module.v_proj.weight.T).view(2, 5, 2, 8).transpose(1, 2)

    def norm(t: Tensor, weight: Tensor) -> Tensor:
        return t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight)

    q, k = norm(q, module.q_norm.weight), norm(k, module.k_norm.weight)  # type: ignore[union-attr]
    assert_same(module.queries(x, None), q, 1e-6)
    assert_same(module.queries(x, rope), rotate(q, rope), 1e-6)
    plain, rotated = module.keys_values(memory, None), module.keys_values(memory, rope)
    assert_same(plain.keys, k, 1e-6)
    assert_same(rotated.keys, rotate(k, rope), 1e-6)
    assert torch.equal(plain.values, rotated.values)
    assert_same(plain.values, v, 1e-6)


def test_scale_is_read_from_the_config() -> None:
    assert Attention(stack(query_pre_attn_scalar=16), 32).scale == 0.25


def test_biases_follow_the_config() -> None:
    def biases(**changes: Any) -> set[str]:
        names = {name for name, _ in Attention(stack(**changes), 32).named_parameters()}
        return {name for name in names if name.endswith("bias")}

    assert biases() == set()
    assert biases(qkv_bias=True) == {"q_proj.bias", "k_proj.bias", "v_proj.bias"}
    assert biases(output_bias=True) == {"o_proj.bias"}


def test_attention_dropout_is_for_training_only() -> None:
    config = pair_config(stack(attention_dropout=0.5))
    model = build(config)
    source, target = random_ids(1, 6), random_ids(1, 5, seed=1)
    with torch.no_grad():
        first = model(source, decoder_input_ids=target).logits
        assert torch.equal(first, model(source, decoder_input_ids=target).logits)
        model.train()
        torch.manual_seed(0)
        assert differ(first, model(source, decoder_input_ids=target).logits)


# The whole model.


def test_backend_reaches_every_module() -> None:
    """D17."""
    for layout, per_decoder_layer in (("separate", 2), ("merged", 1)):
        model = build(pair_config(stack(), layout=layout))
        attentions = [m for m in model.modules() if isinstance(m, Attention)]
        assert len(attentions) == 3 + 3 * per_decoder_layer
        assert {m.backend for m in attentions} == {"auto"}
        model.set_attention_backend("eager")
        assert {m.backend for m in attentions} == {"eager"}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("layout", ["separate", "merged"])
@torch.no_grad()
def test_backends_agree_beyond_the_window(layout: str) -> None:
    """D1, D2: source and target longer than windows of 3, scores beyond the cap."""
    for config, backends in (
        (gemma_stack(), ("auto", "flex", "segments")),
        (stack(), ("auto", "sdpa", "flex", "segments")),
    ):
        model = build(
            pair_config(config, layout=layout), qk_factor=3.0 if config.attn_logit_softcapping else 1.0
        )
        source, target = random_ids(2, 11), random_ids(2, 9, seed=1)
        source[1, 7:] = 0

        def run(
            model: Any = model, source: Tensor = source, target: Tensor = target
        ) -> tuple[Tensor, Tensor]:
            whole = model(source, decoder_input_ids=target).logits
            cache, encoded = DecoderCache(), model.encode(source)
            steps = [
                model(decoder_input_ids=piece, encoder_output=encoded, cache=cache).logits
                for piece in target.split([5, 1, 1, 1, 1], dim=1)
            ]
            return whole, torch.cat(steps, dim=1)

        model.set_attention_backend("eager")
        eager, _ = run()
        for backend in backends:
            model.set_attention_backend(backend)
            for logits in run():
                assert_same(logits, eager)


def test_sdpa_refuses_a_model_with_a_cap_and_takes_one_without() -> None:
    model = build(pair_config(gemma_stack(), **MEETINGS[0]))
    model.set_attention_backend("sdpa")
    with pytest.raises(ValueError, match="'sdpa' has no soft-cap"):
        model.encode(random_ids(1, 4))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("lengths", [(5, 3), (0, 4), (6, 0), (4,), (0,)])
@pytest.mark.parametrize("shared", [True, False])
def test_a_decoding_step_equals_eager_over_all_keys_in_a_row(
    softcap: float | None, lengths: tuple[int, ...], shared: bool
) -> None:
    """The first part belongs to all rows (a source) or, not shared, to each its own."""
    generator = torch.Generator().manual_seed(0)
    q_BNTH = 3 * torch.randn(3, 4, 1, 8, generator=generator)
    parts, whole = [], []
    for i, n_keys in enumerate(lengths):
        n_rows = 1 if shared and i == 0 else 3
        part = KeyValues(*torch.randn(2, n_rows, 2, n_keys, 8, generator=generator))
        parts.append(part)
        whole.append(KeyValues(*(x.expand(3, -1, -1, -1) for x in part)))
    keys, values = (torch.cat(x, dim=2) for x in zip(*whole, strict=True))
    ones = Tokens.from_segments(torch.ones(3, keys.shape[2], dtype=torch.int64))
    mask = AttentionMask(Tokens.from_segments(torch.ones(3, 1, dtype=torch.int64)), (ones, Rule()))
    expected = attend(q_BNTH, keys, values, mask, scale=0.7, softcap=softcap, backend="eager")
    found = attend_everything(q_BNTH[:, :, 0], *parts, scale=0.7, softcap=softcap)
    assert_same(found, expected[:, :, 0])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_decoding_step_may_hide_keys(softcap: float | None) -> None:
    """Queries that share all keys, each under a mask of its own over the parts in a row."""
    generator = torch.Generator().manual_seed(0)
    q_BNTH = 3 * torch.randn(3, 4, 1, 8, generator=generator)
    parts = [KeyValues(*torch.randn(2, 1, 2, n_keys, 8, generator=generator)) for n_keys in (5, 0, 3)]
    hidden_BS = torch.rand(3, 8, generator=generator) < 0.5
    hidden_BS[0, :7], hidden_BS[1] = True, False
    hidden_BS[:, 7] = False
    keys, values = (torch.cat(x, dim=2).expand(3, -1, -1, -1) for x in zip(*parts, strict=True))
    expected = naive(q_BNTH, keys, values, ~hidden_BS[:, None], 0.7, softcap)
    found = attend_everything(q_BNTH[:, :, 0], *parts, scale=0.7, softcap=softcap, hidden_BS=hidden_BS)
    assert_same(found, expected[:, :, 0])
