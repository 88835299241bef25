"""Records of a run that stays in memory: read, checked, fitted, and held out by their prompt.

What a record becomes, and when it is too long, is the stage's; see `posttrain.pairs` and `posttrain.prompts`.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from twofold.config.data import SourceConfig
from twofold.config.history import SourceUse, source_use
from twofold.config.records import RecordData, RecordSource
from twofold.data import BuildProgress, SourceReader
from twofold.data.sources import BadRecord, RawRecord
from twofold.data.store import RecordCounts

logger = logging.getLogger(__name__)

_PROGRESS_RECORDS = 1000

TOO_LONG = "longer than allowed (max_length_action='skip')"
"""Why an item is dropped."""


class Counted(Protocol):
    """Something with a length."""

    @property
    def num_tokens(self) -> int:
        """All of it."""
        ...


Item = TypeVar("Item", bound=Counted)


@dataclass(kw_only=True, slots=True)
class Part(Generic[Item]):
    """What one source gave."""

    source: RecordSource
    name: str
    """Of the items, in the plural."""
    items: list[Item] = field(default_factory=list)
    counts: RecordCounts = field(default_factory=RecordCounts)
    dropped: Counter[str] = field(default_factory=Counter)
    """By reason."""
    cut: int = 0
    held_out: list[Item] = field(default_factory=list)

    def used(self, items: Sequence[Item]) -> SourceUse:
        """For the card: some of its items."""
        tokens = sum(item.num_tokens for item in items)
        return source_use(self.source.path, self.source.format, records=len(items), tokens=tokens)

    def describe(self) -> str:
        """What is in it, and what was held out, skipped, dropped or cut."""
        text = f"{self.source.path}: {len(self.items):,} {self.name}"
        if self.held_out:
            text += f"; {len(self.held_out):,} held out"
        if self.counts.bad:
            text += f"; {self.counts.summary()}"
        for reason, count in self.dropped.items():
            if count:
                text += f"; {count:,} {self.name} dropped: {reason}"
        return text + (f"; {self.cut:,} {self.name} are longer than allowed and are cut" if self.cut else "")


def read_part(
    source: RecordSource,
    data: RecordData,
    reader: SourceReader,
    *,
    read: Callable[[RawRecord], Item],
    fit: Callable[[Item], Item | str],
    max_records: int | None,
    fields: str,
    progress: Callable[[BuildProgress], None] | None,
) -> Part[Item]:
    """All items of a source.

    Args:
        read: makes one of a record, or raises `BadRecord`.
        fit: the item itself, or cut; or why it is dropped.
        max_records: None: all.
        fields: the settings that name columns, for an error.
        progress: told now and then.

    Raises:
        ValueError: too many bad records.
    """
    part: Part[Item] = Part(source=source, name=data.items)
    num_tokens = 0
    for raw in reader:
        if part.counts.records == max_records:
            break
        part.counts.records += 1
        try:
            item = read(raw)
        except BadRecord as error:
            part.counts.refuse(error)
            continue
        fitted = fit(item)
        if isinstance(fitted, str):
            part.dropped[fitted] += 1
        else:
            part.cut += fitted is not item
            part.items.append(fitted)
        num_tokens += item.num_tokens
        if progress is not None and part.counts.records % _PROGRESS_RECORDS == 0:
            progress(
                BuildProgress(
                    path=source.path,
                    documents=part.counts.records,
                    tokens=num_tokens,
                    share_read=reader.share_read,
                )
            )
    counts = part.counts
    if counts.bad.total() > data.max_bad_share * counts.records:
        raise ValueError(
            f"source {source.path!r}: {counts.summary()}. That is more than max_bad_share={data.max_bad_share}; repair "
            f"the data, set {fields} to its columns, or raise it"
        )
    if counts.bad:
        logger.warning("%s: %s", source.path, counts.summary())
    return part


def record_reader(source: RecordSource, field: str, columns: Sequence[str]) -> SourceReader:
    """The raw records of a source. Errors as for `SourceReader`."""
    # The columns are ours; of the fields of running text one must be set, or files without columns would be read too.
    config = SourceConfig(path=source.path, format=source.format, split=source.split, messages_field=field)
    return SourceReader(config, columns)


def is_held_out(prompt: bytes, data: RecordData) -> bool:
    """By the prompt's tokens and the seed alone."""
    key = hashlib.blake2b(prompt, key=str(data.seed).encode(), digest_size=8).digest()
    return int.from_bytes(key, "little") / 2**64 < data.held_out_fraction


def require_items(
    data: RecordData, train: Sequence[Item], held_out: Sequence[Item], report: Sequence[str]
) -> None:
    """Refuse a run without something to train on or, where it is wanted, to hold out.

    Raises:
        ValueError: there is none; says what each source gave.
    """
    for purpose, items, is_wanted in (("train on", train, True), ("hold out", held_out, data.has_held_out)):
        if is_wanted and not items:
            raise ValueError(
                f"there is no {data.items.removesuffix('s')} to {purpose} ({'; '.join(report)}); give other sources or "
                "held_out_fraction"
            )
