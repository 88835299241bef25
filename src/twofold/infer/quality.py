"""What a precision costs in quality: the likelihood of given continuations, and whether greedy answers change.

Everything goes through the engine's backend, a token at a time, so that what is measured is what decodes.

Letters: V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from twofold.adapt.sample import default_texts
from twofold.data.chat import prompt_inputs
from twofold.data.convention import Convention, split_inputs
from twofold.data.tokenize import encode
from twofold.infer.backends import Backend, Held, Start
from twofold.infer.engine import Engine
from twofold.infer.request import Request
from twofold.models import EncoderDecoder


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A source and how it goes on."""

    source_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...]
    target_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one precision makes of some references."""

    losses: tuple[float, ...]
    """Nats of each reference's whole target."""
    n_tokens: tuple[int, ...]
    """Of each target."""
    greedy: tuple[tuple[int, ...], ...]
    """The greedy answer to each source, as long as its target or until an end token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """A precision beside float32."""

    nats_per_token: float
    nats_error: float
    """Standard error over references."""
    perplexity: float
    difference: float
    """Nats per token above float32's, on the same references."""
    difference_error: float
    """Standard error of that, paired."""
    equal_tokens: float
    """Share of float32's greedy tokens that come before the first difference."""
    identical: float
    """Share of greedy answers that are float32's."""


def read_texts(path: Path | None, limit: int) -> list[dict[str, str]]:
    """Records to measure on.

    Args:
        path: JSON lines with "prompt" and "completion", or with "text". None: Python's own documentation.
        limit: records taken, at most.

    Raises:
        ValueError: a line that is neither, or a file without any.
        FileNotFoundError: no such file.
    """
    if path is None:
        return [{"text": text} for documents in default_texts().values() for text in documents][:limit]
    found: list[dict[str, str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        keys = ("text",) if isinstance(record, dict) and "text" in record else ("prompt", "completion")
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in keys):
            raise ValueError(
                f'{path}, line {number}: need a JSON object with "prompt" and "completion", or with "text"'
            )
        found.append({key: record[key] for key in keys})
        if len(found) == limit:
            break
    if len(found) < 2:
        raise ValueError(f"{path} has {len(found)} records; a standard error takes at least 2")
    return found


def references(
    model: EncoderDecoder, records: Sequence[dict[str, str]], *, source_tokens: int, target_tokens: int
) -> list[Reference]:
    """Token ids of records, cut to lengths: of a prompt the end stays, of a completion and a text the beginning.

    A text is split in halves, one to read and one to write.

    Raises:
        ValueError: no tokenizer, or fewer than two records with something to read and to write.
    """
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, so its quality on text cannot be measured; add one")
    convention = Convention.of(model.config)
    found = []
    for record in records:
        if "text" in record:
            ids = encode(model.tokenizer, record["text"][: 20 * (source_tokens + target_tokens)])
            half = min(len(ids) // 2, source_tokens)
            if half == 0:
                continue
            source, prefix = split_inputs(ids[:half], convention)
            target = ids[half : half + target_tokens]
        else:
            if not record["prompt"]:
                continue
            source, prefix = prompt_inputs(record["prompt"], model.tokenizer, convention)
            n_bos = int(convention.source_bos)
            over = max(0, len(source) - source_tokens)
            source = source[[i for i in range(len(source)) if i < n_bos or i >= n_bos + over]]
            target = encode(model.tokenizer, record["completion"])[:target_tokens]
        if len(target):
            found.append(
                Reference(
                    source_ids=tuple(source.tolist()),
                    prefix_ids=tuple(prefix.tolist()),
                    target_ids=tuple(target.tolist()),
                )
            )
    if len(found) < 2:
        raise ValueError(
            f"{len(found)} of {len(records)} records have something to read and something to write; give at least 2"
        )
    return found


def measure_quality(engine: Engine, given: Sequence[Reference]) -> Measured:
    """Likelihood and greedy answers of an idle engine."""
    losses: list[float] = []
    for start in range(0, len(given), engine.batch_size):
        losses += target_losses(engine.loop.backend, given[start : start + engine.batch_size])
    handles = [
        engine.submit(
            Request(source_ids=one.source_ids, prefix_ids=one.prefix_ids, max_new_tokens=len(one.target_ids))
        )
        for one in given
    ]
    return Measured(
        losses=tuple(losses),
        n_tokens=tuple(len(one.target_ids) for one in given),
        greedy=tuple(handle.result()[0].token_ids for handle in handles),
    )


def target_losses(backend: Backend, given: Sequence[Reference]) -> list[float]:
    """Nats of each target, by decoding it token by token beside the others."""
    starts = [
        Start(
            source_ids=one.source_ids,
            prefix_ids=one.prefix_ids,
            n_rows=1,
            n_tokens=len(one.prefix_ids) + len(one.target_ids) - 1,
        )
        for one in given
    ]
    held: list[Held] = []
    losses: list[float] = []
    for (kept, logits_V), one in zip(backend.start(starts), given, strict=True):
        held.append(kept)
        losses.append(_nats(logits_V, one.target_ids[0]))
    for place in range(1, max(len(one.target_ids) for one in given)):
        going = [i for i, one in enumerate(given) if place < len(one.target_ids)]
        newest = [[given[i].target_ids[place - 1]] for i in going]
        logits = backend.step([held[i] for i in going], newest)
        for i, logits_1V in zip(going, logits, strict=True):
            losses[i] += _nats(logits_1V[0], given[i].target_ids[place])
    return losses


def _nats(logits_V: Tensor, token: int) -> float:
    return float(torch.logsumexp(logits_V.double(), dim=0) - logits_V[token].double())


def compare(measured: Measured, float32: Measured) -> Quality:
    """A precision against float32 on the same references."""
    assert measured.n_tokens == float32.n_tokens
    nats, nats_error = _per_token(measured.losses, measured.n_tokens)
    above = [a - b for a, b in zip(measured.losses, float32.losses, strict=True)]
    difference, difference_error = _per_token(above, measured.n_tokens)
    pairs = list(zip(measured.greedy, float32.greedy, strict=True))
    shared = sum(shared_tokens(*pair) for pair in pairs)
    return Quality(
        nats_per_token=nats,
        nats_error=nats_error,
        perplexity=math.exp(nats),
        difference=difference,
        difference_error=difference_error,
        equal_tokens=shared / sum(len(wanted) for _, wanted in pairs),
        identical=sum(found == wanted for found, wanted in pairs) / len(pairs),
    )


def shared_tokens(found: Sequence[int], wanted: Sequence[int]) -> int:
    """How many tokens two answers share before they differ."""
    same = 0
    for a, b in zip(found, wanted, strict=False):
        if a != b:
            break
        same += 1
    return same


def _per_token(totals: Sequence[float], n_tokens: Sequence[int]) -> tuple[float, float]:
    """Mean per token over examples of unequal length, and its standard error (of a ratio, to first order)."""
    n, tokens = len(totals), sum(n_tokens)
    mean = sum(totals) / tokens
    squares = sum((total - mean * length) ** 2 for total, length in zip(totals, n_tokens, strict=True))
    return mean, math.sqrt(squares * n / (n - 1)) / tokens
