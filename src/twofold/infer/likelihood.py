"""The two things asked of a model besides writing: how likely a given target is, and what a text looks like inside.

Letters: B rows, S source tokens, T decoder tokens, D and E widths of decoder and encoder, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from twofold.infer.limits import check_inputs, check_source
from twofold.infer.padding import padded
from twofold.models import EncoderDecoder

Pooling = Literal["mean", "first", "last"]

_MAX_TOKENS = 4096
"""In one batch, source and target together, padding included."""
_HEAD_TOKENS = 128
"""Whose logits exist at the same time: 128 MB of them with a vocabulary of 256k."""


@dataclass(frozen=True, slots=True)
class Score:
    """The likelihood of one target."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Natural logarithm, one per token of the target."""

    @property
    def total(self) -> float:
        """Of the whole target."""
        return sum(self.logprobs)


@torch.no_grad()
def score_targets(
    model: EncoderDecoder,
    sources: Sequence[Sequence[int]],
    prefixes: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
) -> list[Score]:
    """Log-probabilities of given targets, each after its source and decoder prefix, in order.

    Raises:
        ValueError: an empty target, ids outside the vocabulary, or too many tokens for the model.
    """
    for i, (source, prefix, target) in enumerate(zip(sources, prefixes, targets, strict=True)):
        if len(target) == 0:
            raise ValueError(f"target {i} is empty, so it has no likelihood; leave it out")
        check_inputs(model.config, source, (*prefix, *target), 0, name=f"target {i}")
    device = model.lm_head.out_proj.weight.device
    scores: dict[int, Score] = {}
    lengths = [
        len(source) + len(prefix) + len(target)
        for source, prefix, target in zip(sources, prefixes, targets, strict=True)
    ]
    for rows in _batches(lengths):
        encoded = model.encode(*padded([sources[i] for i in rows], "right", device))
        inputs = [(*prefixes[i], *targets[i][:-1]) for i in rows]
        decoder_ids, decoder_mask = padded(inputs, "right", device)
        x_BTD, _ = model.decoder(decoder_ids, decoder_mask.long(), encoded)
        for x_TD, i in zip(x_BTD, rows, strict=True):
            first = len(prefixes[i]) - 1
            logprobs = _of_targets(model, x_TD[first : first + len(targets[i])], targets[i])
            scores[i] = Score(tuple(targets[i]), tuple(logprobs))
    return [scores[i] for i in range(len(sources))]


def _of_targets(model: EncoderDecoder, x_TD: Tensor, target: Sequence[int]) -> list[float]:
    """Log-probability of each target token, given what the head reads in the place before it."""
    labels = torch.tensor(target, device=x_TD.device)
    found: list[float] = []
    for start in range(0, len(target), _HEAD_TOKENS):
        x_PD, labels_P = x_TD[start : start + _HEAD_TOKENS], labels[start : start + _HEAD_TOKENS]
        logprobs_PV = model.lm_head(x_PD[None])[0].log_softmax(dim=-1)
        found += logprobs_PV.gather(1, labels_P[:, None])[:, 0].tolist()
    return found


@torch.no_grad()
def embed_sources(model: EncoderDecoder, sources: Sequence[Sequence[int]], pooling: Pooling) -> Tensor:
    """float32 [B, E] on the CPU: the encoder's normed output over each source's tokens, pooled.

    Raises:
        ValueError: an empty source, one that is too long, or an unknown pooling.
    """
    if pooling not in ("mean", "first", "last"):
        raise ValueError(f"unknown pooling {pooling!r}; use 'mean', 'first' or 'last'")
    for i, source in enumerate(sources):
        if len(source) == 0:
            raise ValueError(f"text {i} has no tokens, so there is nothing to embed; leave it out")
        check_source(model.config, source, name=f"text {i}")
    device = model.lm_head.out_proj.weight.device
    found: dict[int, Tensor] = {}
    for rows in _batches([len(source) for source in sources]):
        encoded = model.encode(*padded([sources[i] for i in rows], "right", device))
        for x_SE, i in zip(encoded.last_hidden_state.float(), rows, strict=True):
            x_SE = x_SE[: len(sources[i])]
            pooled = {"mean": x_SE.mean(dim=0), "first": x_SE[0], "last": x_SE[-1]}[pooling]
            found[i] = pooled.cpu()
    return torch.stack([found[i] for i in range(len(sources))])


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Row numbers in groups of similar length."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and (len(group) + 1) * lengths[i] > _MAX_TOKENS:
            yield group
            group = []
        group.append(i)
    yield group
