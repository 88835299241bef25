"""Preferences as examples: read, checked, held out, and dealt out in batches with a state.

P: pairs.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from twofold.config.history import Reading, SourceUse
from twofold.config.preferences import PairData, PairSource
from twofold.data import Batch, BuildProgress, Convention, Example, SourceReader
from twofold.data.chat import ChatRefused, record_to_example
from twofold.data.examples import cut
from twofold.data.loader import refuse_other_state
from twofold.data.order import keys_for, permute
from twofold.data.sources import BadRecord, RawRecord
from twofold.data.tokenize import Tokenizer
from twofold.posttrain.pair_records import parse_pair
from twofold.posttrain.records import TOO_LONG, is_held_out, read_part, record_reader, require_items

logger = logging.getLogger(__name__)

_WINDOW_BATCHES = 64
"""Batches that are made of pairs of similar length at a time: long enough that little is padding, short enough that
any two pairs may meet over the epochs."""


class Pair(NamedTuple):
    """Two replies to one prompt, as the model sees them: the same source and decoder prefix."""

    chosen: Example
    rejected: Example
    margin: float
    """By how much the rewards should differ."""

    where: str
    """For messages: file and line or row."""

    @property
    def length(self) -> int:
        """Tokens of the longer reply with its prompt."""
        longest = max(self.chosen.decoder_length, self.rejected.decoder_length)
        return len(self.chosen.source) + longest

    @property
    def num_tokens(self) -> int:
        """Of the prompt and both replies."""
        return len(self.chosen.source) + self.chosen.decoder_length + self.rejected.decoder_length

    def digest(self) -> bytes:
        """Of all tokens and the margin."""
        parts = [
            *self.chosen[:3],
            self.rejected.target,
            np.asarray([self.margin, self.chosen.ends, self.rejected.ends]),
        ]
        sizes = np.asarray([len(part) for part in parts])
        content = b"".join(np.ascontiguousarray(part).tobytes() for part in (sizes, *parts))
        return hashlib.blake2b(content, digest_size=16).digest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """All pairs of a run."""

    train: list[Pair]
    held_out: list[Pair]
    """Empty: nothing is held out."""

    report: list[str]
    """A line for each source: what is in it, and what was skipped, dropped or cut."""

    train_sources: tuple[SourceUse, ...] = ()
    """What `train` was read from."""

    held_out_sources: tuple[SourceUse, ...] = ()


def open_pairs(
    data: PairData,
    tokenizer: Tokenizer,
    convention: Convention,
    *,
    progress: Callable[[BuildProgress], None] | None = None,
) -> Pairs:
    """Read and tokenise all pairs of a run; they stay in memory.

    A reply and its prompt become an example as in supervised tuning (`data.chat.record_to_example`), so the same
    checks hold: no double BOS, a stop token at the end. What is skipped or dropped is counted and logged.

    Raises:
        FileNotFoundError, ImportError: see `SourceReader`.
        ValueError: too many bad records in a source, a pair that is too long, or nothing left on one side.
    """
    parts = [
        read_part(
            source,
            data,
            pair_reader(source),
            read=partial(read_pair, source=source, tokenizer=tokenizer, convention=convention),
            fit=partial(_fitted, data=data, convention=convention),
            max_records=source.max_pairs,
            fields="the fields",
            progress=progress,
        )
        for source in (*data.sources, *data.held_out)
    ]
    train_parts, held_parts = parts[: len(data.sources)], parts[len(data.sources) :]
    held_out = [pair for part in held_parts for pair in part.items]
    if data.held_out_fraction:
        for part in train_parts:
            chosen = [is_held_out(pair.chosen.source.tobytes(), data) for pair in part.items]
            part.held_out = [pair for pair, is_held in zip(part.items, chosen, strict=True) if is_held]
            part.items = [pair for pair, is_held in zip(part.items, chosen, strict=True) if not is_held]
            held_out += part.held_out
    prompts = {pair.chosen.source.tobytes() for pair in held_out}
    for part in train_parts:
        kept = [pair for pair in part.items if pair.chosen.source.tobytes() not in prompts]
        part.dropped["prompt is held out"] += len(part.items) - len(kept)
        part.items = kept
    for part in parts:
        for reason, count in part.dropped.items():
            if count:
                logger.warning("%s: %s pairs dropped: %s", part.source.path, f"{count:,}", reason)
    train = [pair for part in train_parts for pair in part.items]
    report = [part.describe() for part in parts]
    require_items(data, train, held_out, report)
    return Pairs(
        train=train,
        held_out=held_out,
        report=report,
        train_sources=tuple(part.used(part.items) for part in train_parts),
        held_out_sources=tuple(
            [part.used(part.items) for part in held_parts]
            + [part.used(part.held_out) for part in train_parts if part.held_out]
        ),
    )


def pair_reader(source: PairSource) -> SourceReader:
    """The raw records of a source. Errors as for `SourceReader`."""
    return record_reader(source, source.chosen_field, source.columns)


def read_pair(raw: RawRecord, source: PairSource, tokenizer: Tokenizer, convention: Convention) -> Pair:
    """One record as the model sees it.

    Raises:
        BadRecord: says where and why.
    """
    record = parse_pair(raw, source)
    try:
        chosen, rejected = (
            record_to_example(record.with_reply(reply), tokenizer, convention)
            for reply in (record.chosen, record.rejected)
        )
    except ChatRefused as error:
        raise BadRecord("chat does not render", f"{raw.where}: {error}") from error
    except ValueError as error:
        raise BadRecord("not a usable pair", f"{raw.where}: {error}") from error
    # A template could write the prompt in another way for another reply.
    if not all(np.array_equal(a, b) for a, b in zip(chosen[:2], rejected[:2], strict=True)):
        raise BadRecord(
            "two prompts", f"{raw.where}: the chat template renders the prompt differently for both replies"
        )
    return Pair(chosen, rejected, record.margin, raw.where)


def _fitted(pair: Pair, data: PairData, convention: Convention) -> Pair | str:
    """The pair itself where it is short enough, or cut; or why it is left out."""
    fitted = _short_enough(pair, data, convention)
    if fitted is None:
        return TOO_LONG
    if np.array_equal(fitted.chosen.target, fitted.rejected.target):
        return "chosen and rejected are the same"
    return fitted


def _short_enough(pair: Pair, data: PairData, convention: Convention) -> Pair | None:
    room = data.target_length - (len(pair.chosen.decoder_prefix) - 1)
    longest = max(len(pair.chosen.target), len(pair.rejected.target))
    if len(pair.chosen.source) <= data.source_length and longest <= room:
        return pair
    if data.max_length_action == "skip":
        return None
    if data.max_length_action == "error" or room < 1:
        raise ValueError(
            f"{pair.where}: a pair of {len(pair.chosen.source)} prompt tokens and replies of up to "
            f"{longest + len(pair.chosen.decoder_prefix) - 1} does not fit source_length={data.source_length} and "
            f"target_length={data.target_length}; raise them, or set max_length_action to 'truncate' or 'skip'"
        )
    limits = data.source_length, data.target_length, convention
    return pair._replace(chosen=cut(pair.chosen, *limits), rejected=cut(pair.rejected, *limits))


Collate = Callable[[Sequence[Pair], Sequence[int]], Batch]
"""Pairs and their numbers to a batch."""


class PairLoader:
    """Batches of pairs without end, epoch after epoch; `one_pass` for an evaluation.

    In each epoch every pair comes once. Pairs of similar length are put together, a window of the shuffled order at a
    time, and the batches shuffled again. Batch n of the run goes to stream n modulo `num_streams`, so that neither the
    number of ranks nor a stop changes what comes.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        data: PairData,
        collate: Collate,
        *,
        num_streams: int = 1,
        owned: Sequence[int] | None = None,
        identity: bytes = b"",
        sources: Sequence[SourceUse] = (),
    ) -> None:
        """
        Args:
            pairs: at least one.
            data: size of batches, order, seed.
            collate: makes batches.
            num_streams: batches of one step, over all ranks.
            owned: the streams this loader gives. None: all.
            identity: of what else batches hold; a saved state of another one is refused.
            sources: what the pairs were read from.
        """
        assert pairs
        self.pairs = pairs
        self._data = data
        self._sources = tuple(sources)
        self._collate = collate
        self.num_streams = num_streams
        self.owned = tuple(range(num_streams)) if owned is None else tuple(sorted(owned))
        """The streams of this loader."""
        self._lengths = np.asarray([pair.length for pair in pairs])
        self._steps = 0
        self._epoch: tuple[int, list[list[int]]] | None = None
        content = identity + b"".join(pair.digest() for pair in pairs)
        self.digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        """Of all pairs and `identity`."""

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self.pairs) // self._data.pairs_per_batch)

    def reading(self, state: Mapping[str, Any] | None = None) -> Reading:
        """What the pairs were read from, and how many were given out up to a state."""
        if state is None:
            return Reading(sources=self._sources)
        epochs, batches = divmod(max(state["streams"].values()) * self.num_streams, self.batches_per_epoch)
        pairs = epochs * len(self.pairs) + sum(map(len, self._order(epochs)[:batches]))
        return Reading(sources=self._sources, examples_drawn=pairs)

    def next_step(self) -> list[Batch]:
        """One batch of each owned stream, in their order."""
        first = self._steps * self.num_streams
        self._steps += 1
        return [self._batch(self._numbers(first + stream)) for stream in self.owned]

    def one_pass(self) -> Iterator[Batch]:
        """Every pair once, by length: the same batches each time; the last may be smaller."""
        return map(self._batch, self.numbers_by_length())

    def numbers_by_length(self) -> list[list[int]]:
        """The numbers of the pairs of each batch of `one_pass`."""
        return self._cut(np.argsort(self._lengths, kind="stable").tolist())

    def state_dict(self) -> dict[str, Any]:
        """Where the owned streams stand, JSON-able."""
        return {**self._identity(), "streams": {str(n): self._steps for n in self.owned}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: the state belongs to other pairs, another order, seed or number of streams.
        """
        refuse_other_state(state, self._identity(), otherwise="start a new run in another output")
        self._steps = state["streams"][str(self.owned[0])]

    def _identity(self) -> dict[str, Any]:
        data = self._data
        return {
            "seed": data.seed,
            "shuffle": data.shuffle,
            "num_streams": self.num_streams,
            "pairs_per_batch": data.pairs_per_batch,
            "pairs": self.digest,
        }

    def _numbers(self, batch: int) -> list[int]:
        """The pairs of a batch of the run."""
        epoch, place = divmod(batch, self.batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._order(epoch)
        return self._epoch[1][place]

    def _order(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch."""
        if not self._data.shuffle:
            return self._cut(list(range(len(self.pairs))))
        order = _shuffled(len(self.pairs), self._data.seed, 2 * epoch)
        size = _WINDOW_BATCHES * self._data.pairs_per_batch
        by_length: list[int] = []
        for start in range(0, len(order), size):
            window = order[start : start + size]
            by_length += window[np.argsort(self._lengths[window], kind="stable")].tolist()
        batches = self._cut(by_length)
        return [batches[n] for n in _shuffled(len(batches), self._data.seed, 2 * epoch + 1)]

    def _cut(self, numbers: Sequence[int]) -> list[list[int]]:
        size = self._data.pairs_per_batch
        return [list(numbers[start : start + size]) for start in range(0, len(numbers), size)]

    def _batch(self, numbers: Sequence[int]) -> Batch:
        return self._collate([self.pairs[n] for n in numbers], numbers)


def _shuffled(size: int, seed: int, number: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A permutation of its own for every number, int64 [size]."""
    key = keys_for(seed, np.asarray([number]))
    return permute(np.arange(size), size, key.repeat(size))
