"""From the logits of one step to the next token of every row.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from twofold.config.base import Config


class Sampling(Config):
    """How the next token is chosen."""

    temperature: float = Field(default=0.0, ge=0.0)
    """0: greedy, the most likely token."""
    top_k: int | None = Field(default=None, ge=1)
    """Only the k most likely tokens."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Only the smallest set of most likely tokens whose probabilities reach p; applied after `top_k`."""
    seed: int = 0
    """Row i draws from its own stream, seeded with `seed + i`: what a row gets does not depend on the others."""


class Sampler:
    """Chooses tokens for a fixed set of rows, one call a step.

    Args:
        sampling: the settings.
        n_rows: B.
        device: where the logits lie.
    """

    def __init__(self, sampling: Sampling, n_rows: int, device: torch.device) -> None:
        self.sampling = sampling
        self.generators = [torch.Generator(device).manual_seed(sampling.seed + i) for i in range(n_rows)]

    def choose(self, logits_BV: Tensor) -> Tensor:
        """int64 [B]: the next token of every row, from float32 logits [B, V]."""
        if self.sampling.temperature == 0.0:
            return logits_BV.argmax(dim=-1)
        probabilities_BV = filtered_probabilities(logits_BV, self.sampling)
        drawn = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(probabilities_BV, self.generators, strict=True)
        ]
        return torch.cat(drawn)


def filtered_probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """float32 [B, V]: probabilities after temperature, then top-k, then top-p, summing to 1."""
    logits_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        threshold_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < threshold_B1, -torch.inf)
    probabilities_BV = logits_BV.softmax(dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True)
        reached_before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
        dropped_BV = torch.zeros_like(reached_before_BV, dtype=torch.bool).scatter(
            1, order_BV, reached_before_BV >= sampling.top_p
        )
        probabilities_BV = probabilities_BV.masked_fill(dropped_BV, 0.0)
        probabilities_BV = probabilities_BV / probabilities_BV.sum(dim=-1, keepdim=True)
    return probabilities_BV
