"""Attention on the CPU, run by run: what a mask hides is neither computed nor stored.

`AttentionMask.runs` lists, for each batch row, which neighbouring queries see which keys. Packed rows then cost
the sum of each example's queries times its keys instead of T times S, and padding costs nothing. Without a
soft-cap each run goes to PyTorch's fused kernel. With one, which that kernel does not have, scores are computed
in blocks and computed again in the backward pass, so that memory does not grow with T x S either; so too where later
keys are limited to a share.

All arithmetic is float32 (float64 for float64 inputs): on a CPU without bfloat16 instructions the fused kernel
is four times slower in bfloat16, and matrix products ten times.

Letters: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H head_dim; and within a run: R
its rows times K, L its queries, M its keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from twofold.models.masks import AttentionMask, Block, Run, limit_share

_SCORES_AT_ONCE = 2**19
"""Scores computed together. 2 MiB in float32: the passes over them stay in a core's cache."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_by_runs(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: AttentionMask, scale: float, softcap: float | None
) -> Tensor:
    """See `models.attention.attend`. Returns [B, N, T, H] in the dtype of q."""
    # Autocast would turn the float32 products back into bfloat16 ones.
    with torch.autocast("cpu", enabled=False):
        if softcap is None or mask.future_share < 1.0:
            return _by_blocks(q_BNTH, k_BKSH, v_BKSH, mask, scale, softcap)
        out: Tensor = _Capped.apply(  # type: ignore[no-untyped-call]
            q_BNTH, k_BKSH, v_BKSH, mask, scale, softcap
        )
        return out


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# Without a soft-cap, or with later keys limited to a share.


def _by_blocks(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: AttentionMask, scale: float, softcap: float | None
) -> Tensor:
    if not mask.runs:
        return q_BNTH * 0.0
    dtype = q_BNTH.dtype
    q_BNTH, k_BKSH, v_BKSH = (x.to(_work_dtype(x)) for x in (q_BNTH, k_BKSH, v_BKSH))
    n_rows = mask.runs[0].rows.stop - mask.runs[0].rows.start  # 1 or B
    runs_of = {row: list(runs) for row, runs in itertools.groupby(mask.runs, key=lambda run: run.rows.start)}
    # Split, not indexed: the gradient of each index would be a tensor of zeros as large as all of q, k or v.
    pieces = zip(*(torch.split(x, n_rows) for x in (q_BNTH, k_BKSH, v_BKSH)), strict=True)
    attended = [
        _row(q, k, v, mask, runs_of.get(i * n_rows, []), scale, softcap) for i, (q, k, v) in enumerate(pieces)
    ]
    return torch.cat(attended).transpose(1, 2).to(dtype)


def _row(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    mask: AttentionMask,
    runs: list[Run],
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Of one row, or of all where they are alike. Returns [B, T, N, H]: so the kernel lays its result out."""
    queries = _split_at(q_BNTH, [run.queries for run in runs])
    keys, values = (_split_at(x, [one for run in runs for one in run.keys]) for x in (k_BKSH, v_BKSH))
    n_batch, n_heads, n_queries, head_dim = q_BNTH.shape
    out: list[Tensor] = []
    done = 0

    def zeros_until(stop: int) -> None:
        if stop > done:
            out.append(q_BNTH.new_zeros(n_batch, stop - done, n_heads, head_dim))

    for run in runs:
        k, v = (torch.cat([x[one.start] for one in run.keys], dim=2) for x in (keys, values))
        for block in run.blocks:
            start, stop = (run.queries.start + edge for edge in (block.queries.start, block.queries.stop))
            zeros_until(start)
            q = queries[run.queries.start][:, :, block.queries]
            k_block, v_block = k[:, :, block.keys], v[:, :, block.keys]
            if mask.future_share == 1.0:
                out.append(_fused(q, k_block, v_block, mask, run, block, scale))
            else:
                out.append(_limited(q, k_block, v_block, mask, run, block, scale, softcap))
            done = stop
    zeros_until(n_queries)
    return torch.cat(out, dim=1)


def _split_at(x: Tensor, spans: Iterable[slice]) -> dict[int, Tensor]:
    """The given spans of dimension 2, which may repeat but not overlap, by where they start."""
    edges = sorted({0, x.shape[2], *(edge for span in spans for edge in (span.start, span.stop))})
    sizes = [stop - start for start, stop in itertools.pairwise(edges)]
    return dict(zip(edges, torch.split(x, sizes, dim=2), strict=False))


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, run: Run, block: Block, scale: float
) -> Tensor:
    """[B, L, N, H] of one block."""
    options: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if block.is_causal or block.hidden is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=block.is_causal, **options)
        return out.transpose(1, 2)
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    visible[:, block.hidden] = ~mask.hidden(run, block)
    sees_a_key = visible.any(dim=-1, keepdim=True)
    kernel_mask = visible | ~sees_a_key
    out = F.scaled_dot_product_attention(q, k, v, kernel_mask, **options)
    # What kernels return for a row without keys differs (zeros, NaN): it saw all, and is zeroed.
    return (out * sees_a_key).transpose(1, 2)


def _limited(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    run: Run,
    block: Block,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """[B, L, N, H] of one block, its scores written out, and again in the backward pass."""
    visible, is_later = mask.visible(run, block), mask.later.visible(run, block)

    def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_BKGLH = q.reshape(len(q), k.shape[1], -1, *q.shape[2:])
        scores = q_BKGLH @ k[:, :, None].mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1).masked_fill(~visible, 0.0)
        weights = limit_share(weights, is_later, mask.future_share)
        return (weights @ v[:, :, None]).flatten(1, 2).transpose(1, 2)

    if not torch.is_grad_enabled():
        return compute(q, k, v)
    attended: Tensor = checkpoint(compute, q, k, v, use_reentrant=False)
    return attended


# With a soft-cap.


class _Capped(torch.autograd.Function):
    """softmax(cap tanh(scale q k^T / cap)) v over the runs of a mask.

    With t = tanh(scale q k^T / cap), p = softmax(cap t) and g the gradient of the result:

        dv = p^T g,    dp = g v^T,    d(cap t) = p (dp - sum_k p dp),    d(q k^T) = scale (1 - t^2) d(cap t)

    Only q, k and v are kept for the backward pass; it computes t and p again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_BNTH: Tensor,
        k_BKSH: Tensor,
        v_BKSH: Tensor,
        mask: AttentionMask,
        scale: float,
        cap: float,
    ) -> Tensor:
        ctx.save_for_backward(q_BNTH, k_BKSH, v_BKSH)
        ctx.mask, ctx.scale, ctx.cap = mask, scale, cap
        n_batch, n_heads, n_queries, head_dim = q_BNTH.shape
        # Laid out as the output projection reads it, which then need not copy.
        out_BNTH = q_BNTH.new_zeros(n_batch, n_queries, n_heads, head_dim).transpose(1, 2)
        n_kv_heads = k_BKSH.shape[1]
        for run in mask.runs:
            k_RMH, v_RMH = _joined(k_BKSH, run), _joined(v_BKSH, run)
            for block in run.blocks:
                q_RLH = _block_of(q_BNTH, run, block, n_kv_heads)
                out_RLH = torch.empty_like(q_RLH)
                change = _Change.of(mask, run, block)
                for part in _parts(len(q_RLH), q_RLH.shape[1], block):
                    _, p_RLM = _weights(q_RLH[part], k_RMH[part, block.keys], change, scale, cap)
                    torch.bmm(p_RLM, v_RMH[part, block.keys], out=out_RLH[part])
                _write_block(out_BNTH, out_RLH, run, block)
        return out_BNTH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BNTH: Tensor) -> tuple[Tensor | None, ...]:
        q_BNTH, k_BKSH, v_BKSH = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            gradients = _capped_gradients(g_BNTH, q_BNTH, k_BKSH, v_BKSH, ctx.mask, ctx.scale, ctx.cap)
        return (*gradients, None, None, None)


def _capped_gradients(
    g_BNTH: Tensor,
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    mask: AttentionMask,
    scale: float,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq_BNTH = torch.zeros_like(q_BNTH)
    # A key can belong to several runs (a hole in its segment splits the queries): their gradients are summed.
    dk_BKSH, dv_BKSH = (torch.zeros_like(x, dtype=_work_dtype(x)) for x in (k_BKSH, v_BKSH))
    n_kv_heads = k_BKSH.shape[1]
    for run in mask.runs:
        k_RMH, v_RMH = _joined(k_BKSH, run), _joined(v_BKSH, run)
        dk_RMH, dv_RMH = torch.zeros_like(k_RMH), torch.zeros_like(v_RMH)
        for block in run.blocks:
            q_RLH, g_RLH = (_block_of(x, run, block, n_kv_heads) for x in (q_BNTH, g_BNTH))
            dq_RLH = torch.empty_like(q_RLH)
            change = _Change.of(mask, run, block)
            for part in _parts(len(q_RLH), q_RLH.shape[1], block):
                q, g, k, v = q_RLH[part], g_RLH[part], k_RMH[part, block.keys], v_RMH[part, block.keys]
                t, p = _weights(q, k, change, scale, cap)
                dv_RMH[part, block.keys].baddbmm_(p.mT, g)
                ds = torch.bmm(g, v.mT).mul_(p)
                ds.addcmul_(p, ds.sum(dim=-1, keepdim=True), value=-1.0)
                ds.addcmul_(ds, t.square_(), value=-1.0)
                torch.bmm(ds, k, out=dq_RLH[part])
                dk_RMH[part, block.keys].baddbmm_(ds.mT, q, alpha=scale)
            _write_block(dq_BNTH, dq_RLH.mul_(scale), run, block)
        _add_joined(dk_BKSH, dk_RMH, run)
        _add_joined(dv_BKSH, dv_RMH, run)
    return dq_BNTH, dk_BKSH.to(k_BKSH.dtype), dv_BKSH.to(v_BKSH.dtype)


class _Change(NamedTuple):
    """What a block does to scores before the softmax."""

    columns: slice
    """Where the keys that are hidden from some query are among the block's keys."""
    hidden: Tensor
    """bool [queries, columns], True = hidden."""

    @classmethod
    def of(cls, mask: AttentionMask, run: Run, block: Block) -> _Change | None:
        """None: nothing."""
        return None if block.hidden is None else cls(block.hidden, mask.hidden(run, block))


def _weights(
    q_RLH: Tensor, k_RMH: Tensor, change: _Change | None, scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    """t and p of `_Capped`, each [R, L, M]; L holds the G heads of a group one after another."""
    t = _tanh_(torch.bmm(q_RLH, k_RMH.mT).mul_(scale / cap))
    scores = t * cap
    if change is None:
        return t, scores.softmax(dim=-1)
    columns, hidden = change
    n_rows, _, n_keys = scores.shape
    by_head = scores.view(n_rows, -1, len(hidden), n_keys)
    by_head[..., columns].masked_fill_(hidden, -torch.inf)
    p = by_head.softmax(dim=-1)
    if hidden.shape[1] == n_keys:  # else there is a key that all see
        p.masked_fill_(hidden, 0.0)  # NaN where a query sees no key
    return t, p.flatten(1, 2)


def _tanh_(x: Tensor) -> Tensor:
    """tanh in place, to rounding: 3 passes around expm1 took a third of the time of `torch.tanh`."""
    # tanh x = e / (e + 2) with e = exp(2 x) - 1; at 20 it is 1 in float64 too, and e is still finite.
    e = x.mul_(2.0).clamp_(-40.0, 40.0).expm1_()
    return e.div_(e + 2.0)


def _parts(n_rows: int, n_queries: int, block: Block) -> Iterator[slice]:
    """R in parts whose scores fit the cache."""
    at_once = max(1, _SCORES_AT_ONCE // (n_queries * (block.keys.stop - block.keys.start)))
    for start in range(0, n_rows, at_once):
        yield slice(start, start + at_once)


def _joined(x_BKSH: Tensor, run: Run) -> Tensor:
    """The keys (or values) of a run, [R, M, H]."""
    rows = x_BKSH[run.rows]
    parts = [rows[:, :, keys] for keys in run.keys]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return joined.to(_work_dtype(joined)).flatten(0, 1)


def _add_joined(into_BKSH: Tensor, x_RMH: Tensor, run: Run) -> None:
    """The way back from `_joined`, for gradients."""
    rows = into_BKSH[run.rows]
    sizes = [keys.stop - keys.start for keys in run.keys]
    parts = torch.split(x_RMH.view(*rows.shape[:2], *x_RMH.shape[1:]), sizes, dim=2)
    for keys, part in zip(run.keys, parts, strict=True):
        rows[:, :, keys] += part


def _block_of(x_BNTH: Tensor, run: Run, block: Block, n_kv_heads: int) -> Tensor:
    """The queries of a block (or what has their shape), [R, G L, H]."""
    x = x_BNTH[run.rows, :, run.queries][:, :, block.queries]
    return x.to(_work_dtype(x)).reshape(len(x) * n_kv_heads, -1, x.shape[-1])


def _write_block(into_BNTH: Tensor, x_RLH: Tensor, run: Run, block: Block) -> None:
    """The way back from `_block_of`."""
    into = into_BNTH[run.rows, :, run.queries][:, :, block.queries]
    into.copy_(x_RLH.view(into.shape))
