"""What an adaptation will do, decided before any weight is read.

A plan names, for every parameter of the pair, the donor tensor it comes from and what happens to it on the way.
Nothing is left to a module's own initialisation: a parameter without a rule is an error, and so is a donor
tensor that nothing accounts for.

Starts (design of arXiv 2504.06225 section 3.2, and ours):
    published    encoder and decoder copied, mask opened; cross-attention copied from the same layer's
                 self-attention where both widths are equal, random (and trained first) where not
    scaled_copy  the same copy, with the cross-attention's output scaled down
    random       the same pair, with random cross-attention whatever the widths
    lossless     one softmax over source and target, each decoder layer reading what encoder layer l reads, RoPE and
                 positions continuing: with a causal encoder the pair computes exactly its donor
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from twofold.config import EncoderDecoderConfig, EncoderMask
from twofold.models import EncoderDecoder
from twofold.models.families import DonorConfig

Start = Literal["published", "scaled_copy", "random", "lossless"]
Side = Literal["encoder", "decoder"]
MaskChoice = EncoderMask | Literal["auto"] | Sequence[EncoderMask]
"""One mask for all layers, one per layer, or `auto`: as open as a profile finds to cost next to nothing."""


@dataclass(frozen=True)
class Choices:
    """What a user may choose; None takes the start's own value (see `plan_config`)."""

    start: Start = "lossless"
    encoder_mask: MaskChoice | None = None
    """None: `bidirectional`; in pairs that start as their donor `auto`."""
    future_weight: float = 1.0
    """See `EncoderDecoderConfig.encoder_future_weight`; what `encoder_mask="auto"` finds comes in its place."""
    encoder_layers: Sequence[int] | None = None
    decoder_layers: Sequence[int] | None = None
    layout: Literal["separate", "merged"] | None = None
    reads: Literal["final", "aligned"] | None = None
    cross_rope: bool | None = None
    decoder_positions: Literal["restart", "continue"] | None = None
    decoder_start: Literal["bos", "last_source_token"] | None = None
    aligned_layers: Sequence[int] | None = None
    decoder_depth: int | None = None
    """Decoder layers that stay; which ones is measured."""
    tie_stacks: bool = False
    output_scale: float = 0.1
    """`scaled_copy` only: factor on what cross-attention adds to the residual stream."""

    def __post_init__(self) -> None:
        if self.start not in get_args(Start):
            raise ValueError(f"start must be one of {', '.join(get_args(Start))}, got {self.start!r}")
        if self.start == "scaled_copy" and self.layout == "merged":
            raise ValueError(
                "start='scaled_copy' scales the output of a cross-attention sub-layer, which layout='merged' "
                "does not have; use layout='separate' or start='published'"
            )
        is_measured = self.encoder_mask == "auto" or self.decoder_depth is not None
        if is_measured and not self.starts_as_donor:
            raise ValueError(
                "encoder_mask='auto' and decoder_depth measure what a change costs next to the donor, so the pair must "
                f"start as its donor: start='lossless', got start={self.start!r}, layout={self.layout!r}, "
                f"reads={self.reads!r}"
            )
        if self.encoder_mask == "auto":
            if self.future_weight != 1.0:
                raise ValueError(
                    f"encoder_mask='auto' finds the weight of later keys itself, got future_weight="
                    f"{self.future_weight}; leave it out"
                )
            return
        masks = [self.encoder_mask] if isinstance(self.encoder_mask, str) else list(self.encoder_mask or ())
        bad = [mask for mask in masks if mask not in get_args(EncoderMask)]
        if bad:
            raise ValueError(
                f"encoder_mask must be of {', '.join(get_args(EncoderMask))}, or auto, got {bad[0]!r}"
            )

    @property
    def starts_as_donor(self) -> bool:
        """With a causal encoder the pair computes what its donor does."""
        meeting = (self.start, self.layout or "merged", self.reads or "aligned")
        return meeting == ("lossless", "merged", "aligned")


@dataclass(frozen=True)
class Rule:
    """Where one parameter of the pair comes from."""

    kind: Literal["copy", "scaled", "shifted_scale", "fit_rows", "embedding_row", "normal", "zeros"]
    """`copy`. `scaled`: times `factor`. `shifted_scale`: 1 + w is multiplied by `factor`, for norms that add one.
    `fit_rows`: rows cut off or zeros appended, to the decoder's vocabulary size. `embedding_row`: row `row` times
    `factor`. `normal`: random with standard deviation `factor`. `zeros`."""
    side: Side | None = None
    """Which donor, for kinds that read one."""
    donor_name: str | None = None
    """The tensor's name in our naming of a single stack."""
    factor: float = 1.0
    row: int = 0


@dataclass(frozen=True)
class PlannedTensor:
    """One parameter of the pair."""

    name: str
    shape: tuple[int, ...]
    rule: Rule


@dataclass(frozen=True)
class Plan:
    """A whole adaptation."""

    config: EncoderDecoderConfig
    choices: Choices
    tensors: tuple[PlannedTensor, ...]
    """Every parameter once, shared ones under their first name, in the order of the model."""

    @property
    def num_parameters(self) -> int:
        """Shared parameters counted once."""
        return sum(torch.Size(t.shape).numel() for t in self.tensors)


def plan_adaptation(
    encoder: DonorConfig, decoder: DonorConfig | None, choices: Choices, *, adds_bos: bool = False
) -> Plan:
    """Plan a pair from one donor (`decoder` None: a balanced pair) or two.

    Args:
        adds_bos: the donor's tokenizer puts BOS in front of a text; the source of a lossless pair, or one in
            T5Gemma 2's layout, then begins with it too.

    Raises:
        ValueError: a choice that the donors do not allow; see `plan_config`.
    """
    config = plan_config(encoder, decoder, choices, adds_bos=adds_bos)
    encoder_layers, decoder_layers = _layer_subsets(encoder, decoder or encoder, choices)
    with torch.device("meta"):
        model = EncoderDecoder(config)
    tensors = tuple(
        PlannedTensor(
            name,
            tuple(parameter.shape),
            _rule_for(name, config, choices, encoder_layers, decoder_layers, encoder, decoder or encoder),
        )
        for name, parameter in model.named_parameters()
    )
    return Plan(config, choices, tensors)


def plan_config(
    encoder: DonorConfig, decoder: DonorConfig | None, choices: Choices, *, adds_bos: bool
) -> EncoderDecoderConfig:
    """The pair's configuration: the start's values where the user chose none.

    Raises:
        ValueError: unequal widths with a start that copies across, a layer subset out of range, an encoder mask of
            the wrong length, or no BOS for a decoder that starts with one.
    """
    is_balanced = decoder is None
    decoder = decoder or encoder
    is_lossless = choices.start == "lossless"
    encoder_layers, decoder_layers = _layer_subsets(encoder, decoder, choices)
    encoder_stack = encoder.stack.with_layers(encoder_layers)
    decoder_stack = decoder.stack.with_layers(decoder_layers)
    # The same tokenizer may come with tables of different padded size (Qwen 2.5 0.5B and 7B): take the decoder's.
    encoder_stack = encoder_stack.model_copy(update={"vocab_size": decoder_stack.vocab_size})

    widths = encoder_stack.hidden_size, decoder_stack.hidden_size
    if widths[0] != widths[1] and choices.start in ("scaled_copy", "lossless"):
        raise ValueError(
            f"start={choices.start!r} makes encoder keys with the decoder donor's own projections, so both widths "
            f"must be equal; encoder width {widths[0]} != decoder width {widths[1]}. Use start='random' or "
            "'published' (random cross-attention, trained alone first)"
        )
    layout = choices.layout or ("merged" if is_lossless else "separate")
    reads = choices.reads or ("aligned" if is_lossless else "final")
    aligned = choices.aligned_layers
    if reads == "aligned" and aligned is None:
        aligned = match_depths(
            encoder_layers, encoder.stack.num_hidden_layers, decoder_layers, decoder.stack.num_hidden_layers
        )
    if not decoder.tie_word_embeddings:
        tie: Literal["all", "decoder", "none"] = "none"
    else:
        tie = "all" if is_balanced and layout == "merged" else "decoder"
    restarts = choices.decoder_positions or ("continue" if is_lossless else "restart")
    cross_rope = is_lossless if choices.cross_rope is None else choices.cross_rope
    is_t5gemma2 = (
        decoder_stack.qk_norm
        and decoder_stack.norm_adds_one
        and (layout, reads, tie, restarts, cross_rope) == ("merged", "final", "all", "restart", False)
    )
    return EncoderDecoderConfig(
        encoder=encoder_stack,
        decoder=decoder_stack,
        layout=layout,
        reads=reads,
        cross_rope=cross_rope,
        tie_stacks=choices.tie_stacks,
        decoder_positions=restarts,
        aligned_layers=None if aligned is None else tuple(aligned),
        encoder_mask=_masks_per_layer(choices, len(encoder_layers)),
        encoder_future_weight=choices.future_weight,
        tie_word_embeddings=tie,
        decoder_start=choices.decoder_start or ("last_source_token" if is_lossless else "bos"),
        source_bos=adds_bos and (is_lossless or is_t5gemma2),
        pad_token_id=decoder.pad_token_id,
        bos_token_id=decoder.bos_token_id,
        eos_token_ids=decoder.eos_token_ids,
        eoi_token_id=EOI_TOKEN_ID if is_t5gemma2 and decoder_stack.vocab_size > EOI_TOKEN_ID else None,
    )


EOI_TOKEN_ID = 256_000
"""End-of-image token of Gemma 3's vocabulary; T5Gemma 2 keeps its embedding in a tensor of its own."""


def match_depths(
    encoder_layers: Sequence[int], encoder_depth: int, decoder_layers: Sequence[int], decoder_depth: int
) -> tuple[int, ...]:
    """For each decoder layer the encoder layer at the nearest relative depth of their donors.

    Args:
        encoder_layers: donor layers that the encoder kept, out of `encoder_depth`; decoder likewise.

    Returns:
        Indices into the encoder as it is now, one per decoder layer. With one donor and an uncut encoder: the decoder's
        own donor layers.
    """
    wanted = [layer * encoder_depth / decoder_depth for layer in decoder_layers]
    return tuple(
        min(range(len(encoder_layers)), key=lambda i: (abs(encoder_layers[i] - depth), i)) for depth in wanted
    )


def _layer_subsets(
    encoder: DonorConfig, decoder: DonorConfig, choices: Choices
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    kept = []
    for donor, chosen in ((encoder, choices.encoder_layers), (decoder, choices.decoder_layers)):
        kept.append(tuple(range(donor.stack.num_hidden_layers)) if chosen is None else tuple(chosen))
    if choices.decoder_depth is not None:  # not measured yet; any layers have the size of those that will be
        kept[1] = kept[1][: choices.decoder_depth]
    return kept[0], kept[1]


def _masks_per_layer(choices: Choices, n_layers: int) -> tuple[EncoderMask, ...]:
    mask = choices.encoder_mask
    if isinstance(mask, str) and mask != "auto":
        return (mask,) * n_layers
    if mask is None or isinstance(mask, str):
        # A lossless pair is exact only while its encoder is causal; a profile, too, starts from the donor.
        default: EncoderMask = "causal" if choices.start == "lossless" else "bidirectional"
        return (default,) * n_layers
    return tuple(mask)


def _rule_for(
    name: str,
    config: EncoderDecoderConfig,
    choices: Choices,
    encoder_layers: tuple[int, ...],
    decoder_layers: tuple[int, ...],
    encoder: DonorConfig,
    decoder: DonorConfig,
) -> Rule:
    if name == "lm_head.out_proj.weight":
        return Rule("copy", "decoder", name)
    _, side_name, rest = name.split(".", 2)
    side: Side = "encoder" if side_name == "encoder" else "decoder"
    if rest == "embed_tokens.weight":
        is_cut = side == "encoder" and encoder.stack.vocab_size != config.encoder.vocab_size
        return Rule("fit_rows" if is_cut else "copy", side, rest)
    if rest == "embed_tokens.eoi_embedding":
        # The donor scales this row like any other; the tensor of its own is not scaled (T5Gemma 2).
        scale = config.encoder.hidden_size**0.5
        return Rule("embedding_row", side, "embed_tokens.weight", factor=scale, row=EOI_TOKEN_ID)
    if rest == "norm.weight":
        return Rule("copy", side, rest)
    _, index, rest = rest.split(".", 2)
    donor_layer = (encoder_layers if side == "encoder" else decoder_layers)[int(index)]
    if "cross_attn" not in rest:
        return Rule("copy", side, f"layers.{donor_layer}.{rest}")
    return _cross_rule(rest, donor_layer, config, choices)


def _cross_rule(rest: str, donor_layer: int, config: EncoderDecoderConfig, choices: Choices) -> Rule:
    """A cross-attention sub-layer starts as the same layer's self-attention, norms included, or at random.

    In random starts too the norms are copied. (The paper prints neither the norms' start nor the distribution; ours
    is the donor's own initial standard deviation.)
    """
    stack = config.decoder
    donor_name = f"layers.{donor_layer}.{rest.replace('cross_attn', 'self_attn')}"
    is_projection = "_proj." in rest
    is_random = choices.start == "random" or config.encoder.hidden_size != stack.hidden_size
    if is_random and is_projection:
        if rest.endswith("bias"):
            return Rule("zeros")
        return Rule("normal", factor=stack.initializer_range)
    if choices.start == "scaled_copy":
        # With a post-norm behind it, the size of o_proj does not matter: scale the post-norm.
        if stack.post_norms and rest == "post_cross_attn_layernorm.weight":
            kind: Literal["scaled", "shifted_scale"] = "shifted_scale" if stack.norm_adds_one else "scaled"
            return Rule(kind, "decoder", donor_name, factor=choices.output_scale)
        if not stack.post_norms and "o_proj" in rest:
            return Rule("scaled", "decoder", donor_name, factor=choices.output_scale)
    return Rule("copy", "decoder", donor_name)
