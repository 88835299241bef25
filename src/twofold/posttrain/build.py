"""Model and data of one rank, before a run of post-training begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from twofold.config import EncoderDecoderConfig
from twofold.models import EncoderModel
from twofold.train.world import World

Made = TypeVar("Made", bound=EncoderModel)
Found = TypeVar("Found")


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
        read: the data, given the model with its tokenizer; on every rank.

    Raises:
        ValueError: the model has no tokenizer.
    """

    def read_for(model: Made) -> Found:
        if model.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer, so text cannot be read; put tokenizer files into its folder"
            )
        return read(model)

    built: list[tuple[Made, Found]] = []

    def build_first() -> tuple[EncoderDecoderConfig, Any]:
        model = make()
        built.append((model, read_for(model)))
        return model.config, model.tokenizer

    config, tokenizer = world.from_main(build_first)
    if not world.is_main:
        with torch.device("meta"):
            model = make_empty(config)
        model.tokenizer = tokenizer
        built.append((model.eval(), read_for(model)))
    return built[0]
