import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.models.tiny import assert_same
from twofold.models import masks, segments
from twofold.models.attention import attend
from twofold.models.masks import AttentionMask, Rule, Tokens


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """Blocks so small that a dozen tokens fill several."""
    kept = masks._RUN_BLOCK, segments._SCORES_AT_ONCE
    masks._RUN_BLOCK, segments._SCORES_AT_ONCE = 3, 20
    try:
        yield
    finally:  # hypothesis ends an example that it gives up on with an exception
        masks._RUN_BLOCK, segments._SCORES_AT_ONCE = kept


def qkv(
    mask: AttentionMask, *, n_heads: int = 4, n_kv_heads: int = 2, head_dim: int = 8, seed: int = 0
) -> list[Tensor]:
    """Scores of order 3 with the scale of `both`; laid out as projections leave them."""
    n_batch, n_queries, n_keys = mask.dense.shape
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n_queries, n_heads), (n_keys, n_kv_heads), (n_keys, n_kv_heads)]
    return [
        torch.randn(n_batch, length, heads, head_dim, generator=generator).transpose(1, 2).requires_grad_()
        for length, heads in shapes
    ]


def both(mask: AttentionMask, softcap: float | None, *, tolerance: float = 2e-6, **shapes: int) -> None:
    """Result and gradients of `segments` equal those of `eager`."""
    leaves = qkv(mask, **shapes)
    scale = 3 * leaves[0].shape[-1] ** -0.5
    results = []
    for backend in ("segments", "eager"):
        out = attend(*leaves, mask, scale=scale, softcap=softcap, backend=backend)  # type: ignore[arg-type]
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        # A result that depends on nothing (no query sees a key) may have no gradient at all.
        gradients = torch.autograd.grad((out * weights).sum(), leaves, materialize_grads=True)
        results.append((out.detach(), *gradients))
    for ours, eager in zip(*results, strict=True):
        assert_same(ours, eager, tolerance)


def tokens(*rows: list[int]) -> Tokens:
    return Tokens.from_segments(torch.tensor(rows))


PACKED = tokens([1] * 7 + [2] * 2 + [3] * 5 + [0] * 2, [0] * 3 + [1] * 4 + [0] * 2 + [1] * 2 + [2] * 5)
"""Two rows of 16: packed and padded on the right; padded on the left, and with a hole in segment 1."""
ALIKE = tokens([1] * 9, [1] * 9)
SOURCE = tokens([1] * 3 + [2] * 6 + [0] * 3, [2] * 12)
"""12 tokens: no segment 3 in the first row, no segment 1 in the second."""

MASKS = {
    "bidirectional": AttentionMask(PACKED, (PACKED, Rule())),
    "causal": AttentionMask(PACKED, (PACKED, Rule(future=0))),
    "sink": AttentionMask(PACKED, (PACKED, Rule(sink=True))),
    "window each side": AttentionMask(PACKED, (PACKED, Rule(past=2, future=2))),
    "window total": AttentionMask(PACKED, (PACKED, Rule(past=1, future=2, sink=True))),
    "causal window": AttentionMask(PACKED, (PACKED, Rule(past=2, future=0))),
    "cross": AttentionMask(PACKED, (SOURCE, Rule())),
    "merged": AttentionMask(PACKED, (SOURCE, Rule()), (PACKED, Rule(past=4, future=0))),
    "continuing": AttentionMask(
        PACKED.continued_after(SOURCE),
        (SOURCE, Rule(past=4)),
        (PACKED.continued_after(SOURCE), Rule(past=4, future=0)),
    ),
    "window beyond the source": AttentionMask(PACKED.continued_after(SOURCE), (SOURCE, Rule(past=3))),
    "rows alike": AttentionMask(ALIKE, (ALIKE, Rule())),
    "rows alike, causal": AttentionMask(ALIKE, (ALIKE, Rule(future=0))),
    "rows alike, last queries": AttentionMask(ALIKE.last(4), (ALIKE, Rule(past=5, future=0))),
    "limited": AttentionMask(PACKED, (PACKED, Rule(future_share=0.1))),
    "limited window with a sink": AttentionMask(
        PACKED, (PACKED, Rule(past=1, future=2, sink=True, future_share=0.3))
    ),
    "rows alike, limited": AttentionMask(ALIKE, (ALIKE, Rule(sink=True, future_share=0.01))),
    "nothing": AttentionMask(ALIKE, (tokens([2] * 9, [0] * 9), Rule())),
}


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("block", ["small", "large"])
@pytest.mark.parametrize("name", MASKS)
def test_equals_eager(name: str, block: str, softcap: float | None) -> None:
    mask = AttentionMask(MASKS[name].queries, *MASKS[name].parts)
    with small_blocks() if block == "small" else contextlib.nullcontext():
        both(mask, softcap)


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), [(9, 3, 64), (4, 1, 256), (3, 3, 16)])
def test_heads_of_any_shape(n_heads: int, n_kv_heads: int, head_dim: int, softcap: float | None) -> None:
    for name in ("causal", "merged"):
        both(MASKS[name], softcap, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim)


def test_blocks_of_the_real_size() -> None:
    """600 tokens are three blocks, and their scores more than are computed at once."""
    keys = tokens([1] * 600 + [2] * 30)
    for rule in (Rule(), Rule(future=0), Rule(past=100, future=0)):
        both(AttentionMask(keys, (keys, rule)), 2.0, tolerance=1e-5)
        both(AttentionMask(keys, (keys, rule)), None, tolerance=1e-5)


RULES = st.builds(
    Rule,
    past=st.none() | st.integers(0, 4),
    future=st.none() | st.integers(0, 4),
    sink=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_eager_on_random_masks(data: st.DataObject) -> None:
    """Ids in any order, also those that come back later in the row."""
    ids = st.lists(st.integers(0, 2), min_size=8, max_size=8)
    own = tokens(data.draw(ids), data.draw(ids))
    source = tokens(data.draw(ids), data.draw(ids))
    own = own.continued_after(source) if data.draw(st.booleans()) else own
    share = data.draw(st.sampled_from([1.0, 0.5, 0.01]))
    rules = [dataclasses.replace(data.draw(RULES), future_share=share) for _ in range(2)]
    mask = AttentionMask(own, (source, rules[0]), (own, rules[1]))
    # A limited share divides by what is left of the weights, and so by little now and then.
    tolerance = 2e-6 if share == 1.0 else 1e-5
    with small_blocks():
        both(mask, data.draw(st.sampled_from([None, 2.0])), tolerance=tolerance)


def test_soft_capped_gradient_is_the_derivative() -> None:
    """In float64 against finite differences; scores reach far beyond the cap."""
    rules = Rule(past=2, future=0), Rule(future=1)
    queries, keys = tokens([1, 1, 1, 2, 2, 0]), tokens([1, 1, 0, 1, 2, 2])
    mask = AttentionMask(queries, (keys, rules[0]), (queries, rules[1]))
    leaves = [leaf.detach().double().requires_grad_() for leaf in qkv(mask, head_dim=3)]

    def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, mask, scale=2.0, softcap=1.5, backend="segments")

    with small_blocks():
        assert torch.autograd.gradcheck(capped, leaves)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradient_of_a_limited_share_is_the_derivative(softcap: float | None) -> None:
    """In float64 against finite differences; some queries reach the limit, some do not, one has no later key."""
    keys = tokens([1, 1, 1, 2, 2, 0])
    mask = AttentionMask(keys, (keys, Rule(future_share=0.4)))
    leaves = [leaf.detach().double().requires_grad_() for leaf in qkv(mask, head_dim=3)]

    def limited(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, mask, scale=0.5, softcap=softcap, backend="segments")

    with small_blocks():
        assert torch.autograd.gradcheck(limited, leaves)


def test_tanh_is_exact_everywhere() -> None:
    """Near zero too, where cancellation would show, and where the exponential overflows."""
    magnitudes = torch.logspace(-30, 3, 2000)
    x = torch.cat([-magnitudes, torch.zeros(1), magnitudes])
    exact = x.double().tanh()
    ours = segments._tanh_(x.clone()).double()
    assert ((ours - exact).abs() <= 4e-7 * exact.abs()).all()
    assert segments._tanh_(torch.tensor([float("nan")])).isnan().all()
    assert_same(segments._tanh_(x.double()), exact, 1e-15)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_half_precision_is_computed_in_float32(softcap: float | None) -> None:
    """Also under autocast: the result is the exact one of the rounded inputs, rounded once."""
    mask = MASKS["causal"]
    leaves = [leaf.detach().bfloat16() for leaf in qkv(mask)]
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*leaves, mask, scale=1.0, softcap=softcap, backend="segments")
    exact = attend(*(leaf.float() for leaf in leaves), mask, scale=1.0, softcap=softcap, backend="eager")
    assert out.dtype == torch.bfloat16
    assert ((out.float() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_padding_is_not_even_read(softcap: float | None) -> None:
    """NaN in padding queries and keys, and in gradients that come back there, reaches no token."""
    mask = MASKS["causal"]
    is_padding = mask.queries.segments == 0
    leaves = [leaf.detach().transpose(1, 2).contiguous() for leaf in qkv(mask)]
    expected = attend(*(x.transpose(1, 2) for x in leaves), mask, scale=1.0, softcap=softcap, backend="eager")
    for leaf in leaves:
        leaf[is_padding] = torch.nan
    out = attend(*(x.transpose(1, 2) for x in leaves), mask, scale=1.0, softcap=softcap, backend="segments")
    assert_same(out, expected, 2e-6)


def saved_numbers(mask: AttentionMask, softcap: float) -> int:
    """How many numbers the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        attend(*qkv(mask), mask, scale=1.0, softcap=softcap, backend="segments")
    return sum(kept.values())


def test_soft_capped_attention_keeps_only_queries_keys_and_values() -> None:
    mask = MASKS["merged"]
    assert saved_numbers(mask, 2.0) == sum(leaf.numel() for leaf in qkv(mask))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_works_under_activation_checkpointing(softcap: float | None) -> None:
    mask = MASKS["merged"]
    leaves = qkv(mask)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, mask, scale=1.0, softcap=softcap, backend="segments")

    plain = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    again = torch.autograd.grad(checkpoint(run, *leaves, use_reentrant=False).square().sum(), leaves)
    for ours, theirs in zip(again, plain, strict=True):
        assert torch.equal(ours, theirs)


def test_works_in_a_compiled_function() -> None:
    """The graph breaks around it; what stands before and after is compiled once, whatever the masks."""
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def run(mask: AttentionMask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q * 2, k, v, mask, scale=0.5, softcap=2.0, backend="segments") + 1

    compiled: Any = torch.compile(run, backend=count)
    for ids in ([1] * 7 + [2] * 3, [0] * 4 + [1] * 6, [1] * 2 + [2] * 2 + [3] * 6):
        mask = AttentionMask(tokens(ids), (tokens(ids), Rule(future=0)))
        leaves = qkv(mask)
        expected = torch.autograd.grad(run(mask, *leaves).square().sum(), leaves)
        found = torch.autograd.grad(compiled(mask, *leaves).square().sum(), leaves)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs, 1e-6)
    assert graphs == 2
