"""Prompts to write answers to: read, checked, held out, and dealt out in an order that is computed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np

from twofold.config.data import SourceConfig
from twofold.config.grpo import PromptData, PromptSource
from twofold.config.history import SourceUse, source_use
from twofold.data import BuildProgress, Convention, Example, SourceReader
from twofold.data.chat import ChatRefused, prompt_inputs
from twofold.data.examples import cut
from twofold.data.order import keys_for, permute
from twofold.data.sources import BadRecord, RawRecord, Record, parse_row
from twofold.data.store import RecordCounts
from twofold.data.tokenize import ChatTokenizer, Tokenizer
from twofold.objectives.pair import Tokens
from twofold.posttrain.pair_records import read_messages
from twofold.posttrain.pairs import is_held_out

logger = logging.getLogger(__name__)

_PROGRESS_RECORDS = 1000


class Prompt(NamedTuple):
    """A prompt as the model sees it, and what rewards know of it."""

    source: Tokens
    """int64 [S]: encoder input."""

    prefix: Tokens
    """int64 [P]: decoder input that is given."""

    prompt: str | list[dict[str, str]]
    """The text, in its template, or the conversation."""

    record: Record
    """Columns for rewards, by the names they know them by."""

    where: str
    """For messages: file and line or row."""

    @property
    def key(self) -> bytes:
        """Equal for prompts that a model cannot tell apart."""
        return self.source.tobytes() + b"|" + self.prefix.tobytes()


RecordCheck = Callable[[Record, str], None]
"""Raises `BadRecord` for a record, found at some place, that rewards cannot use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """All prompts of a run."""

    train: list[Prompt]
    held_out: list[Prompt]
    """Empty: nothing is held out."""

    report: list[str]
    """A line for each source: what is in it, and what was skipped, dropped or cut."""

    train_sources: tuple[SourceUse, ...] = ()
    """What `train` was read from."""

    held_out_sources: tuple[SourceUse, ...] = ()


def open_prompts(
    data: PromptData,
    wanted: Sequence[str],
    tokenizer: Tokenizer,
    convention: Convention,
    *,
    check: RecordCheck | None = None,
    progress: Callable[[BuildProgress], None] | None = None,
) -> Prompts:
    """Read and tokenise all prompts of a run; they stay in memory.

    Args:
        wanted: the names of what rewards read of a record.
        check: looks at each record.
        progress: told now and then.

    Raises:
        FileNotFoundError, ImportError: see `SourceReader`.
        ValueError: too many bad records in a source, a prompt that is too long, or nothing left on one side.
    """
    read = [
        _read(source, data, wanted, tokenizer, convention, check, progress)
        for source in (*data.sources, *data.held_out)
    ]
    train_parts, held_parts = read[: len(data.sources)], read[len(data.sources) :]
    held_out = [prompt for part in held_parts for prompt in part.prompts]
    held_out_sources = [part.used(part.prompts) for part in held_parts]
    if data.held_out_fraction:
        for part in train_parts:
            chosen = [prompt for prompt in part.prompts if is_held_out(prompt.key, data)]
            held_out += chosen
            held_out_sources += [part.used(chosen)] if chosen else []
    keys = {prompt.key for prompt in held_out}
    for part in train_parts:
        kept = [prompt for prompt in part.prompts if prompt.key not in keys]
        part.held_out = len(part.prompts) - len(kept)
        part.prompts = kept
        if part.held_out and data.held_out:
            logger.warning(
                "%s: %s prompts dropped: held out elsewhere", part.source.path, f"{part.held_out:,}"
            )
    train = [prompt for part in train_parts for prompt in part.prompts]
    report = [part.describe() for part in read]
    for name, prompts, is_wanted in (("train on", train, True), ("hold out", held_out, data.has_held_out)):
        if is_wanted and not prompts:
            raise ValueError(
                f"there is no prompt to {name} ({'; '.join(report)}); give other sources or held_out_fraction"
            )
    return Prompts(
        train=train,
        held_out=held_out,
        report=report,
        train_sources=tuple(part.used(part.prompts) for part in train_parts),
        held_out_sources=tuple(held_out_sources),
    )


@dataclass(slots=True)
class _Part:
    """What one source gave."""

    source: PromptSource
    prompts: list[Prompt]
    counts: RecordCounts
    dropped: Counter[str]
    cut: int = 0
    held_out: int = 0

    def used(self, prompts: Sequence[Prompt]) -> SourceUse:
        """For the card: some of its prompts."""
        tokens = sum(len(prompt.source) + len(prompt.prefix) for prompt in prompts)
        return source_use(self.source.path, self.source.format, records=len(prompts), tokens=tokens)

    def describe(self) -> str:
        text = f"{self.source.path}: {len(self.prompts):,} prompts"
        if self.held_out:
            text += f"; {self.held_out:,} held out"
        if self.counts.bad:
            text += f"; {self.counts.summary()}"
        for reason, count in self.dropped.items():
            text += f"; {count:,} prompts dropped: {reason}"
        return text + (f"; {self.cut:,} prompts are longer than allowed and are cut" if self.cut else "")


def _read(
    source: PromptSource,
    data: PromptData,
    wanted: Sequence[str],
    tokenizer: Tokenizer,
    convention: Convention,
    check: RecordCheck | None,
    progress: Callable[[BuildProgress], None] | None,
) -> _Part:
    part = _Part(source, [], RecordCounts(), Counter())
    num_tokens = 0
    reader = prompt_reader(source, wanted)
    for raw in reader:
        if part.counts.records == source.max_prompts:
            break
        part.counts.records += 1
        try:
            prompt = read_prompt(raw, source, wanted, tokenizer, convention)
            if check is not None:
                check(prompt.record, prompt.where)
        except BadRecord as error:
            part.counts.refuse(error)
            continue
        num_tokens += len(prompt.source) + len(prompt.prefix)
        fitted = _fitted(prompt, data, convention)
        if fitted is None:
            part.dropped["longer than allowed (max_length_action='skip')"] += 1
        else:
            part.cut += fitted is not prompt
            part.prompts.append(fitted)
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
            "the data, set prompt_field and columns to its columns, or raise it"
        )
    if counts.bad:
        logger.warning("%s: %s", source.path, counts.summary())
    return part


def columns_of(source: PromptSource, wanted: Sequence[str]) -> dict[str, str]:
    """What rewards are given of a source's records: name to column."""
    return {name: name for name in wanted} | source.columns


def prompt_reader(source: PromptSource, wanted: Sequence[str]) -> SourceReader:
    """The raw records of a source. Errors as for `SourceReader`."""
    # The columns are ours; of the fields of running text one must be set, or files without columns would be read too.
    config = SourceConfig(
        path=source.path, format=source.format, split=source.split, messages_field=source.prompt_field
    )
    return SourceReader(
        config, list(dict.fromkeys([source.prompt_field, *columns_of(source, wanted).values()]))
    )


def read_prompt(
    raw: RawRecord, source: PromptSource, wanted: Sequence[str], tokenizer: Tokenizer, convention: Convention
) -> Prompt:
    """One record as the model sees it.

    Raises:
        BadRecord: says where and why.
    """
    columns = columns_of(source, wanted)
    value, *rest = parse_row(raw, [source.prompt_field, *columns.values()])
    record = dict(zip(columns, rest, strict=True))
    prompt: str | list[dict[str, str]]
    if isinstance(value, list) and not all(isinstance(part, str) for part in value):
        prompt = read_messages(value, source.prompt_field, raw.where)
        if prompt and prompt[-1]["role"] != "user":
            raise BadRecord(
                "no user's turn", f"{raw.where}: a conversation must end with a user's turn, to be answered"
            )
    else:
        text = " ".join(value) if isinstance(value, list) else value
        if not isinstance(text, str):
            raise BadRecord(
                "wrong type",
                f"{raw.where}: column {source.prompt_field!r} must be a text, a list of texts or of messages, got "
                f"{type(value).__name__}",
            )
        prompt = source.template.replace("{prompt}", text) if text.strip() else ""
    if not prompt:
        raise BadRecord("empty prompt", f"{raw.where}: the prompt is empty")
    has_template = getattr(tokenizer, "chat_template", None) is not None
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and has_template else prompt
    try:
        tokens = prompt_inputs(given, cast(ChatTokenizer, tokenizer), convention)
    except ChatRefused as error:
        raise BadRecord("chat does not render", f"{raw.where}: {error}") from error
    except ValueError as error:
        raise BadRecord("not a usable prompt", f"{raw.where}: {error}") from error
    return Prompt(*tokens, prompt, record, raw.where)


def _fitted(prompt: Prompt, data: PromptData, convention: Convention) -> Prompt | None:
    """The prompt itself where it is short enough, or cut; None: to be left out."""
    if len(prompt.source) <= data.source_length:
        return prompt
    if data.max_length_action == "skip":
        return None
    if data.max_length_action == "error":
        raise ValueError(
            f"{prompt.where}: a prompt of {len(prompt.source)} tokens does not fit source_length={data.source_length}; "
            "raise it, or set max_length_action to 'truncate' or 'skip'"
        )
    example = Example(prompt.source, prompt.prefix, prompt.prefix[:1], ends=False)
    return prompt._replace(source=cut(example, data.source_length, len(prompt.prefix), convention).source)


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Of all tokens and records."""
    whole = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        record = json.dumps(prompt.record, sort_keys=True, default=str).encode()
        for part in (prompt.key, record):
            whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()


class PromptOrder:
    """Which prompt comes when: epoch after epoch, each prompt once in each, any place at once."""

    def __init__(self, size: int, seed: int, *, shuffle: bool) -> None:
        """`size`: number of prompts, at least 1."""
        self._size, self._seed, self._shuffle = size, seed, shuffle

    def __getitem__(self, draw: int) -> int:
        """The number of the prompt at place `draw` of the run."""
        epoch, place = divmod(draw, self._size)
        if not self._shuffle:
            return place
        key = keys_for(self._seed, np.asarray([epoch]))
        return int(permute(np.asarray([place]), self._size, key)[0])
