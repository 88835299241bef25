"""A stack of transformer blocks: the encoder, and the decoder that reads it.

Parameters are named as in T5Gemma checkpoints, so that for those the tensor map is the identity. Nothing here
asks which family a stack came from; `StackConfig` says what differs.

Letters: B batch, S source (encoder) tokens, T target (decoder) tokens, D width of this stack, E width of the
encoder, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from twofold.config import EncoderDecoderConfig, LayerType, StackConfig
from twofold.models.attention import Attention, RopeTables
from twofold.models.cache import DecoderCache, KeyValues, LayerCache
from twofold.models.layers import Embedding, GatedMLP, RMSNorm, rope_tables
from twofold.models.masks import AttentionMask, Rule, Tokens, decoder_rule, encoder_rule


@dataclass(frozen=True)
class EncoderOutput:
    """What the encoder hands over."""

    last_hidden_state: Tensor
    """[B, S, E], after the final norm."""
    memory: tuple[Tensor, ...]
    """What decoder layers make keys and values from: one [B, S, E] for all of them (`final` reads), or one for
    each (`aligned`)."""
    tokens: Tokens
    """Positions and segments of the source, [B, S]."""
    hidden_states: tuple[Tensor, ...] = ()
    """On request: the input of every layer, then the normed output."""

    def select(self, rows: Tensor) -> EncoderOutput:
        """The given batch rows, int64 [B'], in that order."""
        tokens = Tokens(self.tokens.positions[rows], self.tokens.segments[rows], self.tokens.is_plain)
        memory = tuple(m[rows] for m in self.memory)
        hidden = tuple(h[rows] for h in self.hidden_states)
        return EncoderOutput(self.last_hidden_state[rows], memory, tokens, hidden)


class Block(nn.Module):
    """What encoder and decoder blocks share: self-attention, MLP, and the norms around them."""

    def __init__(self, config: StackConfig, *, source_size: int | None = None) -> None:
        super().__init__()
        self.self_attn = Attention(config, memory_size=config.hidden_size, source_size=source_size)
        self.pre_self_attn_layernorm = RMSNorm(config.hidden_size, config)
        self.post_self_attn_layernorm = _post_norm(config)
        self.mlp = GatedMLP(config)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config)
        self.post_feedforward_layernorm = _post_norm(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def feed_forward(self, x: Tensor) -> Tensor:
        """x plus the MLP sub-layer."""
        out: Tensor = self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        dropped: Tensor = self.dropout(out)
        return x + dropped


def _post_norm(config: StackConfig) -> nn.Module:
    return RMSNorm(config.hidden_size, config) if config.post_norms else nn.Identity()


class EncoderBlock(Block):
    """Self-attention under the layer's own mask, then the MLP."""

    def forward(self, x_BSD: Tensor, rope: RopeTables, mask: AttentionMask) -> tuple[Tensor, Tensor]:
        """Returns the block's output, and what its self-attention read (the normed input): both [B, S, D]."""
        read = self.pre_self_attn_layernorm(x_BSD)
        q = self.self_attn.queries(read, rope)
        attended = self.self_attn(q, self.self_attn.keys_values(read, rope), mask)
        x_BSD = x_BSD + self.dropout(self.post_self_attn_layernorm(attended))
        return self.feed_forward(x_BSD), read


Observer = Callable[[Attention, Tensor, KeyValues, AttentionMask], None]
"""Called by each decoder layer in turn, before its attention to the source (the merged one, where it is that): with the
module, queries [B, N, T, H], what they attend to, and the mask over it."""


@dataclass(frozen=True)
class DecoderView:
    """What a decoder block needs beside its input, the same for all layers of one type."""

    rope: RopeTables
    """Of the T new tokens."""
    source_rope: RopeTables | None
    """Of the S source tokens; None where their keys are not rotated, or lie rotated in the cache."""
    rotates_cross: bool
    """Queries of a cross-attention sub-layer are rotated too."""
    self_mask: AttentionMask
    """Over the decoder's own keys; in the merged layout over the source's keys, then the decoder's own."""
    cross_mask: AttentionMask
    """Over the source's keys; not used in the merged layout."""
    observe: Observer | None = None


class LayerKeys(Protocol):
    """The keys and values that one decoder layer attends to, however they are kept."""

    def attend_own(self, attention: Attention, q_BNTH: Tensor, new: KeyValues) -> Tensor:
        """Take in the new tokens' keys and values, attend to the decoder's own, project: [B, T, D]."""
        ...

    def attend_both(self, attention: Attention, q_BNTH: Tensor, new: KeyValues) -> Tensor:
        """The same in one softmax over the source and the decoder's own."""
        ...

    def attend_source(self, attention: Attention, q_BNTH: Tensor) -> Tensor:
        """Attend to the source alone, project: [B, T, D]."""
        ...


@dataclass
class MaskedKeys:
    """`LayerKeys` as tensors over the whole batch, under the masks of a view."""

    view: DecoderView
    source: KeyValues
    own: KeyValues | None
    """Of earlier tokens; the new ones are added."""

    def attend_own(self, attention: Attention, q_BNTH: Tensor, new: KeyValues) -> Tensor:
        self.own = new if self.own is None else self.own.followed_by(new)
        out: Tensor = attention(q_BNTH, self.own, self.view.self_mask)
        return out

    def attend_both(self, attention: Attention, q_BNTH: Tensor, new: KeyValues) -> Tensor:
        self.own = new if self.own is None else self.own.followed_by(new)
        return self._attend_seen(attention, q_BNTH, self.source.followed_by(self.own), self.view.self_mask)

    def attend_source(self, attention: Attention, q_BNTH: Tensor) -> Tensor:
        return self._attend_seen(attention, q_BNTH, self.source, self.view.cross_mask)

    def _attend_seen(
        self, attention: Attention, q_BNTH: Tensor, keys_values: KeyValues, mask: AttentionMask
    ) -> Tensor:
        if self.view.observe is not None:
            self.view.observe(attention, q_BNTH, keys_values, mask)
        out: Tensor = attention(q_BNTH, keys_values, mask)
        return out


class DecoderBlock(Block):
    """Self-attention, attention to the source (a sub-layer of its own, or merged into the first), MLP."""

    def __init__(
        self, config: StackConfig, *, is_merged: bool, memory_size: int, has_source_projections: bool
    ) -> None:
        super().__init__(config, source_size=memory_size if has_source_projections else None)
        self.is_merged = is_merged
        if not is_merged:
            self.cross_attn = Attention(config, memory_size=memory_size)
            self.pre_cross_attn_layernorm = RMSNorm(config.hidden_size, config)
            self.post_cross_attn_layernorm = _post_norm(config)

    def forward(
        self, x_BTD: Tensor, memory_BSE: Tensor, view: DecoderView, past: LayerCache | None
    ) -> tuple[Tensor, LayerCache]:
        """Returns the block's output [B, T, D], and all keys and values it saw. The source's are computed from
        `memory_BSE` unless `past` has them."""
        x_BTD, seen = self.attend(x_BTD, memory_BSE, view, past)
        return self.feed_forward(x_BTD), seen

    def attend(
        self, x_BTD: Tensor, memory_BSE: Tensor, view: DecoderView, past: LayerCache | None
    ) -> tuple[Tensor, LayerCache]:
        """`forward` up to the MLP."""
        source = self.read_source(memory_BSE, view.source_rope) if past is None else past.source
        keys = MaskedKeys(view, source, None if past is None else past.own)
        x_BTD = self.sublayers(x_BTD, view.rope, view.rope if view.rotates_cross else None, keys)
        assert keys.own is not None
        return x_BTD, LayerCache(keys.own, source)

    def read_source(self, memory_BSE: Tensor, rope: RopeTables | None) -> KeyValues:
        """Keys and values of the source, each [B, K, S, H]."""
        reader = self.self_attn if self.is_merged else self.cross_attn
        return reader.source_keys_values(memory_BSE, rope)

    def sublayers(
        self, x_BTD: Tensor, rope: RopeTables, cross_rope: RopeTables | None, keys: LayerKeys
    ) -> Tensor:
        """x [B, T, D] plus its attention sub-layers, whose keys and values lie in `keys`."""
        read = self.pre_self_attn_layernorm(x_BTD)
        q, new = self.self_attn.queries(read, rope), self.self_attn.keys_values(read, rope)
        read_own = keys.attend_both if self.is_merged else keys.attend_own
        x_BTD = x_BTD + self.dropout(self.post_self_attn_layernorm(read_own(self.self_attn, q, new)))
        if not self.is_merged:
            q = self.cross_attn.queries(self.pre_cross_attn_layernorm(x_BTD), cross_rope)
            attended = keys.attend_source(self.cross_attn, q)
            x_BTD = x_BTD + self.dropout(self.post_cross_attn_layernorm(attended))
        return x_BTD


class Stack(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: StackConfig, blocks: Iterable[Block], eoi_token_id: int | None) -> None:
        super().__init__()
        self.stack_config = config
        self.embed_tokens = Embedding(config, eoi_token_id)
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def rope(self, positions: Tensor) -> dict[LayerType, RopeTables]:
        """Rotation tables for each layer type, for int64 positions [B, L]."""
        config = self.stack_config
        types = dict.fromkeys(config.layer_types)
        return {t: rope_tables(config.rope[t], config.head_dim, positions) for t in types}


class Encoder(Stack):
    """Reads the source. Which keys a token sees is set per layer (`encoder_mask`)."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        blocks = (EncoderBlock(config.encoder) for _ in range(config.encoder.num_hidden_layers))
        super().__init__(config.encoder, blocks, config.eoi_token_id)
        self.layer_masks, self.future_share = config.encoder_mask, config.encoder_future_share
        self.aligned_layers = config.aligned_layers

    def forward(
        self, input_ids: Tensor, tokens: Tokens, *, output_hidden_states: bool = False
    ) -> EncoderOutput:
        """Args:
        input_ids: int64 [B, S].
        tokens: their positions and segments.
        """
        config = self.stack_config
        rope = self.rope(tokens.positions)
        kinds = list(zip(config.layer_types, self.layer_masks, strict=True))
        rules = {kind: encoder_rule(config, *kind, self.future_share) for kind in set(kinds)}
        masks = {kind: AttentionMask(tokens, (tokens, rule)) for kind, rule in rules.items()}

        x_BSE = self.dropout(self.embed_tokens(input_ids))
        hidden: list[Tensor] = []
        read_by_layer: dict[int, Tensor] = {}
        for i, (layer, kind) in enumerate(zip(self.layers, kinds, strict=True)):
            hidden.append(x_BSE)
            x_BSE, read_BSE = layer(x_BSE, rope[kind[0]], masks[kind])
            if self.aligned_layers is not None and i in self.aligned_layers:
                read_by_layer[i] = read_BSE
        x_BSE = self.dropout(self.norm(x_BSE))
        memory: tuple[Tensor, ...] = (x_BSE,)
        if self.aligned_layers is not None:
            memory = tuple(read_by_layer[i] for i in self.aligned_layers)
        all_hidden = (*hidden, x_BSE) if output_hidden_states else ()
        return EncoderOutput(x_BSE, memory, tokens, all_hidden)


class Decoder(Stack):
    """Writes the target, reading the source through cross-attention or merged attention."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        is_merged = config.layout == "merged"
        blocks = (
            DecoderBlock(
                config.decoder,
                is_merged=is_merged,
                memory_size=config.encoder.hidden_size,
                has_source_projections=config.source_projections == "own",
            )
            for _ in range(config.decoder.num_hidden_layers)
        )
        super().__init__(config.decoder, blocks, config.eoi_token_id)
        self.is_merged = is_merged
        self.cross_rope = config.cross_rope
        self.continues = config.decoder_positions == "continue"
        self.window_covers_source = config.window_covers_source
        self.first_layer = {
            t: config.decoder.layer_types.index(t) for t in dict.fromkeys(config.decoder.layer_types)
        }

    def forward(
        self,
        input_ids: Tensor,
        segments: Tensor,
        source: EncoderOutput,
        cache: DecoderCache | None = None,
        *,
        is_plain: bool = False,
        output_hidden_states: bool = False,
        observe: Observer | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Args:
            input_ids: int64 [B, T], the tokens after those in `cache`.
            segments: int64 [B, T], see `Tokens`; `is_plain` as there.
            source: the encoder's output; with a filled cache only its tokens are looked at.
            cache: read and extended in place.
            observe: is shown what each layer's attention to the source is computed from.

        Returns:
            Normed hidden states [B, T, D]; and, on request, the input of every layer, then that.
        """
        n_new = input_ids.shape[1]
        own_tokens = self._own_tokens(segments, source.tokens, cache, is_plain)
        queries = own_tokens.last(n_new)
        past = cache.layers if cache is not None and cache.layers else None
        rope = self.rope(queries.positions)
        source_rope = self.rope(source.tokens.positions) if self.cross_rope and past is None else {}
        cross_mask = AttentionMask(queries, (source.tokens, Rule()))
        views = {}
        for layer_type, first in self.first_layer.items():
            n_past = 0 if past is None else past[first].own.length
            keys = own_tokens.last(n_past + n_new)
            views[layer_type] = DecoderView(
                rope[layer_type],
                source_rope.get(layer_type),
                self.cross_rope,
                self._self_mask(layer_type, queries, keys, source.tokens),
                cross_mask,
                observe,
            )

        x_BTD = self.dropout(self.embed_tokens(input_ids))
        hidden: list[Tensor] = []
        kept: list[LayerCache] = []
        for i, (layer, layer_type) in enumerate(zip(self.layers, self.stack_config.layer_types, strict=True)):
            hidden.append(x_BTD)
            memory = source.memory[i if len(source.memory) > 1 else 0]
            x_BTD, seen = layer(x_BTD, memory, views[layer_type], None if past is None else past[i])
            if cache is not None:
                # Positions count gaps, so that no later token sees more than `past` columns back.
                reach = decoder_rule(self.stack_config, layer_type).past
                own = seen.own if reach is None else seen.own.last(reach)
                kept.append(LayerCache(own, seen.source))
        if cache is not None:
            cache.layers, cache.segments, cache.is_plain = kept, own_tokens.segments, own_tokens.is_plain
        x_BTD = self.dropout(self.norm(x_BTD))
        return x_BTD, (*hidden, x_BTD) if output_hidden_states else ()

    def read_source(self, source: EncoderOutput) -> list[KeyValues]:
        """Keys and values of the source for every layer."""
        rope = self.rope(source.tokens.positions) if self.cross_rope else {}
        return [
            layer.read_source(source.memory[i if len(source.memory) > 1 else 0], rope.get(layer_type))
            for i, (layer, layer_type) in enumerate(
                zip(self.layers, self.stack_config.layer_types, strict=True)
            )
            if isinstance(layer, DecoderBlock)
        ]

    def step(
        self,
        input_ids: Tensor,
        positions: Tensor,
        keys: Sequence[LayerKeys],
        rope: dict[LayerType, RopeTables] | None = None,
    ) -> Tensor:
        """One token more for rows whose keys and values somebody else keeps.

        Args:
            input_ids: int64 [B, 1]. What rows have to do with each other, `keys` know: they may be several texts, or
                several tokens of one.
            positions: int64 [B, 1], behind the source for a continuing decoder.
            keys: one per layer; each takes in the new token's.
            rope: `self.rope(positions)`, from a caller that makes it without leaving the device.

        Returns:
            Normed hidden states [B, 1, D].
        """
        rope = rope or self.rope(positions)
        x_BTD = self.embed_tokens(input_ids)
        for layer, layer_type, layer_keys in zip(
            self.layers, self.stack_config.layer_types, keys, strict=True
        ):
            assert isinstance(layer, DecoderBlock)
            rotation = rope[layer_type]
            x_BTD = layer.sublayers(x_BTD, rotation, rotation if self.cross_rope else None, layer_keys)
            x_BTD = layer.feed_forward(x_BTD)
        out: Tensor = self.norm(x_BTD)
        return out

    def _own_tokens(
        self, segments: Tensor, source: Tokens, cache: DecoderCache | None, is_plain: bool
    ) -> Tokens:
        """All decoder tokens so far, those of the cache first."""
        if cache is not None and cache.segments is not None:
            segments = torch.cat([cache.segments, segments], dim=1)
            is_plain = is_plain and cache.is_plain
        tokens = Tokens.from_segments(segments, is_plain=is_plain)
        return tokens.continued_after(source) if self.continues else tokens

    def _self_mask(
        self, layer_type: LayerType, queries: Tokens, keys: Tokens, source: Tokens
    ) -> AttentionMask:
        rule = decoder_rule(self.stack_config, layer_type)
        if not self.is_merged:
            return AttentionMask(queries, (keys, rule))
        source_rule = Rule(past=rule.past) if self.window_covers_source else Rule()
        return AttentionMask(queries, (source, source_rule), (keys, rule))
