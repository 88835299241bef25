"""Our modules as OpenVINO operations: one function for each module of `models/`, in the same order of steps.

Written by hand instead of traced: tracing and compressing a 12-layer decoder with OpenVINO's and NNCF's own converters
took 40 to 70 seconds, this takes two, so that nothing has to be kept on disk between runs. That both say the same is
tested in float32, module by module and as a whole.

Letters: B batch, L tokens, D width, N query heads, K key-value heads, G = N / K, H head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import openvino as ov
import openvino.opset15 as op
import torch
from torch import Tensor, nn

from twofold.infer.backends.rounding import int8_rows
from twofold.models.attention import Attention
from twofold.models.encoder_decoder import LMHead
from twofold.models.layers import Embedding, GatedMLP, RMSNorm
from twofold.models.stack import Block

Node = Any
"""`openvino.Node`, or an output of one."""
Rope = tuple[Node, Node]
"""Cosines and sines, broadcast to what they turn."""
WeightFormat = Literal["float", "int8", "int4"]

HIDDEN = -1e30
"""Added to the scores of keys that are not seen. Finite: a query that sees none, which only padding is, must not become
NaN, as its keys are multiplied by 0 elsewhere."""

_INT4_GROUP = 64


@dataclass(frozen=True, slots=True)
class Lowering:
    """Modules to operations.

    Attributes:
        weights: how matrices are kept. `float`: as they are. `int8`: symmetric, one scale a row. `int4`: symmetric, one
            scale for 64 neighbours of a row (fewer where 64 does not divide it).
    """

    weights: WeightFormat = "float"

    def linear(self, module: nn.Linear, x: Node) -> Node:
        """x W^T + b."""
        out = op.matmul(x, self._matrix(module.weight), False, True)
        return out if module.bias is None else op.add(out, _constant(module.bias))

    def rms_norm(self, module: nn.Module, x: Node) -> Node:
        """See `models.layers.RMSNorm`; a missing norm passes x on."""
        if isinstance(module, nn.Identity):
            return x
        assert isinstance(module, RMSNorm)
        mean = op.reduce_mean(op.power(x, np.float32(2.0)), ints(-1), keep_dims=True)
        normed = op.multiply(x, op.divide(np.float32(1.0), op.sqrt(op.add(mean, np.float32(module.eps)))))
        weight = module.weight.float()
        return op.multiply(normed, _constant(1.0 + weight if module.adds_one else weight))

    def mlp(self, module: GatedMLP, x: Node) -> Node:
        """down(act(gate(x)) * up(x))."""
        gate = self.linear(module.gate_proj, x)
        if module.activation == "silu":
            gate = op.swish(gate)
        else:
            gate = op.gelu(gate, "ERF" if module.activation == "gelu" else "TANH")
        return self.linear(module.down_proj, op.multiply(gate, self.linear(module.up_proj, x)))

    def queries(self, module: Attention, x: Node, rope: Rope | None) -> Node:
        """[..., N, H] of x [..., D]: projected, normed where the family does, rotated unless `rope` is None."""
        q = split_heads(self.linear(module.q_proj, x), module.n_heads, module.head_dim)
        if module.q_norm is not None:
            q = self.rms_norm(module.q_norm, q)
        return q if rope is None else rotate(q, rope)

    def keys_values(
        self, module: Attention, x: Node, rope: Rope | None, *, of_source: bool = False
    ) -> tuple[Node, Node]:
        """Two of [..., K, H], as `Attention.keys_values`, or `source_keys_values`."""
        k_proj, v_proj = module.k_proj, module.v_proj
        if of_source and module.has_source_projections:
            k_proj, v_proj = module.source_k_proj, module.source_v_proj
        k = split_heads(self.linear(k_proj, x), module.n_kv_heads, module.head_dim)
        v = split_heads(self.linear(v_proj, x), module.n_kv_heads, module.head_dim)
        if module.k_norm is not None:
            k = self.rms_norm(module.k_norm, k)
        return k if rope is None else rotate(k, rope), v

    def project(self, module: Attention, attended: Node) -> Node:
        """[..., N, H] back to [..., D]."""
        joined = op.reshape(attended, ints(0, 0, module.n_heads * module.head_dim), special_zero=True)
        return self.linear(module.o_proj, joined)

    def attended(self, module: Attention, norm: nn.Module, x: Node, found: Node) -> Node:
        """x plus an attention sub-layer, which `found` [..., N, H]."""
        return op.add(x, self.rms_norm(norm, self.project(module, found)))

    def feed_forward(self, block: Block, x: Node) -> Node:
        """x plus the MLP sub-layer, see `Block.feed_forward`."""
        inner = self.mlp(block.mlp, self.rms_norm(block.pre_feedforward_layernorm, x))
        return op.add(x, self.rms_norm(block.post_feedforward_layernorm, inner))

    def head(self, module: LMHead, x: Node) -> Node:
        """Logits, after the soft-cap where there is one."""
        logits = self.linear(module.out_proj, x)
        return logits if module.softcap is None else softcapped(logits, module.softcap)

    def embedding(self, module: Embedding, ids: Node) -> Node:
        """See `models.layers.Embedding`. The table is kept as it is, or in int8 where matrices have fewer bits than
        floats: a row is all that a token is known by."""
        axis = ints(0)
        if self.weights == "float":
            x = op.gather(_shared_constant(module.weight), ids, axis)
        else:
            rounded, scale = _int8_rows(module.weight)
            rows = op.convert(op.gather(rounded, ids, axis), np.float32)
            x = op.multiply(rows, op.gather(scale, ids, axis))
        if module.scale is not None:
            x = op.multiply(x, np.float32(module.scale))
        if module.eoi_token_id is not None:
            is_eoi = op.unsqueeze(op.equal(ids, np.int64(module.eoi_token_id)), ints(-1))
            x = op.select(is_eoi, _constant(module.eoi_embedding), x)
        return x

    def _matrix(self, weight: Tensor) -> Node:
        """A weight [out, in], which multiplies in float32 whatever it is kept in."""
        if self.weights == "float":
            return _shared_constant(weight)
        n_out, n_in = weight.shape
        if self.weights == "int8":
            rounded_rows, row_scale = _int8_rows(weight)
            return op.multiply(op.convert(rounded_rows, np.float32), row_scale)
        group = next(size for size in (_INT4_GROUP, 32, 16, 8, 4, 2, 1) if n_in % size == 0)
        grouped = weight.float().view(n_out, n_in // group, group)
        # The largest number becomes -8 or 8, whichever sign it has: 16 steps of which none is lost.
        largest = grouped.gather(2, grouped.abs().argmax(dim=2, keepdim=True))
        scale = -largest / 8.0
        scale = torch.where(scale == 0, 1e-30, scale)
        rounded = (grouped / scale).round_().clamp_(-8, 7).to(torch.int8)
        stored = op.convert(_int4_constant(rounded), np.float32)
        whole = op.multiply(stored, _constant(scale))
        return op.reshape(whole, ints(n_out, n_in), special_zero=False)


def split_heads(x: Node, n_heads: int, head_dim: int) -> Node:
    """[A, B, heads H] to [A, B, heads, H]."""
    return op.reshape(x, ints(0, 0, n_heads, head_dim), special_zero=True)


def rotate(x: Node, rope: Rope) -> Node:
    """RoPE in its half-rotation form, see `models.layers.rotate`."""
    cos, sin = rope
    first, second = op.split(x, np.int64(-1), 2).outputs()
    turned = op.concat([op.negative(second), first], -1)
    return op.add(op.multiply(x, cos), op.multiply(turned, sin))


def softcapped(x: Node, cap: float) -> Node:
    """cap * tanh(x / cap)."""
    return op.multiply(op.tanh(op.divide(x, np.float32(cap))), np.float32(cap))


def parameter(name: str, shape: Sequence[int], dtype: npt.DTypeLike = np.float32) -> Node:
    """An input; -1 where its size is known when it comes."""
    node = op.parameter(list(shape), dtype, name=name)
    node.output(0).set_names({name})
    return node


def model_of(outputs: Sequence[Node], parameters: Sequence[Node], name: str) -> ov.Model:
    """A graph, its outputs in this order."""
    return ov.Model([op.result(x) for x in outputs], list(parameters), name)


def ints(*values: int) -> npt.NDArray[np.int64]:
    """A shape or axes."""
    return np.array(values, np.int64)


def _constant(x: Tensor) -> Node:
    return op.constant(x.detach().float().contiguous().numpy())


def _shared_constant(x: Tensor) -> Node:
    """Kept in the tensor's own memory where it is float32: OpenVINO's copies of all matrices took as much again."""
    return op.constant(x.detach().float().contiguous().numpy(), shared_memory=True)


def _int8_rows(weight: Tensor) -> tuple[Node, Node]:
    """A matrix in int8, and the scale of each row, [out, 1]."""
    rounded, scale = int8_rows(weight)
    return op.constant(rounded.numpy()), _constant(scale)


def _int4_constant(x: Tensor) -> Node:
    """Integers from -8 to 7, two in a byte, the first in its lower half."""
    flat = x.reshape(-1, 2).to(torch.int16) & 0xF
    stored = ov.Tensor(ov.Type.i4, ov.Shape(list(x.shape)))
    stored.data[:] = (flat[:, 0] | (flat[:, 1] << 4)).to(torch.uint8).view(torch.int8).numpy()
    return ov.op.Constant(stored)
