"""The decoder over few tokens on the CPU, such as those of a decoding step: linear layers by `matrices`, and what lies
between them and attention.

The same steps in the same order as `models.stack`, in float32, with weights in the format of `Matrices`.

Letters: M tokens, D width, F width of the MLP, N query heads, K key-value heads, H head_dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor, nn

from twofold.config import LayerType
from twofold.infer.backends.base import Attend, Floats
from twofold.infer.backends.jit import FAST, StoredDtype, exp, f32
from twofold.infer.backends.matrices import Matrices
from twofold.models import EncoderDecoder
from twofold.models.attention import Attention
from twofold.models.layers import RMSNorm
from twofold.models.stack import DecoderBlock

_ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1, "gelu": 2}


@dataclass(frozen=True)
class _Norm:
    """RMSNorm; one without weights changes nothing."""

    weight: Floats
    """What normed inputs are multiplied by, [0] where there is no norm."""
    eps: float

    @staticmethod
    def of(module: nn.Module | None) -> _Norm:
        if not isinstance(module, RMSNorm):
            return _Norm(np.empty(0, np.float32), 0.0)
        weight = module.weight.detach().float()
        return _Norm((1.0 + weight if module.adds_one else weight.clone()).numpy(), module.eps)


@dataclass(frozen=True)
class _Sublayer:
    """Attention with the projections and norms around it."""

    attention: Attention
    before: _Norm
    projected: Matrices
    """Queries; and keys and values, where they are the tokens' own."""
    has_new: bool
    q_norm: _Norm
    k_norm: _Norm
    out: Matrices
    after: _Norm
    rope_type: LayerType | None


@dataclass(frozen=True)
class _Layer:
    """A block of the decoder."""

    attentions: tuple[_Sublayer, ...]
    before: _Norm
    gate_up: Matrices
    down: Matrices
    after: _Norm


class NarrowDecoder:
    """`DecoderRun` for few tokens: one or two take the time that the matrices take to be read.

    Args:
        model: whose weights are read; it stays what embeds tokens.
        format: how matrices are kept, see `Matrices`.
    """

    def __init__(self, model: EncoderDecoder, format: StoredDtype) -> None:
        self._model = model
        decoder = model.decoder
        self._activation = _ACTIVATIONS[decoder.stack_config.hidden_activation]
        self._layers: list[_Layer] = []
        for layer, layer_type in zip(decoder.layers, decoder.stack_config.layer_types, strict=True):
            assert isinstance(layer, DecoderBlock)
            attentions = [_own_attention(layer, layer_type, format)]
            if not decoder.is_merged:
                attentions.append(_cross_attention(layer, layer_type if decoder.cross_rope else None, format))
            self._layers.append(
                _Layer(
                    attentions=tuple(attentions),
                    before=_Norm.of(layer.pre_feedforward_layernorm),
                    gate_up=Matrices([layer.mlp.gate_proj, layer.mlp.up_proj], format),
                    down=Matrices([layer.mlp.down_proj], format),
                    after=_Norm.of(layer.post_feedforward_layernorm),
                )
            )
        self._norm = _Norm.of(decoder.norm)
        head = model.lm_head
        self._head = Matrices([head.out_proj], format, softcap=head.softcap)
        self._logits: dict[int, Floats] = {}

    @torch.no_grad()
    def run(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """See `DecoderRun`."""
        decoder, n_tokens = self._model.decoder, len(input_ids)
        x_MD = decoder.embed_tokens(input_ids).float().numpy()
        rope = {
            layer_type: tuple(np.ascontiguousarray(table[:, 0, 0].float().numpy()) for table in tables)
            for layer_type, tables in decoder.rope(positions[:, None]).items()
        }
        read_MD = np.empty_like(x_MD)
        for i, layer in enumerate(self._layers):
            for part in layer.attentions:
                _norm(x_MD, part.before.weight, part.before.eps, read_MD)
                _add(x_MD, self._attended(i, part, read_MD, rope, attend), part.after.weight, part.after.eps)
            _norm(x_MD, layer.before.weight, layer.before.eps, read_MD)
            wide_MG = np.empty((n_tokens, layer.gate_up.n_outputs), np.float32)
            layer.gate_up.multiply(read_MD, wide_MG)
            inner_MF = np.empty((n_tokens, layer.gate_up.n_outputs // 2), np.float32)
            _gated(wide_MG, self._activation, inner_MF)
            found_MD = np.empty_like(x_MD)
            layer.down.multiply(inner_MF, found_MD)
            _add(x_MD, found_MD, layer.after.weight, layer.after.eps)
        _norm(x_MD, self._norm.weight, self._norm.eps, read_MD)
        logits_MV = self._logits.get(n_tokens)
        if logits_MV is None:
            logits_MV = self._logits[n_tokens] = np.empty((n_tokens, self._head.n_outputs), np.float32)
        self._head.multiply(read_MD, logits_MV)
        return torch.from_numpy(logits_MV)

    def _attended(
        self, i: int, part: _Sublayer, read_MD: Floats, rope: dict[LayerType, Any], attend: Attend
    ) -> Floats:
        """What a sub-layer adds, [M, D], before its norm."""
        attention, n_tokens = part.attention, len(read_MD)
        projected = np.empty((n_tokens, part.projected.n_outputs), np.float32)
        part.projected.multiply(read_MD, projected)

        def empty(n_heads: int) -> Floats:
            return np.empty((n_tokens, n_heads, attention.head_dim), np.float32)

        q, n_new = empty(attention.n_heads), attention.n_kv_heads if part.has_new else 0
        k, v = empty(n_new), empty(n_new)
        cos, sin = (_NO_TABLE, _NO_TABLE) if part.rope_type is None else rope[part.rope_type]
        _split(projected, part.q_norm.weight, part.k_norm.weight, part.q_norm.eps, cos, sin, q, k, v)
        attended = empty(attention.n_heads)
        attend(i, attention, q, (k, v) if part.has_new else None, attended)
        found_MD = np.empty_like(read_MD)
        part.out.multiply(attended.reshape(n_tokens, -1), found_MD)
        return found_MD


_NO_TABLE = np.empty((0, 0), np.float32)


def _own_attention(layer: DecoderBlock, layer_type: LayerType, format: StoredDtype) -> _Sublayer:
    projections = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    norms = layer.pre_self_attn_layernorm, layer.post_self_attn_layernorm
    return _sublayer(layer.self_attn, projections, norms, layer_type, format)


def _cross_attention(layer: DecoderBlock, rope_type: LayerType | None, format: StoredDtype) -> _Sublayer:
    norms = layer.pre_cross_attn_layernorm, layer.post_cross_attn_layernorm
    return _sublayer(layer.cross_attn, [layer.cross_attn.q_proj], norms, rope_type, format)


def _sublayer(
    attention: Attention,
    projections: Sequence[nn.Linear],
    norms: tuple[nn.Module, nn.Module],
    rope_type: LayerType | None,
    format: StoredDtype,
) -> _Sublayer:
    before, after = norms
    return _Sublayer(
        attention=attention,
        before=_Norm.of(before),
        projected=Matrices(projections, format),
        has_new=len(projections) == 3,
        q_norm=_Norm.of(attention.q_norm),
        k_norm=_Norm.of(attention.k_norm),
        out=Matrices([attention.o_proj], format),
        after=_Norm.of(after),
        rope_type=rope_type,
    )


# --- compiled ---------------------------------------------------------------------------------------------------------


@numba.njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _factor(x: Any, eps: float) -> Any:
    """1 / sqrt(mean(x^2) + eps)."""
    total = f32(0.0)
    for d in range(x.shape[0]):
        total += x[d] * x[d]
    return f32(1.0) / np.sqrt(total / f32(x.shape[0]) + f32(eps))


@numba.njit(fastmath=FAST, error_model="numpy", nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _norm(x_MD: Any, weight: Any, eps: float, out_MD: Any) -> None:
    for m in range(x_MD.shape[0]):
        x, out = x_MD[m], out_MD[m]
        factor = _factor(x, eps)
        for d in range(x.shape[0]):
            out[d] = x[d] * factor * weight[d]


@numba.njit(fastmath=FAST, error_model="numpy", nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _add(x_MD: Any, found_MD: Any, weight: Any, eps: float) -> None:
    """Add what a sub-layer found, normed where there are weights to do it with."""
    for m in range(x_MD.shape[0]):
        x, found = x_MD[m], found_MD[m]
        if weight.shape[0] == 0:
            for d in range(x.shape[0]):
                x[d] += found[d]
        else:
            factor = _factor(found, eps)
            for d in range(x.shape[0]):
                x[d] += found[d] * factor * weight[d]


@numba.njit(fastmath=FAST, error_model="numpy", nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _split(
    projected: Any,
    q_weight: Any,
    k_weight: Any,
    eps: float,
    cos: Any,
    sin: Any,
    q_MNH: Any,
    k_MKH: Any,
    v_MKH: Any,
) -> None:
    """Queries, keys and values of [M, (N + 2 K) H]: heads normed where there are weights, rotated where there are
    tables."""
    n_tokens, n_heads, head_dim = q_MNH.shape
    n_kv_heads = k_MKH.shape[1]
    half = head_dim // 2
    for m in range(n_tokens):
        for head in range(n_heads + 2 * n_kv_heads):
            x = projected[m, head * head_dim : (head + 1) * head_dim]
            if head >= n_heads + n_kv_heads:
                v_MKH[m, head - n_heads - n_kv_heads, :] = x
                continue
            out, weight = q_MNH[m, min(head, n_heads - 1)], q_weight
            if head >= n_heads:
                out, weight = k_MKH[m, head - n_heads], k_weight
            if weight.shape[0] > 0:
                factor = _factor(x, eps)
                for h in range(head_dim):
                    x[h] = x[h] * factor * weight[h]
            if cos.shape[0] == 0:
                out[:] = x
                continue
            c, s = cos[m], sin[m]
            for h in range(half):
                one, two = x[h], x[half + h]
                out[h] = one * c[h] - two * s[h]
                out[half + h] = two * c[half + h] + one * s[half + h]


_GELU = f32(math.sqrt(2.0 / math.pi))
_ROOT_HALF = math.sqrt(0.5)


@numba.njit(fastmath=FAST, error_model="numpy", nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _gated(wide: Any, activation: int, out_MF: Any) -> None:
    """act(gate) * up of [M, 2 F]: SiLU, GELU by tanh, or GELU."""
    n = out_MF.shape[1]
    for m in range(out_MF.shape[0]):
        gate, up, out = wide[m, :n], wide[m, n:], out_MF[m]
        if activation == 0:
            for f in range(n):
                out[f] = gate[f] / (f32(1.0) + exp(-gate[f])) * up[f]
        elif activation == 1:
            for f in range(n):
                g = gate[f]
                inner = f32(2.0) * _GELU * (g + f32(0.044715) * g * g * g)
                out[f] = (g - g / (exp(inner) + f32(1.0))) * up[f]
        else:
            for f in range(n):
                g = gate[f]
                out[f] = f32(0.5) * g * f32(1.0 + math.erf(g * _ROOT_HALF)) * up[f]
