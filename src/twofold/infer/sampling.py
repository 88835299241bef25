"""From the logits of one step to the next token of every row.

In this order, as in transformers: penalties on logits, temperature, top-k, top-p, min-p, draw.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from twofold.config.base import Config

_HEAD = 1024
"""The nucleus of top-p is first looked for among so many tokens: sorting a vocabulary of 256k takes longer than a
decoding step."""


_COLDEST = 1e-20
"""Temperatures below count as this, where all is on the likeliest: in float32 they are 0, and logits over them none."""

_BLOCK = 256
"""Tokens whose probabilities are added up before one of them is looked for."""


class Sampling(Config):
    """How the next token is chosen."""

    temperature: float = Field(default=0.0, ge=0.0)
    """0: greedy, the most likely token."""
    top_k: int | None = Field(default=None, ge=1)
    """Only the k most likely tokens."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Only the smallest set of most likely tokens whose probabilities reach p; applied after `top_k`."""
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    """Only tokens at least this fraction as likely as the most likely one; applied last."""
    repetition_penalty: float = Field(default=1.0, gt=0.0)
    """Logits of tokens that were generated before are divided by it where positive, multiplied where negative. The
    source and the decoder's prefix do not count. 1: none."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time it was generated."""
    presence_penalty: float = 0.0
    """Subtracted from a token's logit if it was generated at all."""
    seed: int = 0
    """Row i draws from its own stream, seeded with `seed + i`: what a row gets does not depend on the others."""

    @property
    def has_penalties(self) -> bool:
        """Some logit depends on what was generated."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


class Sampler:
    """Chooses tokens for some rows, one call a step.

    Args:
        sampling: the settings.
        n_rows: B.
        device: where the logits lie; numbers are drawn on the CPU, so that a seed means the same everywhere.
    """

    def __init__(self, sampling: Sampling, n_rows: int, device: torch.device) -> None:
        self.sampling = sampling
        self.device = device
        self._generators = [torch.Generator().manual_seed(sampling.seed + i) for i in range(n_rows)]
        self._counts: list[Counter[int]] = [Counter() for _ in range(n_rows)]

    def choose(self, logits_BV: Tensor) -> Tensor:
        """int64 [B]: the next token of every row, from float32 logits [B, V]; remembered for the penalties.

        Raises:
            ValueError: see `check_choice`.
        """
        sampling = self.sampling
        if sampling.has_penalties:
            logits_BV = torch.stack(
                [
                    penalised(row, counts, sampling)
                    for row, counts in zip(logits_BV, self._counts, strict=True)
                ]
            )
        if sampling.temperature == 0.0:
            chosen_B = most_likely(logits_BV)
            check_choice(logits_BV.gather(1, chosen_B[:, None]))
        else:
            check_choice(logits_BV.amax(dim=-1))
            chosen_B = self._draw(filtered_probabilities(logits_BV, sampling))
        if sampling.has_penalties:
            for counts, token in zip(self._counts, chosen_B.tolist(), strict=True):
                counts[token] += 1
        return chosen_B

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows; each keeps its stream."""
        self._generators = [self._generators[row] for row in rows]
        self._counts = [self._counts[row] for row in rows]

    def _draw(self, probabilities_BV: Tensor) -> Tensor:
        """One token per row: where a uniform number falls in the cumulated probabilities, looked for among blocks of
        tokens first: cumulating a vocabulary one by one takes longer than the softmax."""
        # float64: over a large vocabulary float32 sums lose the unlikely tokens at the end.
        n_vocab = probabilities_BV.shape[-1]
        padded_BV = F.pad(probabilities_BV, (0, -n_vocab % _BLOCK))
        blocks_BMC = padded_BV.view(len(padded_BV), -1, _BLOCK)
        sums_BM = blocks_BMC.sum(dim=-1, dtype=torch.float64)
        cumulated_BM = sums_BM.cumsum(dim=-1)
        uniform = [torch.rand((), generator=generator, dtype=torch.float64) for generator in self._generators]
        places_B1 = torch.stack(uniform).to(self.device)[:, None] * cumulated_BM[:, -1:]
        block_B1 = torch.searchsorted(cumulated_BM, places_B1, right=True).clamp(
            max=cumulated_BM.shape[-1] - 1
        )
        before_B1 = (cumulated_BM - sums_BM).gather(1, block_B1)
        rows = torch.arange(len(block_B1), device=self.device)
        within_BC = blocks_BMC[rows, block_B1[:, 0]].double().cumsum(dim=-1)
        # Below the block's end, whatever rounding did: what follows has no probability.
        inside_B1 = torch.minimum(
            places_B1 - before_B1, within_BC[:, -1:].nextafter(torch.zeros_like(before_B1))
        )
        column_B1 = torch.searchsorted(within_BC, inside_B1, right=True)
        return (block_B1 * _BLOCK + column_B1)[:, 0]


def most_likely(logits_BV: Tensor) -> Tensor:
    """int64 [B]: the first of the highest logits of every row; a place without a number, where there is one."""
    if logits_BV.device.type == "cpu":  # ten times as fast there: 5 against 50 microseconds for a row of 49k
        return torch.from_numpy(np.asarray(logits_BV.numpy().argmax(axis=-1)))
    return logits_BV.argmax(dim=-1)


def check_choice(best: Tensor) -> None:
    """Make sure that there is a token to choose, given the highest logits.

    Raises:
        ValueError: all are forbidden, or the logits are no numbers.
    """
    if not bool(best.isfinite().all()):
        raise ValueError(
            "no token can be chosen: all are forbidden by the constraint, or the model's logits are not finite; "
            "let the constraint allow a stop token where the text may end"
        )


def penalised(logits_V: Tensor, counts: Counter[int], sampling: Sampling) -> Tensor:
    """The logits of one row [V] after the penalties on the tokens it has generated, given how often."""
    if not counts:
        return logits_V
    tokens = torch.tensor(list(counts), device=logits_V.device)
    times = torch.tensor(list(counts.values()), device=logits_V.device, dtype=logits_V.dtype)
    seen = logits_V[tokens]
    seen = torch.where(seen > 0, seen / sampling.repetition_penalty, seen * sampling.repetition_penalty)
    seen = seen - sampling.frequency_penalty * times - sampling.presence_penalty
    return logits_V.index_put((tokens,), seen)


def filtered_probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """float32 [B, V]: probabilities after temperature, top-k, top-p and min-p, summing to 1."""
    logits_BV = logits_BV.float()
    if sampling.temperature != 1.0:
        logits_BV = logits_BV / max(sampling.temperature, _COLDEST)
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        threshold_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < threshold_B1, -torch.inf)
    probabilities_BV = logits_BV.softmax(dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        probabilities_BV = _nucleus(probabilities_BV, sampling.top_p)
    if sampling.min_p is not None:
        threshold_B1 = sampling.min_p * probabilities_BV.amax(dim=-1, keepdim=True)
        probabilities_BV = probabilities_BV.masked_fill(probabilities_BV < threshold_B1, 0.0)
    return probabilities_BV / probabilities_BV.sum(dim=-1, keepdim=True)


def _nucleus(probabilities_BV: Tensor, top_p: float) -> Tensor:
    """The probabilities of the smallest set of most likely tokens that reaches `top_p`, 0 for others."""
    n_vocab = probabilities_BV.shape[-1]
    sorted_BH, order_BH = probabilities_BV.topk(min(_HEAD, n_vocab), dim=-1)
    reached_BH = sorted_BH.cumsum(dim=-1)
    if n_vocab > _HEAD and bool((reached_BH[:, -1] < top_p).any()):
        sorted_BH, order_BH = probabilities_BV.sort(dim=-1, descending=True)
        reached_BH = sorted_BH.cumsum(dim=-1)
    is_beyond_BH = reached_BH - sorted_BH >= top_p
    is_beyond_BH[:, 0] = False  # a top_p that float32 rounds to 0 still leaves one
    kept_BH = sorted_BH.masked_fill(is_beyond_BH, 0.0)
    return torch.zeros_like(probabilities_BV).scatter(1, order_BH, kept_BH)
