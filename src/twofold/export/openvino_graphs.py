"""The two graphs of an export to OpenVINO, which take token ids and padding masks and nothing that has to be computed.

The encoder hands over what decoder layers make of it, the source's keys and values, so that they are computed once;
this is the one form that serves every way in which two stacks meet. The decoder keeps the keys and values of its own
tokens as states. See docs/exports.md for inputs and outputs.

Letters: B batch, S source tokens, T new decoder tokens, P decoder tokens before them, L tokens of one side, N query
heads, K key-value heads, G = N / K, H head_dim, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import openvino as ov
import openvino.opset15 as op

from twofold.config import LayerType, StackConfig
from twofold.infer.backends.openvino.encoder import Mask, read_source
from twofold.infer.backends.openvino.lower import (
    HIDDEN,
    Lowering,
    Node,
    Rope,
    ints,
    parameter,
    softcapped,
)
from twofold.models import EncoderDecoder
from twofold.models.attention import Attention
from twofold.models.layers import rope_frequencies
from twofold.models.masks import Rule, decoder_rule, encoder_rule
from twofold.models.stack import DecoderBlock

_HEADS_FIRST = ints(0, 2, 1, 3)
"""[B, L, heads, H] to [B, heads, L, H]."""


def encoder_graph(model: EncoderDecoder, lower: Lowering) -> ov.Model:
    """`input_ids` and `attention_mask` to `source_keys.i` and `source_values.i`, [B, K, S, H], of decoder layer i."""
    encoder, decoder = model.encoder, model.decoder
    config = encoder.stack_config
    input_ids, attention_mask = _integers("input_ids"), _integers("attention_mask")
    places = _Places.of(attention_mask)
    masks = {}
    kinds = list(zip(config.layer_types, encoder.layer_masks, strict=True))
    for kind in dict.fromkeys(kinds):
        seen, distance = _seen(places.positions, places, encoder_rule(config, *kind))
        later = None
        if encoder.future_share < 1.0:
            is_later = op.logical_and(seen, op.less(distance, np.int64(0)))
            later = op.unsqueeze(op.convert(is_later, np.float32), ints(1))
        masks[kind] = (_hidden(seen), later)
    in_order: list[Mask] = [masks[kind] for kind in kinds]
    read = read_source(
        model,
        lower,
        lower.embedding(encoder.embed_tokens, input_ids),
        _ropes(config, places.positions),
        _ropes(decoder.stack_config, places.positions) if decoder.cross_rope else {},
        in_order,
    )
    outputs = [
        _named(op.transpose(part, _HEADS_FIRST), f"source_{name}.{i}")
        for i, parts in enumerate(read)
        for name, part in zip(("keys", "values"), parts, strict=True)
    ]
    return ov.Model([op.result(x) for x in outputs], [input_ids, attention_mask], "encoder")


def decoder_graph(model: EncoderDecoder, lower: Lowering) -> ov.Model:
    """`logits` [B, T, V] of the next T tokens `input_ids`, which stand behind those of the states.

    `attention_mask` [B, P + T] is of all decoder tokens, `encoder_attention_mask` [B, S] and the encoder's outputs are
    of the source, where one row can stand for all. `beam_idx` [B] says which row of the states each row goes on from.
    """
    decoder = model.decoder
    config = decoder.stack_config
    input_ids, attention_mask, source_mask = (
        _integers(name) for name in ("input_ids", "attention_mask", "encoder_attention_mask")
    )
    beam_idx = parameter("beam_idx", [-1], np.int32)
    inputs = [input_ids, attention_mask, source_mask, beam_idx]
    source, own = _Places.of(source_mask), _Places.of(attention_mask)
    if decoder.continues:
        own = own.moved(source.length)
    n_new = _size(input_ids, 1)
    new_positions = op.slice(own.positions, op.negative(n_new), _size(attention_mask, 1), ints(1), ints(1))
    masks = _decoder_masks(model, new_positions, source, own)
    has_source = op.unsqueeze(op.convert(op.greater(source.length, np.int64(0)), np.float32), ints(2, 3))

    states = _States(beam_idx, config)
    ropes = _ropes(config, new_positions)
    x = lower.embedding(decoder.embed_tokens, input_ids)
    for i, (layer, layer_type) in enumerate(zip(decoder.layers, config.layer_types, strict=True)):
        assert isinstance(layer, DecoderBlock)
        rope, mask = ropes[layer_type], masks[layer_type]
        shape = [-1, config.num_key_value_heads, -1, config.head_dim]
        of_source = _KeysValues(*(parameter(f"source_{part}.{i}", shape) for part in ("keys", "values")))
        inputs.extend(of_source)

        read = lower.rms_norm(layer.pre_self_attn_layernorm, x)
        q, new = lower.queries(layer.self_attn, read, rope), lower.keys_values(layer.self_attn, read, rope)
        parts = [(states.grown_by(i, *new), mask.of_own)]
        if decoder.is_merged:
            parts.insert(0, (of_source, mask.of_source))
        found = _attend(layer.self_attn, q, parts)
        x = lower.attended(layer.self_attn, layer.post_self_attn_layernorm, x, found)
        if not decoder.is_merged:
            read = lower.rms_norm(layer.pre_cross_attn_layernorm, x)
            q = lower.queries(layer.cross_attn, read, rope if decoder.cross_rope else None)
            found = op.multiply(_attend(layer.cross_attn, q, [(of_source, mask.of_source)]), has_source)
            x = lower.attended(layer.cross_attn, layer.post_cross_attn_layernorm, x, found)
        x = lower.feed_forward(layer, x)
    logits = _named(lower.head(model.lm_head, lower.rms_norm(decoder.norm, x)), "logits")
    return ov.Model([op.result(logits)], states.sinks, inputs, "decoder")


class _Places(NamedTuple):
    """Where the tokens of one side stand, as `models.masks.Tokens`."""

    positions: Node
    """int64 [B, L], from the first real token on."""
    is_real: Node
    """bool [B, L]."""
    length: Node
    """int64 [B, 1]: the position after the last real token; 0 where there is none."""

    @classmethod
    def of(cls, mask: Node) -> Self:
        """`mask`: int64 [B, L], 0 is padding."""
        zero, one = np.int64(0), np.int64(1)
        is_real = op.not_equal(mask, zero)
        n_tokens = op.squeeze(_size(mask, 1), ints(0))
        index = op.range(zero, n_tokens, one, output_type="i64")
        first = op.reduce_min(op.select(is_real, index, n_tokens), ints(1), keep_dims=True)
        positions = op.subtract(index, first)
        counted = op.select(is_real, op.add(positions, one), zero)
        return cls(positions, is_real, op.reduce_max(counted, ints(1), keep_dims=True))

    def moved(self, by: Node) -> Self:
        """Behind `by` tokens, int64 [B, 1]."""
        return self._replace(positions=op.add(self.positions, by))


class _KeysValues(NamedTuple):
    """[B, K, L, H] each."""

    keys: Node
    values: Node


class _DecoderMask(NamedTuple):
    """What is added to scores: float32, [B, 1, G T, S] and [B, 1, G T, P + T]; 1 instead of G T where it is the same
    for all."""

    of_source: Node
    of_own: Node


class _States:
    """Keys and values of the decoder's own tokens, which stay in the graph between calls."""

    def __init__(self, beam_idx: Node, config: StackConfig) -> None:
        self._beam_idx = beam_idx
        self._shape = [-1, config.num_key_value_heads, -1, config.head_dim]
        sizes = [_size(beam_idx, 0), ints(config.num_key_value_heads, 0, config.head_dim)]
        self._nothing = op.broadcast(np.float32(0.0), op.concat(sizes, 0))
        self.sinks: list[Node] = []

    def grown_by(self, layer: int, k: Node, v: Node) -> _KeysValues:
        """Those of layer i with the new tokens' behind them; `k`, `v`: [B, T, K, H]."""
        return _KeysValues(self._grown(f"keys.{layer}", k), self._grown(f"values.{layer}", v))

    def _grown(self, name: str, new: Node) -> Node:
        before = op.read_value(self._nothing, name, np.float32, self._shape)
        chosen = op.gather(before, self._beam_idx, ints(0))
        after = op.concat([chosen, op.transpose(new, _HEADS_FIRST)], 2)
        self.sinks.append(op.assign(after, name))
        return after


def _decoder_masks(
    model: EncoderDecoder, new_positions: Node, source: _Places, own: _Places
) -> dict[LayerType, _DecoderMask]:
    """For each layer type; `new_positions` [B, T] are those of the queries."""
    decoder = model.decoder
    config = decoder.stack_config
    n_groups = config.num_attention_heads // config.num_key_value_heads

    def hidden(keys: _Places, rule: Rule) -> Node:
        mask = _hidden(_seen(new_positions, keys, rule)[0])
        return mask if rule == Rule() else op.concat([mask] * n_groups, 2)

    masks = {}
    for layer_type in dict.fromkeys(config.layer_types):
        rule = decoder_rule(config, layer_type)
        source_rule = Rule(past=rule.past) if decoder.window_covers_source else Rule()
        masks[layer_type] = _DecoderMask(hidden(source, source_rule), hidden(own, rule))
    return masks


def _seen(query_positions: Node, keys: _Places, rule: Rule) -> tuple[Node, Node]:
    """Which keys each query sees, bool [B, T, L], or [B, 1, L] where it sees all real ones; and position(query) -
    position(key), [B, T, L]. See `models.masks`."""
    q = op.unsqueeze(query_positions, ints(2))
    distance = op.subtract(q, op.unsqueeze(keys.positions, ints(1)))
    seen = op.unsqueeze(keys.is_real, ints(1))
    if rule.past is not None:
        seen = op.logical_and(seen, op.less_equal(distance, np.int64(rule.past)))
    if rule.future is not None:
        seen = op.logical_and(seen, op.greater_equal(distance, np.int64(-rule.future)))
    if rule.sink:
        is_free = op.logical_or(op.greater(q, np.int64(0)), op.greater_equal(distance, np.int64(0)))
        seen = op.logical_and(seen, is_free)
    return seen, distance


def _hidden(seen: Node) -> Node:
    """What is added to scores, [B, 1, T or 1, L] of bool [B, T or 1, L]."""
    return op.unsqueeze(op.select(seen, np.float32(0.0), np.float32(HIDDEN)), ints(1))


def _attend(module: Attention, q: Node, parts: Sequence[tuple[_KeysValues, Node]]) -> Node:
    """[B, T, N, H] of queries [B, T, N, H]: one softmax over keys that lie in several places, each with its mask.

    The queries of the G heads that share keys stand in a row, [B, K, G T, H], so that no keys are copied.
    """
    n_kv, head_dim = module.n_kv_heads, module.head_dim
    n_groups = module.n_heads // n_kv
    q = op.reshape(q, ints(0, 0, n_kv, n_groups, head_dim), special_zero=True)
    q = op.reshape(op.transpose(q, ints(0, 2, 3, 1, 4)), ints(0, n_kv, -1, head_dim), special_zero=True)
    scores = []
    for kept, mask in parts:
        part = op.multiply(op.matmul(q, kept.keys, False, True), np.float32(module.scale))
        if module.softcap is not None:
            part = softcapped(part, module.softcap)
        scores.append(op.add(part, mask))
    weights = op.softmax(op.concat(scores, 3), -1)
    lengths = op.concat([_size(kept.keys, 2) for kept, _ in parts], 0)
    attended = [
        op.matmul(weight, kept.values, False, False)
        for weight, (kept, _) in zip(
            op.variadic_split(weights, np.int64(3), lengths).outputs(), parts, strict=True
        )
    ]
    total = attended[0]
    for more in attended[1:]:
        total = op.add(total, more)
    total = op.reshape(total, ints(0, n_kv, n_groups, -1, head_dim), special_zero=True)
    return op.reshape(
        op.transpose(total, ints(0, 3, 1, 2, 4)), ints(0, 0, module.n_heads, head_dim), special_zero=True
    )


def _ropes(config: StackConfig, positions: Node) -> dict[LayerType, Rope]:
    """Cosines and sines [B, L, 1, H] for each layer type, see `models.layers.rope_tables`."""
    at = op.unsqueeze(op.convert(positions, np.float32), ints(2, 3))
    found = {}
    for layer_type in dict.fromkeys(config.layer_types):
        angles = op.multiply(at, rope_frequencies(config.rope[layer_type], config.head_dim).numpy())
        angles = op.concat([angles, angles], -1)
        found[layer_type] = (op.cos(angles), op.sin(angles))
    return found


def _integers(name: str) -> Node:
    return parameter(name, [-1, -1], np.int64)


def _named(x: Node, name: str) -> Node:
    x.output(0).set_names({name})
    return x


def _size(x: Node, axis: int) -> Node:
    """int64 [1]: x's size along an axis."""
    return op.gather(op.shape_of(x), ints(axis), ints(0))
