"""Model and data of one rank, before a run begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from twofold.config import EncoderDecoderConfig
from twofold.models import EncoderModel
from twofold.train.world import World

Made = TypeVar("Made", bound=EncoderModel)
Found = TypeVar("Found")


def require_tokenizer(model: EncoderModel) -> None:
    """Refuse a model that takes no text.

    Raises:
        ValueError: it has no tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError(
            "the model has no tokenizer, so text cannot be read; put tokenizer files into its folder"
        )


def build_on_ranks(
    world: World,
    *,
    make: Callable[[], Made],
    make_empty: Callable[[EncoderDecoderConfig], Made],
    read: Callable[[Made], Found],
) -> tuple[Made, Found]:
    """Rank 0 alone reads weights, and comes first; the others' model is on the meta device.

    Args:
        make: the model with its weights.
        make_empty: one of the same shape.
        read: the data, given the model with its tokenizer; on every rank. The others' model has what rank 0's was made
            to have, such as tokens that were added.
    """
    built: list[tuple[Made, Found]] = []

    def build_first() -> tuple[EncoderDecoderConfig, Any]:
        model = make()
        built.append((model, read(model)))
        return model.config, model.tokenizer

    config, tokenizer = world.from_main(build_first)
    if not world.is_main:
        with torch.device("meta"):
            model = make_empty(config)
        model.tokenizer = tokenizer
        built.append((model.eval(), read(model)))
    return built[0]
