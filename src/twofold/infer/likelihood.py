"""The two things asked of a model besides writing: how likely a given target is, and what a text looks like inside.

Letters: B rows, S source tokens, T decoder tokens, D and E widths of decoder and encoder, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from twofold.infer.limits import check_ids, check_inputs, check_source
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
    is_greedy: bool
    """Each of these tokens is the most likely one in its place."""

    @property
    def total(self) -> float:
        """Of the whole target."""
        return sum(self.logprobs)


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
    scores = dict(iter_scores(model, sources, prefixes, targets))
    return [scores[i] for i in range(len(sources))]


@torch.no_grad()
def iter_scores(
    model: EncoderDecoder,
    sources: Sequence[Sequence[int]],
    prefixes: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
) -> Iterator[tuple[int, Score]]:
    """`score_targets` batch by batch: row numbers and their scores, in the order in which they are computed.

    A source that several rows share is encoded once for those of them in the same batch. Errors as there, before
    anything is computed.
    """
    for i, (source, prefix, target) in enumerate(zip(sources, prefixes, targets, strict=True)):
        if len(target) == 0:
            raise ValueError(f"target {i} is empty, so it has no likelihood; leave it out")
        # The last token is predicted, and never read: it needs no position.
        check_inputs(model.config, source, (*prefix, *target[:-1]), 0, name=f"target {i}")
        check_ids(model.config, target[-1:], f"target {i}")
    device = model.lm_head.out_proj.weight.device
    keys = [tuple(source) for source in sources]
    inputs = [(*prefix, *target[:-1]) for prefix, target in zip(prefixes, targets, strict=True)]
    for rows in _batches_by_source(keys, [len(ids) for ids in inputs]):
        number = {key: n for n, key in enumerate(dict.fromkeys(keys[i] for i in rows))}
        encoded = model.encode(*padded(list(number), "right", device))
        if len(number) < len(rows):
            encoded = encoded.select(torch.tensor([number[keys[i]] for i in rows], device=device))
        decoder_ids, decoder_mask = padded([inputs[i] for i in rows], "right", device)
        x_BTD, _ = model.decoder(decoder_ids, decoder_mask.long(), encoded)
        for x_TD, i in zip(x_BTD, rows, strict=True):
            first = len(prefixes[i]) - 1
            yield i, _of_target(model, x_TD[first : first + len(targets[i])], targets[i])


def _of_target(model: EncoderDecoder, x_TD: Tensor, target: Sequence[int]) -> Score:
    """From what the head reads in the place before each target token."""
    labels = torch.tensor(target, device=x_TD.device)
    found: list[float] = []
    is_greedy = True
    for start in range(0, len(target), _HEAD_TOKENS):
        x_PD, labels_P = x_TD[start : start + _HEAD_TOKENS], labels[start : start + _HEAD_TOKENS]
        logprobs_PV = model.lm_head(x_PD[None])[0].log_softmax(dim=-1)
        found += logprobs_PV.gather(1, labels_P[:, None])[:, 0].tolist()
        is_greedy = is_greedy and bool((logprobs_PV.argmax(dim=-1) == labels_P).all())
    return Score(tuple(target), tuple(found), is_greedy)


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


def _batches_by_source(
    sources: Sequence[tuple[int, ...]], decoder_lengths: Sequence[int]
) -> Iterator[list[int]]:
    """Row numbers in groups of similar length, in which those of one source stand together."""
    together: dict[tuple[int, ...], list[int]] = {}
    for i, source in enumerate(sources):
        together.setdefault(source, []).append(i)
    longest = {source: max(decoder_lengths[i] for i in rows) for source, rows in together.items()}
    group: list[int] = []
    most_source = most_decoder = 0
    for source in sorted(together, key=lambda source: (len(source) + longest[source], len(source))):
        for i in sorted(together[source], key=lambda i: decoder_lengths[i]):
            most_source, most_decoder = max(most_source, len(source)), max(most_decoder, decoder_lengths[i])
            if group and (len(group) + 1) * (most_source + most_decoder) > _MAX_TOKENS:
                yield group
                group, most_source, most_decoder = [], len(source), decoder_lengths[i]
            group.append(i)
    if group:
        yield group
