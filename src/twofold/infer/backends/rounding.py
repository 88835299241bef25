"""Matrices in few bits, the same for all that multiply them on the CPU."""

import torch
from torch import Tensor


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in int8, and the float32 scale of each row, [O, 1]: its largest number becomes 127."""
    scale = weight.detach().float().abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127.0
    return (weight.detach().float() / scale).round_().to(torch.int8), scale
