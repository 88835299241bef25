"""What is evaluated: an encoder-decoder, or a decoder-only model through the same interface.

A decoder-only model runs as the pair that it is: one stack of weights for both sides, a causal encoder that reads the
prompt, aligned merged attention. Reading a prompt is then its prefill, and every logit is the model's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from twofold.adapt import Choices, adapt, plan_adaptation
from twofold.checkpoint.load import load, read_config
from twofold.checkpoint.resolve import resolve
from twofold.config import EncoderDecoderConfig
from twofold.models import EncoderDecoder
from twofold.models.families import DONORS, donor_family

Kind = Literal["encoder-decoder", "decoder-only"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One model of an evaluation."""

    name: str
    """In tables and pictures."""
    path: str
    """As it was given."""
    kind: Kind
    model: EncoderDecoder
    """In eval mode."""


def kind_of(config: EncoderDecoderConfig) -> Kind:
    """`decoder-only` for a pair that computes what one causal stack over source and target computes."""
    layers = tuple(range(config.encoder.num_hidden_layers))
    is_one_stack = (
        config.tie_stacks
        and config.aligned_layers == layers
        and config.window_covers_source
        and config.decoder_start == "last_source_token"
        and set(config.encoder_mask) == {"causal"}
    )
    return "decoder-only" if is_one_stack else "encoder-decoder"


def open_contender(
    path_or_name: str | Path,
    *,
    name: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    skip_vision: bool = False,
) -> Contender:
    """Read a model for evaluation.

    Args:
        path_or_name: an encoder-decoder or a decoder-only model of a donor family: folder, hub name or GGUF file.
        name: in tables; default: the last part of the path.
        dtype: of all parameters; None: as stored.
        skip_vision: see `twofold.load`.

    Raises:
        ValueError, FileNotFoundError: as for `twofold.load` and `twofold.adapt`.
    """
    checkpoint = resolve(path_or_name)
    if checkpoint.config.get("model_type") in DONORS:
        model = adapt(path_or_name, start="lossless", encoder_mask="causal", tie_stacks=True, dtype=dtype)
    else:
        model = load(path_or_name, dtype=dtype, skip_vision=skip_vision)
    return Contender(
        name=name or Path(path_or_name).name.removesuffix(".gguf"),
        path=str(path_or_name),
        kind=kind_of(model.config),
        model=model.eval(),
    )


def contender_config(path_or_name: str | Path) -> EncoderDecoderConfig:
    """What `open_contender` would open, without its weights and tokenizer.

    `source_bos`, which a donor's tokenizer decides, is left off.

    Raises:
        ValueError, FileNotFoundError: as for `twofold.load` and `twofold.adapt`.
    """
    checkpoint = resolve(path_or_name)
    if checkpoint.config.get("model_type") not in DONORS:
        return read_config(checkpoint)[0]
    donor = donor_family(checkpoint.config).read_config(checkpoint.config)
    choices = Choices(start="lossless", encoder_mask="causal", tie_stacks=True)
    return plan_adaptation(donor, None, choices).config
