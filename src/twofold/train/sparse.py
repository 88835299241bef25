"""A distribution over a vocabulary, kept as a few tokens and their shares.

N: positions. V: vocabulary. K: tokens kept or drawn.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Entries(NamedTuple):
    """What is kept of N distributions."""

    ids_NK: Tensor
    """int64."""
    shares_NK: Tensor
    """float32; each row sums to 1. A share of 0 is no entry."""
    kept_N: Tensor
    """float32: the probability of the named tokens together."""


def top_k_entries(logits_NV: Tensor, k: int) -> Entries:
    """The k likeliest tokens (all of a smaller vocabulary), renormalised over them.

    What the others had is lost, so the student learns a distribution that is too sharp by what `kept_N` lacks of 1.
    """
    logits_NV = logits_NV.float()
    top = logits_NV.topk(min(k, logits_NV.shape[1]), dim=1)
    kept_N = (top.values.logsumexp(dim=1) - logits_NV.logsumexp(dim=1)).exp()
    return Entries(top.indices, top.values.softmax(dim=1), kept_N)


def sampled_entries(logits_NV: Tensor, k: int, generator: torch.Generator) -> Entries:
    """k tokens drawn from each distribution, each token with its share of the draws.

    Gemma 3 (arXiv 2503.19786, section 2.2) draws 256 tokens by the teacher's probabilities. Drawn with replacement, the
    share of a token is an unbiased estimate of its probability, and so is the loss of the student's.

    Args:
        generator: on the device of the logits; it is advanced.
    """
    probabilities_NV = logits_NV.float().softmax(dim=1)
    drawn_NK = (
        torch.multinomial(probabilities_NV, k, replacement=True, generator=generator).sort(dim=1).values
    )
    # Equal draws stand together: the first of them takes the share of all.
    is_first = torch.ones_like(drawn_NK, dtype=torch.bool)
    is_first[:, 1:] = drawn_NK[:, 1:] != drawn_NK[:, :-1]
    group = is_first.cumsum(dim=1) - 1
    counts = torch.zeros_like(drawn_NK).scatter_add_(1, group, torch.ones_like(drawn_NK))
    # A token's count goes from the place of its group to that of its first draw.
    shares_NK = torch.where(is_first, counts.gather(1, group), 0) / k
    kept_N = (probabilities_NV.gather(1, drawn_NK) * is_first).sum(dim=1)
    return Entries(drawn_NK, shares_NK, kept_N)
