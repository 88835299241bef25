"""Weights in int8 or int4, products in the model's own dtype, by torchao."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from twofold.models import EncoderDecoder

_GROUP = 64
"""Neighbouring inputs that share a scale in int4; int8 has one scale for each output."""


@torch.no_grad()
def quantise(model: EncoderDecoder, precision: Literal["int8", "int4"]) -> None:
    """Replace the matrices of all linear layers, in place; embeddings and norms stay.

    Args:
        model: in bfloat16; for int4 on a CUDA device. An embedding that was tied to the head stays as it was. In int4
            a matrix whose inputs are no multiple of 64 stays too. What is quantised already is left alone.

    Raises:
        ImportError: without torchao.
    """
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ImportError(
            f"precision={precision!r} on CUDA needs torchao; pip install 'twofold[cuda]', or use "
            "precision='bfloat16'"
        ) from error

    def is_plain(module: nn.Module, _: str) -> bool:
        return (
            isinstance(module, nn.Linear)
            and type(module.weight) is nn.Parameter
            and (precision == "int8" or module.in_features % _GROUP == 0)
        )

    config: Any
    if precision == "int8":
        config = Int8WeightOnlyConfig(set_inductor_config=False)
    else:
        # The layout of the kernel that PyTorch itself has; others need more packages.
        config = Int4WeightOnlyConfig(
            group_size=_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    quantize_(model, config, filter_fn=is_plain)
