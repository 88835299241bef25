"""Prompts to write answers to: read, checked, held out, and dealt out in an order that is computed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import numpy as np

from twofold.config.grpo import PromptData, PromptSource
from twofold.config.history import SourceUse
from twofold.data import BuildProgress, Convention, Example, SourceReader
from twofold.data.chat import ChatRefused, prompt_inputs
from twofold.data.examples import cut
from twofold.data.order import keys_for, permute
from twofold.data.sources import BadRecord, RawRecord, Record, parse_row
from twofold.data.tokenize import ChatTokenizer, Tokenizer
from twofold.objectives.pair import Tokens
from twofold.posttrain.pair_records import read_messages
from twofold.posttrain.records import TOO_LONG, is_held_out, read_part, record_reader, require_items

logger = logging.getLogger(__name__)


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
    def num_tokens(self) -> int:
        """Of both sides."""
        return len(self.source) + len(self.prefix)

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
    parts = [
        read_part(
            source,
            data,
            prompt_reader(source, wanted),
            read=partial(_read_checked, source, wanted, tokenizer, convention, check),
            fit=partial(_fitted, data=data, convention=convention),
            max_records=source.max_prompts,
            fields="prompt_field and columns",
            progress=progress,
        )
        for source in (*data.sources, *data.held_out)
    ]
    train_parts, held_parts = parts[: len(data.sources)], parts[len(data.sources) :]
    held_out = [prompt for part in held_parts for prompt in part.items]
    held_out_sources = [part.used(part.items) for part in held_parts]
    if data.held_out_fraction:
        for part in train_parts:
            chosen = [prompt for prompt in part.items if is_held_out(prompt.key, data)]
            held_out += chosen
            held_out_sources += [part.used(chosen)] if chosen else []
    keys = {prompt.key for prompt in held_out}
    for part in train_parts:
        part.held_out = [prompt for prompt in part.items if prompt.key in keys]
        part.items = [prompt for prompt in part.items if prompt.key not in keys]
        if part.held_out and data.held_out:
            logger.warning(
                "%s: %s prompts dropped: held out elsewhere", part.source.path, f"{len(part.held_out):,}"
            )
    train = [prompt for part in train_parts for prompt in part.items]
    report = [part.describe() for part in parts]
    require_items(data, train, held_out, report)
    return Prompts(
        train=train,
        held_out=held_out,
        report=report,
        train_sources=tuple(part.used(part.items) for part in train_parts),
        held_out_sources=tuple(held_out_sources),
    )


def _read_checked(
    source: PromptSource,
    wanted: Sequence[str],
    tokenizer: Tokenizer,
    convention: Convention,
    check: RecordCheck | None,
    raw: RawRecord,
) -> Prompt:
    prompt = read_prompt(raw, source, wanted, tokenizer, convention)
    if check is not None:
        check(prompt.record, prompt.where)
    return prompt


def columns_of(source: PromptSource, wanted: Sequence[str]) -> dict[str, str]:
    """What rewards are given of a source's records: name to column."""
    return {name: name for name in wanted} | source.columns


def prompt_reader(source: PromptSource, wanted: Sequence[str]) -> SourceReader:
    """The raw records of a source. Errors as for `SourceReader`."""
    columns = dict.fromkeys([source.prompt_field, *columns_of(source, wanted).values()])
    return record_reader(source, source.prompt_field, list(columns))


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


def _fitted(prompt: Prompt, data: PromptData, convention: Convention) -> Prompt | str:
    """The prompt itself where it is short enough, or cut; or why it is left out."""
    if len(prompt.source) <= data.source_length:
        return prompt
    if data.max_length_action == "skip":
        return TOO_LONG
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
