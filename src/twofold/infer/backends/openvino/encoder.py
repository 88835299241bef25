"""The encoder as one OpenVINO graph: embedded source in, keys and values of the source for every decoder layer out.

Letters: B batch, S source tokens, E width of the encoder, N query heads, K key-value heads, G = N / K, H head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as op
import torch
from torch import Tensor

from twofold.config import EncoderMask, LayerType
from twofold.infer.backends.openvino.compiling import Compiler
from twofold.infer.backends.openvino.lower import (
    HIDDEN,
    Lowering,
    Node,
    Rope,
    ints,
    model_of,
    parameter,
    softcapped,
)
from twofold.models import EncoderDecoder
from twofold.models.attention import Attention
from twofold.models.masks import AttentionMask, Tokens, encoder_rule
from twofold.models.stack import DecoderBlock, Encoder, EncoderBlock

Kind = tuple[LayerType, EncoderMask]
Mask = tuple[Node, Node | None]
"""[B, 1, S, S] each: what is added to scores, and 1 where a key stands after the query, else 0; None where what those
get is not limited."""

MAX_SCORES = 2**28
"""Attention scores of one layer, [B, N, S, S], that exist at the same time where soft-caps or a limited share keep
OpenVINO's fused kernel from being used: 1 GB in float32. Longer sources are read by our own modules."""


class EncoderGraph:
    """Reads sources.

    Args:
        model: whose weights are read; it stays what embeds tokens.
        lowering: how weights are kept.
        compiler: from a graph to what runs it.
    """

    def __init__(self, model: EncoderDecoder, lowering: Lowering, compiler: Compiler) -> None:
        self._model, self._lower = model, lowering
        encoder = model.encoder
        config = encoder.stack_config
        self._kinds: list[Kind] = list(zip(config.layer_types, encoder.layer_masks, strict=True))
        self._is_limited = encoder.future_share < 1.0
        self.is_fused = is_fused(encoder)
        self._compiled = compiler(self._graph())

    def fits(self, batch_size: int, n_source: int) -> bool:
        """Whether attention over sources of this padded size has room."""
        scores = batch_size * self._model.config.encoder.num_attention_heads * n_source**2
        return self.is_fused or scores <= MAX_SCORES

    @torch.no_grad()
    def run(self, input_ids: Tensor, is_real: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the source for each decoder layer.

        Args:
            input_ids: int64 [B, S].
            is_real: bool [B, S], False where padded on the right.

        Returns:
            For each decoder layer float32 keys [B, K, H, S], transposed, and values [B, K, S, H]. They lie in memory
            that the next call writes to.
        """
        encoder, decoder = self._model.encoder, self._model.decoder
        tokens = Tokens.from_segments(is_real.long())
        inputs = {"x": encoder.embed_tokens(input_ids).float()}
        for layer_type, tables in encoder.rope(tokens.positions).items():
            inputs |= {f"{part}_{layer_type}": x for part, x in zip(("cos", "sin"), tables, strict=True)}
        if decoder.cross_rope:
            for layer_type, tables in decoder.rope(tokens.positions).items():
                inputs |= {
                    f"source_{part}_{layer_type}": x for part, x in zip(("cos", "sin"), tables, strict=True)
                }
        for kind in dict.fromkeys(self._kinds):
            rule = encoder_rule(encoder.stack_config, *kind)
            mask = AttentionMask(tokens, (tokens, rule))
            inputs[_name("mask", kind)] = torch.where(mask.dense, 0.0, HIDDEN)[:, None]
            if self._is_limited:
                inputs[_name("later", kind)] = mask.later.dense[:, None].float()
        for name in self._inputs:
            x = inputs[name].transpose(1, 2) if "cos_" in name or "sin_" in name else inputs[name]
            self._request.set_tensor(name, ov.Tensor(x.contiguous().numpy(), shared_memory=False))
        self._request.infer()
        outputs = [torch.from_numpy(self._request.get_output_tensor(i).data) for i in range(self._n_outputs)]
        return list(zip(outputs[::2], outputs[1::2], strict=True))

    @cached_property
    def _request(self) -> Any:
        return self._compiled.result().create_infer_request()

    def _graph(self) -> ov.Model:
        encoder, decoder = self._model.encoder, self._model.decoder
        config, lower = encoder.stack_config, self._lower
        x = parameter("x", [-1, -1, config.hidden_size])
        parameters = [x]

        def ropes(prefix: str, layer_types: Sequence[LayerType], head_dim: int) -> dict[LayerType, Rope]:
            found = {}
            for layer_type in dict.fromkeys(layer_types):
                cos, sin = (
                    parameter(f"{prefix}{part}_{layer_type}", [-1, -1, 1, head_dim])
                    for part in ("cos", "sin")
                )
                parameters.extend((cos, sin))
                found[layer_type] = (cos, sin)
            return found

        rope = ropes("", config.layer_types, config.head_dim)
        source_rope: dict[LayerType, Rope] = {}
        if decoder.cross_rope:
            source_rope = ropes("source_", decoder.stack_config.layer_types, decoder.stack_config.head_dim)
        masks: dict[Kind, Mask] = {}
        for kind in dict.fromkeys(self._kinds):
            mask = parameter(_name("mask", kind), [-1, 1, -1, -1])
            later = parameter(_name("later", kind), [-1, 1, -1, -1]) if self._is_limited else None
            parameters.extend([mask] if later is None else [mask, later])
            masks[kind] = (mask, later)

        read = read_source(self._model, lower, x, rope, source_rope, [masks[kind] for kind in self._kinds])
        outputs = []
        for keys, values in read:
            outputs += [
                op.transpose(keys, ints(0, 2, 3, 1)),
                op.transpose(values, ints(0, 2, 1, 3)),
            ]
        self._inputs, self._n_outputs = [p.get_friendly_name() for p in parameters], len(outputs)
        return model_of(outputs, parameters, "encoder")


def is_fused(encoder: Encoder) -> bool:
    """Whether its attention is OpenVINO's fused kernel, which has no soft-cap and no limited share."""
    return encoder.stack_config.attn_logit_softcapping is None and encoder.future_share == 1.0


def read_source(
    model: EncoderDecoder,
    lower: Lowering,
    x: Node,
    rope: Mapping[LayerType, Rope],
    source_rope: Mapping[LayerType, Rope],
    masks: Sequence[Mask],
) -> list[tuple[Node, Node]]:
    """The encoder, and what decoder layers make of what it hands over.

    Args:
        lower: how weights are kept.
        x: the embedded source, [B, S, E].
        rope: of the encoder, [B, S, 1, H], for its layer types.
        source_rope: of the decoder, for the source's keys; empty where they are not rotated.
        masks: for each encoder layer.

    Returns:
        Keys and values [B, S, K, H] of the source for each decoder layer.
    """
    encoder, decoder = model.encoder, model.decoder
    read_by_layer: list[Node] = []
    for layer, layer_type, mask in zip(encoder.layers, encoder.stack_config.layer_types, masks, strict=True):
        assert isinstance(layer, EncoderBlock)
        read = lower.rms_norm(layer.pre_self_attn_layernorm, x)
        read_by_layer.append(read)
        found = _attend(encoder, lower, layer.self_attn, read, rope[layer_type], mask)
        x = lower.attended(layer.self_attn, layer.post_self_attn_layernorm, x, found)
        x = lower.feed_forward(layer, x)
    aligned = encoder.aligned_layers
    if aligned is None:
        memory = [lower.rms_norm(encoder.norm, x)] * len(decoder.layers)
    else:
        memory = [read_by_layer[i] for i in aligned]

    found = []
    for layer, layer_type, read in zip(decoder.layers, decoder.stack_config.layer_types, memory, strict=True):
        assert isinstance(layer, DecoderBlock)
        reader = layer.self_attn if layer.is_merged else layer.cross_attn
        found.append(lower.keys_values(reader, read, source_rope.get(layer_type), of_source=True))
    return found


def _attend(encoder: Encoder, lower: Lowering, module: Attention, read: Node, rope: Rope, mask: Mask) -> Node:
    """[B, S, N, H] of what a layer reads, [B, S, E]."""
    n_heads, n_kv_heads, (hidden, later) = module.n_heads, module.n_kv_heads, mask
    heads_first = ints(0, 2, 1, 3)
    q = op.transpose(lower.queries(module, read, rope), heads_first)
    k, v = (op.transpose(part, heads_first) for part in lower.keys_values(module, read, rope))
    if n_heads != n_kv_heads:
        k, v = (_repeated(part, n_heads // n_kv_heads, n_heads, module.head_dim) for part in (k, v))
    if is_fused(encoder):
        attended = op.scaled_dot_product_attention(q, k, v, hidden, np.float32(module.scale))
        return op.transpose(attended, heads_first)
    scores = op.multiply(op.matmul(q, k, False, True), np.float32(module.scale))
    if module.softcap is not None:
        scores = softcapped(scores, module.softcap)
    weights = op.softmax(op.add(scores, hidden), -1)
    if later is not None:
        weights = _limit_share(weights, later, encoder.future_share)
    return op.transpose(op.matmul(weights, v, False, False), heads_first)


def _name(what: str, kind: Kind) -> str:
    return "_".join((what, *kind))


def _repeated(x: Node, times: int, n_heads: int, head_dim: int) -> Node:
    """[B, K, S, H] to [B, N, S, H], every head `times` in a row."""
    shape = op.concat([ints(1, 1, times), op.gather(op.shape_of(x), ints(2, 3), ints(0))], 0)
    many = op.broadcast(op.unsqueeze(x, ints(2)), shape, broadcast_spec="BIDIRECTIONAL")
    return op.reshape(many, ints(0, n_heads, -1, head_dim), special_zero=True)


def _limit_share(weights: Node, later: Node, share: float) -> Node:
    """See `models.masks.limit_share`; `later` is 1 where a key stands after the query, else 0."""
    one, none = np.float32(1.0), np.float32(0.0)
    last = ints(-1)
    of_later = op.reduce_sum(op.multiply(weights, later), last, keep_dims=True)
    of_earlier = op.reduce_sum(op.multiply(weights, op.subtract(one, later)), last, keep_dims=True)
    is_limited = op.logical_and(op.greater(of_later, np.float32(share)), op.greater(of_earlier, none))
    down = op.select(is_limited, op.divide(np.float32(share), op.select(is_limited, of_later, one)), one)
    up = op.select(
        is_limited, op.divide(np.float32(1.0 - share), op.select(is_limited, of_earlier, one)), one
    )
    factor = op.add(op.multiply(later, down), op.multiply(op.subtract(one, later), up))
    return op.multiply(weights, factor)
