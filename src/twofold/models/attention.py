"""Attention: one door, `attend`, with four backends behind it, a side door without masks for decoding steps, and
the module that makes q, k and v.

Letters: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K queries per key-value head,
H head_dim, D width of the queries' side, E width of the keys' side (the encoder's in cross-attention).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twofold.config import StackConfig
from twofold.models.cache import KeyValues
from twofold.models.layers import RMSNorm, rotate
from twofold.models.masks import AttentionMask, limit_share
from twofold.models.segments import attend_by_runs

Backend = Literal["auto", "eager", "sdpa", "flex", "segments"]
RopeTables = tuple[Tensor, Tensor]

_MANY_QUERIES = {"cpu": 16, "cuda": 128}
"""From here on leaving out what a mask hides pays for the work around it; a decoding step stays far below."""


def attend(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """softmax(softcap(scale * q k^T) where visible) v, for grouped heads; keys after the query limited to
    `mask.future_share` of the softmax, see `limit_share`.

    Args:
        softcap: scores become `softcap * tanh(scores / softcap)` before the mask; None for no cap.
        dropout_p: share of attention weights dropped; pass 0 outside training.
        backend: `eager` is the reference, with a float32 softmax. `sdpa` is PyTorch's fused kernel; it has no
            soft-cap, and leaves a limited share to `eager`. `flex` is FlexAttention, made for CUDA: soft-caps, windows
            and packed rows without a T x S tensor; no dropout, and on CPU no gradient. `segments` does the same for the
            CPU, see `models.segments`; no dropout. `auto`: `sdpa` where it needs no mask or there are few queries, else
            `flex` on CUDA and `segments` on CPU, and `eager` or `sdpa` where those cannot be used.

    Returns:
        [B, N, T, H] in the dtype of q. A query that sees no key gives zeros.

    Raises:
        ValueError: the backend is unknown or cannot do what is asked of it.
    """
    if backend == "auto":
        backend = _choose_backend(q_BNTH, mask, softcap, dropout_p)
    if backend in ("flex", "segments") and dropout_p > 0.0:
        raise ValueError(
            f"attention backend {backend!r} has no dropout, got {dropout_p}; use 'eager', or set it to 0"
        )
    if backend == "eager":
        return _eager(q_BNTH, k_BKSH, v_BKSH, mask, scale, softcap, dropout_p)
    if backend == "sdpa":
        if softcap is not None:
            raise ValueError(
                f"attention backend 'sdpa' has no soft-cap, and this model caps scores at {softcap}; "
                "use 'eager', 'flex' or 'segments'"
            )
        if mask.future_share < 1.0:
            return _eager(q_BNTH, k_BKSH, v_BKSH, mask, scale, softcap, dropout_p)
        return _sdpa(q_BNTH, k_BKSH, v_BKSH, mask, scale, dropout_p)
    if backend == "flex":
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q_BNTH, k_BKSH, v_BKSH))
        if needs_grad and not q_BNTH.is_cuda:
            raise ValueError(
                "attention backend 'flex' has no gradient on CPU; use 'segments' or 'eager' to train there"
            )
        return _flex(q_BNTH, k_BKSH, v_BKSH, mask, scale, softcap)
    if backend == "segments":
        if q_BNTH.device.type != "cpu":
            raise ValueError(
                f"attention backend 'segments' is made for the CPU, got tensors on {q_BNTH.device}; "
                "use 'auto' or 'flex'"
            )
        out: Tensor = attend_by_runs(q_BNTH, k_BKSH, v_BKSH, mask, scale, softcap)
        return out
    raise ValueError(f"unknown attention backend {backend!r}; use one of {', '.join(get_args(Backend))}")


def attend_everything(
    q_BNH: Tensor,
    *parts: KeyValues,
    scale: float,
    softcap: float | None = None,
    hidden_BS: Tensor | None = None,
) -> Tensor:
    """Attention of a decoding step: one query in each row, which sees every key of every part.

    One softmax over all parts, which are never copied together. A part with one batch row is shared by all
    queries, as the source is by samples and beams, and all keys by the queries of several tokens of one text.

    Args:
        q_BNH: [B, N, H].
        parts: [B, K, S, H] or [1, K, S, H] each; S may be 0.
        softcap: as in `attend`.
        hidden_BS: bool [B, S of all parts in a row], True = not to be seen after all; each query must be left a
            key. None: nothing is hidden.

    Returns:
        [B, N, H] in the dtype of q; zeros where there is no key at all.
    """
    n_rows, n_heads, head_dim = q_BNH.shape
    n_kv_heads = parts[0].keys.shape[1]
    q_BKGH = q_BNH.view(n_rows, n_kv_heads, n_heads // n_kv_heads, head_dim)

    def folded(x_BKGX: Tensor, part: KeyValues) -> Tensor:
        """With a shared part all rows' queries lie side by side: [1, K, B G, X]."""
        return x_BKGX if len(part.keys) == n_rows else x_BKGX.transpose(0, 1).flatten(1, 2)[None]

    def unfolded(x_BKGX: Tensor) -> Tensor:
        if len(x_BKGX) == n_rows:
            return x_BKGX
        return x_BKGX[0].view(n_kv_heads, n_rows, n_heads // n_kv_heads, -1).transpose(0, 1)

    scores_BKGS = torch.cat(
        [unfolded(folded(q_BKGH, part) @ part.keys.transpose(-1, -2)) for part in parts], dim=-1
    ).float()
    scores_BKGS = scores_BKGS * scale
    if softcap is not None:
        scores_BKGS = softcap * torch.tanh(scores_BKGS / softcap)
    if hidden_BS is not None:
        scores_BKGS = scores_BKGS.masked_fill(hidden_BS[:, None, None], -torch.inf)
    weights_BKGS = scores_BKGS.softmax(dim=-1).to(q_BNH.dtype)
    out_BKGH = torch.zeros_like(q_BKGH)
    weights_of_parts = torch.split_with_sizes(weights_BKGS, [part.length for part in parts], dim=-1)
    for weights, part in zip(weights_of_parts, parts, strict=True):
        out_BKGH = out_BKGH + unfolded(folded(weights, part) @ part.values)
    return out_BKGH.reshape(n_rows, n_heads, head_dim)


def _choose_backend(
    q_BNTH: Tensor, mask: AttentionMask, softcap: float | None, dropout_p: float
) -> Literal["eager", "sdpa", "flex", "segments"]:
    """What `auto` stands for. Known from shapes and Python data: nothing waits for the device."""
    device = q_BNTH.device.type
    is_large = device in _MANY_QUERIES and q_BNTH.shape[2] >= _MANY_QUERIES[device]
    if dropout_p > 0.0:
        return "sdpa" if softcap is None else "eager"
    is_limited = mask.future_share < 1.0
    if softcap is None and not is_limited and (not is_large or mask.hides_nothing or mask.is_plain_causal):
        return "sdpa"
    if device == "cuda":
        return "flex"
    return "segments" if is_large else "eager"


def _eager(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    mask: AttentionMask,
    scale: float,
    softcap: float | None,
    dropout_p: float,
) -> Tensor:
    weights_BNTS = attention_weights(q_BNTH, k_BKSH, mask.dense, scale=scale, softcap=softcap)
    if mask.future_share < 1.0:
        weights_BNTS = limit_share(weights_BNTS, mask.later.dense[:, None], mask.future_share)
    weights_BNTS = F.dropout(weights_BNTS, dropout_p)
    return weights_BNTS.to(q_BNTH.dtype) @ _of_all_heads(v_BKSH, q_BNTH)


def attention_weights(
    q_BNTH: Tensor, k_BKSH: Tensor, visible_BTS: Tensor, *, scale: float, softcap: float | None
) -> Tensor:
    """softmax(softcap(scale * q k^T) where visible), for grouped heads.

    Args:
        visible_BTS: bool, True = may attend.

    Returns:
        float32 [B, N, T, S]; the row of a query that sees no key is zero.
    """
    scores_BNTS = (q_BNTH @ _of_all_heads(k_BKSH, q_BNTH).transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores_BNTS = softcap * torch.tanh(scores_BNTS / softcap)
    visible = visible_BTS[:, None]
    # The lowest number instead of -inf: a row that sees nothing becomes uniform, not NaN, and is zeroed below.
    scores_BNTS = scores_BNTS.masked_fill(~visible, torch.finfo(torch.float32).min)
    return scores_BNTS.softmax(dim=-1).masked_fill(~visible, 0.0)


def _of_all_heads(x_BKSH: Tensor, q_BNTH: Tensor) -> Tensor:
    """Each key-value head once for each of its queries' heads: [B, N, S, H]."""
    return x_BKSH.repeat_interleave(q_BNTH.shape[1] // x_BKSH.shape[1], dim=1)


def _sdpa(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: AttentionMask, scale: float, dropout_p: float
) -> Tensor:
    options: dict[str, Any] = {
        "scale": scale,
        "dropout_p": dropout_p,
        "enable_gqa": q_BNTH.shape[1] != k_BKSH.shape[1],
    }
    if mask.hides_nothing:
        return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, **options)
    if mask.is_plain_causal:
        return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, is_causal=True, **options)
    visible = mask.dense[:, None]
    sees_a_key = visible.any(dim=-1, keepdim=True)
    # What kernels return for a row without keys differs (zeros, NaN): let it see all, then zero it.
    kernel_mask = visible | ~sees_a_key
    attended = F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, attn_mask=kernel_mask, **options)
    return attended * sees_a_key


@lru_cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True)
    return compiled


def _flex(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: AttentionMask, scale: float, softcap: float | None
) -> Tensor:
    if mask.future_share == 1.0:
        out: Tensor = _run_flex(q_BNTH, k_BKSH, v_BKSH, mask, scale, softcap)
        return out
    parts = (mask.earlier, mask.later)
    (before, log_before), (after, log_after) = (
        _run_flex(q_BNTH, k_BKSH, v_BKSH, part, scale, softcap, with_divisor=True) for part in parts
    )
    w_BNT = (log_after - torch.logaddexp(log_before, log_after)).exp().clamp(max=mask.future_share)
    sees_nothing = log_after == -torch.inf, log_before == -torch.inf
    w_BNT = torch.where(sees_nothing[0], 0.0, torch.where(sees_nothing[1], 1.0, w_BNT))
    w_BNT1 = w_BNT[..., None].to(before.dtype)
    mixed: Tensor = (1.0 - w_BNT1) * before + w_BNT1 * after
    return mixed


def _run_flex(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    mask: AttentionMask,
    scale: float,
    softcap: float | None,
    *,
    with_divisor: bool = False,
) -> Any:
    """[B, N, T, H]; on request also the logarithm of the softmax's divisor, [B, N, T]."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    # On CPU the uncompiled form: it is there to check the masks, not to be fast.
    run: Any = _compiled_flex() if q_BNTH.is_cuda else flex_attention
    out = run(
        q_BNTH,
        k_BKSH,
        v_BKSH,
        score_mod=None if softcap is None else score_mod,
        block_mask=mask.block_mask,
        scale=scale,
        enable_gqa=q_BNTH.shape[1] != k_BKSH.shape[1],
        return_aux=AuxRequest(lse=True) if with_divisor else None,
    )
    return (out[0], out[1].lse) if with_divisor else out


class Attention(nn.Module):
    """Projections around `attend`: self-attention, merged attention, or cross-attention.

    Args:
        config: the stack this layer belongs to; its heads, biases, q/k norm, scale and soft-cap.
        memory_size: E, the width of what keys and values are made from. `config.hidden_size` except in
            cross-attention to an encoder of another width.
        source_size: merged attention with projections of its own for the source: the encoder's width. None: it has
            none.
    """

    def __init__(self, config: StackConfig, memory_size: int, *, source_size: int | None = None) -> None:
        super().__init__()
        d_model, head_dim = config.hidden_size, config.head_dim
        self.n_heads, self.n_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = head_dim
        self.scale = config.query_pre_attn_scalar**-0.5
        self.softcap = config.attn_logit_softcapping
        self.dropout_p = config.attention_dropout
        self.backend: Backend = "auto"
        self.q_proj = nn.Linear(d_model, self.n_heads * head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(memory_size, self.n_kv_heads * head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(memory_size, self.n_kv_heads * head_dim, bias=config.qkv_bias)
        self.has_source_projections = source_size is not None
        if source_size is not None:
            # Always with biases: a fit between two streams has an intercept.
            self.source_k_proj = nn.Linear(source_size, self.n_kv_heads * head_dim)
            self.source_v_proj = nn.Linear(source_size, self.n_kv_heads * head_dim)
        self.o_proj = nn.Linear(self.n_heads * head_dim, d_model, bias=config.output_bias)
        self.q_norm = RMSNorm(head_dim, config) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config) if config.qk_norm else None

    def queries(self, x_BTD: Tensor, rope: RopeTables | None) -> Tensor:
        """[B, N, T, H]: projected, normed where the family does, rotated unless `rope` is None."""
        q_BNTH = self.q_proj(x_BTD).unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)
        if self.q_norm is not None:
            q_BNTH = self.q_norm(q_BNTH)
        return q_BNTH if rope is None else rotate(q_BNTH, rope)

    def keys_values(self, x_BSE: Tensor, rope: RopeTables | None) -> KeyValues:
        """Two of [B, K, S, H]: projected; keys normed and rotated as queries are."""
        return self._keys_values(self.k_proj(x_BSE), self.v_proj(x_BSE), rope)

    def source_keys_values(self, x_BSE: Tensor, rope: RopeTables | None) -> KeyValues:
        """The same of the source, through projections of its own where there are any."""
        if not self.has_source_projections:
            return self.keys_values(x_BSE, rope)
        return self._keys_values(self.source_k_proj(x_BSE), self.source_v_proj(x_BSE), rope)

    def _keys_values(self, k_BSP: Tensor, v_BSP: Tensor, rope: RopeTables | None) -> KeyValues:
        """Of all heads in a row, P = K H, to [B, K, S, H]."""
        heads = (*k_BSP.shape[:2], self.n_kv_heads, self.head_dim)
        k_BKSH, v_BKSH = k_BSP.reshape(heads).transpose(1, 2), v_BSP.reshape(heads).transpose(1, 2)
        if self.k_norm is not None:
            k_BKSH = self.k_norm(k_BKSH)
        return KeyValues(k_BKSH if rope is None else rotate(k_BKSH, rope), v_BKSH)

    def forward(self, q_BNTH: Tensor, keys_values: KeyValues, mask: AttentionMask) -> Tensor:
        """Attend and project back: [B, T, D]."""
        attended_BNTH = attend(
            q_BNTH,
            keys_values.keys,
            keys_values.values,
            mask,
            scale=self.scale,
            softcap=self.softcap,
            dropout_p=self.dropout_p if self.training else 0.0,
            backend=self.backend,
        )
        return self.project(attended_BNTH)

    def project(self, attended_BNTH: Tensor) -> Tensor:
        """What all heads found, back to the stack's width: [B, T, D]."""
        out: Tensor = self.o_proj(attended_BNTH.transpose(1, 2).flatten(2))
        return out
