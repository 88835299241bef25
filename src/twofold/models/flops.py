"""Exact floating-point operations of a pair, from its configuration alone.

What is counted: every matrix product, 2 operations per multiply-accumulate; attention by the pairs of query and key
that are *visible* (windows and causality to the token); the LM head on scored positions only, which is all the loss
computes. What is not: embedding look-ups, norms, RoPE, activations, softmax, the optimizer. A kernel that computes
hidden pairs too, or recomputes scores in its backward pass as fused attention does, gets no credit for them.

With n source and m target tokens, weights W of the linear layers, and N heads of width H:

    encoder          2 W_enc n
    decoder          2 W_dec m                   without cross-attention
    cross_attention  2 W_q,o m + 2 W_k,v n       its four projections; merged: k and v of the source
    attention        4 N H (visible pairs)       scores and values, summed over layers
    lm_head          2 V D (scored)

Backward: each product costs one more for the gradient of its input and one for that of its weight, each only where
somebody asks for it. A part that nothing trainable hangs on costs none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from twofold.config import EncoderDecoderConfig, StackConfig
from twofold.models.masks import Rule, decoder_rule, encoder_rule

Trained = Literal["everything", "cross_attention", "all_but_encoder"]
"""Which parameters get gradients. `cross_attention`: its projections and norms, as in the warm-up phase."""

Checkpointing = Literal["none", "selective", "full"]
"""What is computed again in the backward pass. `selective`: everything but matrix products and attention, so nothing
that is counted here; `full`: whole blocks."""


class Pairs(NamedTuple):
    """Visible (query, key) pairs, one number per layer."""

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]
    """Among the target's own tokens."""
    cross: tuple[int, ...]
    """Of target tokens with source tokens."""


@dataclass(frozen=True)
class Row:
    """What one row of a batch computes."""

    source_positions: int
    """Encoder positions, padding included: the linear layers run on all of them."""
    target_positions: int
    scored: int
    """Target positions with a label."""
    pairs: Pairs
    examples: int = 1
    answers: int = 1
    """To every example: the encoder reads it once, and keys and values of the source are made for each answer."""


@dataclass(frozen=True)
class Work:
    """Operations of one part in one training step of a row."""

    forward: int
    backward: int = 0
    recompute: int = 0
    """Forward work done again in the backward pass because activations were not kept."""

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.recompute

    def times(self, rows: int) -> Work:
        """Of several rows alike."""
        return Work(self.forward * rows, self.backward * rows, self.recompute * rows)


@dataclass(frozen=True)
class Flops:
    """Operations by part; see the top of the file."""

    encoder: Work
    decoder: Work
    cross_attention: Work
    attention: Work
    lm_head: Work

    def parts(self) -> dict[str, Work]:
        """By name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def forward(self) -> int:
        return sum(work.forward for work in self.parts().values())

    @property
    def backward(self) -> int:
        return sum(work.backward for work in self.parts().values())

    @property
    def recompute(self) -> int:
        return sum(work.recompute for work in self.parts().values())

    @property
    def model(self) -> int:
        """Forward and backward without recomputation: what a rate of useful work counts."""
        return self.forward + self.backward

    @property
    def total(self) -> int:
        return self.model + self.recompute

    def times(self, rows: int) -> Flops:
        """Of several rows alike."""
        return Flops(**{name: work.times(rows) for name, work in self.parts().items()})


def visible_pairs(rule: Rule, n_queries: int, n_keys: int, *, first_query: int = 0) -> int:
    """Pairs that a rule lets through in one example, keys at positions 0 to `n_keys - 1`.

    Args:
        first_query: position of the first query; `n_keys` for a decoder that continues after its source.
    """
    queries = np.arange(first_query, first_query + n_queries)
    lowest = np.zeros_like(queries) if rule.past is None else np.maximum(queries - rule.past, 0)
    future = np.full_like(queries, n_keys if rule.future is None else rule.future)
    if rule.sink:
        future[queries == 0] = 0
    highest = np.minimum(queries + future, n_keys - 1)
    return int(np.maximum(highest - lowest + 1, 0).sum())


def attention_pairs(config: EncoderDecoderConfig, source_length: int, target_length: int) -> Pairs:
    """Visible pairs of one unpadded example."""
    encoder, decoder = config.encoder, config.decoder
    kinds = list(zip(encoder.layer_types, config.encoder_mask, strict=True))
    read = {
        kind: visible_pairs(encoder_rule(encoder, *kind), source_length, source_length) for kind in set(kinds)
    }
    own, cross = {}, {}
    for layer_type in set(decoder.layer_types):
        rule = decoder_rule(decoder, layer_type)
        own[layer_type] = visible_pairs(rule, target_length, target_length)
        reach = Rule(past=rule.past) if config.window_covers_source else Rule()
        cross[layer_type] = visible_pairs(reach, target_length, source_length, first_query=source_length)
    return Pairs(
        tuple(read[kind] for kind in kinds),
        tuple(own[layer_type] for layer_type in decoder.layer_types),
        tuple(cross[layer_type] for layer_type in decoder.layer_types),
    )


def example_row(config: EncoderDecoderConfig, source_length: int, target_length: int) -> Row:
    """A row that is one example, every target token scored: the most that positions of this number can cost."""
    pairs = attention_pairs(config, source_length, target_length)
    return Row(source_length, target_length, target_length, pairs)


def answers_row(config: EncoderDecoderConfig, source_length: int, target_length: int, *, answers: int) -> Row:
    """A source with several answers, as preferences train on it; every token of theirs scored.

    Args:
        target_length: of each answer.
    """
    one = attention_pairs(config, source_length, target_length)
    pairs = Pairs(one.encoder, *(tuple(answers * n for n in side) for side in (one.decoder, one.cross)))
    n_target = answers * target_length
    return Row(source_length, n_target, n_target, pairs, answers=answers)


def packed_row(
    config: EncoderDecoderConfig,
    source_positions: int,
    target_positions: int,
    examples: Iterable[tuple[int, int]],
) -> Row:
    """A row of several examples, every target token of theirs scored.

    Args:
        examples: (source, target) tokens of each.

    Raises:
        ValueError: they do not fit.
    """
    lengths = list(examples)
    n_source, n_target = sum(n for n, _ in lengths), sum(m for _, m in lengths)
    if n_source > source_positions or n_target > target_positions:
        raise ValueError(
            f"examples of {n_source} source and {n_target} target tokens do not fit a row of {source_positions} "
            f"and {target_positions}; give fewer"
        )
    sides: list[list[tuple[int, ...]]] = [[], [], []]
    per_length = {each: attention_pairs(config, *each) for each in set(lengths)}
    for each in lengths:
        for side, layers in zip(sides, per_length[each], strict=True):
            side.append(layers)
    pairs = Pairs(*(tuple(map(sum, zip(*side, strict=True))) for side in sides))
    return Row(source_positions, target_positions, n_target, pairs, len(lengths))


def forward_flops(config: EncoderDecoderConfig, source_length: int, target_length: int) -> int:
    """Operations to read a source and score or write a target, once through, one unpadded example."""
    return training_flops(config, example_row(config, source_length, target_length)).forward


def decoder_only_flops(stack: StackConfig, prompt_length: int, target_length: int) -> int:
    """The same for a decoder-only model over prompt and target, its head on the target alone."""
    n = prompt_length + target_length
    pairs = sum(visible_pairs(decoder_rule(stack, kind), n, n) for kind in stack.layer_types)
    weights = stack.num_hidden_layers * (_attention_weights(stack) + _mlp_weights(stack))
    return (
        2 * weights * n
        + 4 * stack.num_attention_heads * stack.head_dim * pairs
        + 2 * stack.vocab_size * stack.hidden_size * target_length
    )


def training_flops(
    config: EncoderDecoderConfig,
    row: Row,
    *,
    trained: Trained = "everything",
    checkpointing: Checkpointing = "none",
) -> Flops:
    """Operations of forward and backward for one row.

    The likelihood's loss goes through the head once, forming gradients as it goes. With several answers to a source,
    whose weight is known only when all have been read, the head is computed again in the backward pass.
    """
    encoder, decoder = config.encoder, config.decoder
    n, m = row.source_positions, row.target_positions
    is_full = checkpointing == "full"
    decoder_trains, encoder_trains = trained != "cross_attention", trained == "everything"
    # Aligned reads end at a layer's normed input: no gradient comes to what that layer makes of it.
    n_trained_layers = trained_encoder_layers(config) if encoder_trains else 0
    # While cross-attention trains alone, nothing before the first of it asks for a gradient.
    first_self = 0 if decoder_trains else 1
    gradients = 2 if decoder_trains else 1
    n_layers = decoder.num_hidden_layers

    per_layer = 2 * (_attention_weights(encoder) + _mlp_weights(encoder)) * n
    encoder_work = Work(
        per_layer * encoder.num_hidden_layers,
        2 * per_layer * n_trained_layers,
        per_layer * n_trained_layers if is_full else 0,
    )
    self_attention, mlp = 2 * _attention_weights(decoder) * m, 2 * _mlp_weights(decoder) * m
    forward = n_layers * (self_attention + mlp)
    decoder_work = Work(
        forward,
        gradients * ((n_layers - first_self) * self_attention + n_layers * mlp),
        forward if is_full else 0,
    )
    heads, kv_heads = (
        decoder.head_dim * k for k in (decoder.num_attention_heads, decoder.num_key_value_heads)
    )
    query_output = 0 if config.layout == "merged" else 4 * decoder.hidden_size * heads * m * n_layers
    keys_values = 4 * encoder.hidden_size * kv_heads * n * row.answers * n_layers
    forward = query_output + keys_values
    cross_work = Work(
        forward,
        2 * query_output + (2 if encoder_trains else 1) * keys_values,
        forward if is_full else 0,
    )
    encoder_pair = 4 * encoder.num_attention_heads * encoder.head_dim
    encoder_back = encoder_pair * sum(row.pairs.encoder[:n_trained_layers])
    target_pairs = 4 * heads * (sum(row.pairs.decoder) + sum(row.pairs.cross))
    target_back = 4 * heads * (sum(row.pairs.decoder[first_self:]) + sum(row.pairs.cross))
    attention_work = Work(
        encoder_pair * sum(row.pairs.encoder) + target_pairs,
        2 * (encoder_back + target_back),
        encoder_back + target_pairs if is_full else 0,
    )
    head = 2 * decoder.vocab_size * decoder.hidden_size * row.scored
    again = head if row.answers > 1 else 0
    return Flops(encoder_work, decoder_work, cross_work, attention_work, Work(head, gradients * head, again))


def encoder_flops(config: EncoderDecoderConfig, row: Row, *, checkpointing: Checkpointing = "none") -> Flops:
    """Operations of a training step of the encoder alone, read at its end, as a reward model is."""
    encoder = config.encoder
    linear = (
        2
        * (_attention_weights(encoder) + _mlp_weights(encoder))
        * row.source_positions
        * encoder.num_hidden_layers
    )
    pairs = 4 * encoder.num_attention_heads * encoder.head_dim * sum(row.pairs.encoder)

    def work(forward: int) -> Work:
        return Work(forward, 2 * forward, forward if checkpointing == "full" else 0)

    return Flops(work(linear), Work(0), Work(0), work(pairs), Work(0))


def trained_encoder_layers(config: EncoderDecoderConfig) -> int:
    """Encoder layers that get a gradient through all of their block: with aligned reads those below the last one
    read, of which only the first norm gets one."""
    if config.aligned_layers is None:
        return config.encoder.num_hidden_layers
    return max(config.aligned_layers)


def _attention_weights(stack: StackConfig) -> int:
    """q, k, v and o of one self-attention layer."""
    return 2 * stack.hidden_size * stack.head_dim * (stack.num_attention_heads + stack.num_key_value_heads)


def _mlp_weights(stack: StackConfig) -> int:
    return 3 * stack.hidden_size * stack.intermediate_size
