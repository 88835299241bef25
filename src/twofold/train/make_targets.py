"""Stage `distill-targets`: a teacher reads the texts of a run once, and what it says is stored.

The texts are the units of the run's token stores: what one PrefixLM example is made of, or a supervised pair. The
longer chunks that the denoisers of a mixture share are read in pieces as long as their longest example. Stored
predictions belong to tokens of the store, so other objectives can use them too; what the teacher has read before a
token is then more or less than the example has.

Several processes (torchrun, or any launcher that sets RANK and WORLD_SIZE) divide the shards and do not speak to each
other. A shard's draws depend on the seed and its units alone, so a shard that is made again on the same kind of device
is the same file.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twofold.adapt.adaptation import open_adaptation
from twofold.adapt.plan import Choices
from twofold.checkpoint import resolve
from twofold.checkpoint.load import read_config
from twofold.config import EncoderDecoderConfig
from twofold.config.recipe import ModelConfig
from twofold.config.targets import TargetsRecipe
from twofold.data import Convention, SourceReader, longest_text, open_corpora, required_sentinels
from twofold.data.build import Progress
from twofold.data.examples import ExampleMaker
from twofold.data.stream import Unit, Units
from twofold.data.targets import (
    Predictions,
    Shard,
    ShardWriter,
    TargetsHeader,
    name_store,
    shard_folder,
    start_targets,
)
from twofold.data.teaching import with_bos
from twofold.objectives.pair import Tokens
from twofold.train.loss import CHUNK_BYTES
from twofold.train.sparse import Entries, sampled_entries, top_k_entries
from twofold.train.teacher import DecoderTeacher, check_tokenizer, open_decoder_teacher

_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class TargetsProgress:
    """How far this process is."""

    shards_done: int
    num_shards: int
    """Of this process."""
    tokens: int
    """Of the last shard."""


@dataclass(frozen=True, slots=True)
class TargetsResult:
    """What this process has made."""

    output: Path
    num_shards: int
    """Of this process, those included that were there already."""
    num_shards_of_all: int
    is_complete: bool
    """All shards are there, those of other processes included."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """A unit as the teacher reads it."""

    tokens: Tokens
    """Without BOS."""
    wanted: slice
    """Tokens whose prediction is kept."""
    place: int
    """Of the first wanted token in the store."""
    seed: int
    """Of the draws."""


def make_targets(
    recipe: TargetsRecipe,
    *,
    on_tokens: Progress | None = None,
    on_shard: Callable[[TargetsProgress], None] | None = None,
) -> TargetsResult:
    """Do what a recipe of stage `distill-targets` says, or go on with it.

    Args:
        recipe: see `TargetsRecipe`.
        on_tokens: see `build_store`.
        on_shard: called after each shard.

    Raises:
        FileExistsError: the output holds something else.
        FileNotFoundError: no teacher, student or data.
        ValueError: they do not go together; nothing has been written.
    """
    for source in (*recipe.data.sources, *recipe.data.held_out):
        SourceReader(source)  # finds missing files before anything is tokenised
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    config, tokenizer = student_of(recipe.model)
    check_tokenizer(recipe.teacher, resolve(recipe.teacher).tokenizer(), tokenizer)
    convention = Convention.of(config)
    # Sentinels never get into the texts; what matters is that there are as many as denoisers would use.
    sentinels = range(required_sentinels(tokenizer, recipe.data, convention))
    maker = ExampleMaker(tokenizer, recipe.data, convention, sentinels, keeps_raw=True)
    corpora, _ = open_corpora(recipe.data, tokenizer, convention, progress=on_tokens)
    longest = longest_text(tokenizer, recipe.data, convention)
    sources = [Units(c, maker, n, recipe.data.seed) for n, c in enumerate(corpora)]

    teacher = open_decoder_teacher(
        recipe.teacher,
        dtype=torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32,
        device=_device(recipe),
        max_length=longest,
        vocab_size=config.decoder.vocab_size,
    )
    header = TargetsHeader(
        teacher=recipe.teacher,
        method=recipe.method,
        k=recipe.k,
        seed=recipe.seed,
        precision=recipe.precision,
        vocab_size=len(teacher.weight_VE),
        stores=tuple(name_store(c.store, c.source.path) for c in corpora),
        shards=tuple(plan_shards(sources, recipe.shard_tokens)),
    )
    output = Path(recipe.output)
    start_targets(output, header)
    mine = range(rank, len(header.shards), world)
    for done, number in enumerate(mine, start=1):
        shard = header.shards[number]
        if not shard_folder(output, number).is_dir():
            writer = ShardWriter(output, header, number)
            _fill(
                writer, _readings(shard, sources[shard.source], longest, recipe.seed), teacher, recipe, header
            )
            writer.finish()
        if on_shard is not None:
            on_shard(TargetsProgress(done, len(mine), shard.end_token - shard.first_token))
    is_complete = all(shard_folder(output, number).is_dir() for number in range(len(header.shards)))
    return TargetsResult(output, len(mine), len(header.shards), is_complete)


def student_of(model: ModelConfig) -> tuple[EncoderDecoderConfig, Any]:
    """Configuration and tokenizer of a student, without its weights.

    Raises:
        FileNotFoundError, ValueError: see `load` and `adapt`; or it has no tokenizer.
    """
    if model.path is not None:
        checkpoint = resolve(model.path)
        config, tokenizer = read_config(checkpoint)[0], checkpoint.tokenizer()
    else:
        assert model.adapt is not None
        given = model.adapt.model_dump()
        encoder, decoder, seed = (given.pop(name) for name in ("encoder", "decoder", "seed"))
        with open_adaptation(encoder, decoder, Choices(**given), None, seed) as adaptation:
            config, tokenizer = adaptation.plan.config, adaptation.tokenizer
    if tokenizer is None:
        raise ValueError(
            "the student has no tokenizer, so text cannot be read; put tokenizer files into its folder"
        )
    return config, tokenizer


def plan_shards(sources: Sequence[Units], shard_tokens: int) -> Iterator[Shard]:
    """Runs of consecutive units with about `shard_tokens` tokens of the store each; never of two stores."""
    for number, units in enumerate(sources):
        opened: tuple[int, int] | None = None
        for first in range(0, len(units), _BLOCK):
            block = np.arange(first, min(first + _BLOCK, len(units)))
            for unit, (_, start, end, _) in zip(block.tolist(), units.locate(block), strict=True):
                opened = opened or (unit, start)
                if end - opened[1] >= shard_tokens or unit == len(units) - 1:
                    yield Shard(
                        source=number,
                        first_unit=opened[0],
                        end_unit=unit + 1,
                        first_token=opened[1],
                        end_token=end,
                    )
                    opened = None


def _fill(
    writer: ShardWriter,
    readings: Iterator[_Reading],
    teacher: DecoderTeacher,
    recipe: TargetsRecipe,
    header: TargetsHeader,
) -> None:
    batch_tokens = recipe.data.rows_per_batch * (recipe.data.source_length + recipe.data.target_length)
    waiting: list[_Reading] = []
    for reading in readings:
        longest = max(len(r.tokens) for r in (*waiting, reading))
        if waiting and longest * (len(waiting) + 1) > batch_tokens:
            _predict(writer, waiting, teacher, recipe, header)
            waiting = []
        waiting.append(reading)
    if waiting:
        _predict(writer, waiting, teacher, recipe, header)


def _readings(shard: Shard, units: Units, longest: int, seed: int) -> Iterator[_Reading]:
    """The texts of a shard, none of more than `longest` tokens."""
    is_supervised = units.corpus.store.parts is not None
    for first in range(shard.first_unit, shard.end_unit, _BLOCK):
        numbers = np.arange(first, min(first + _BLOCK, shard.end_unit))
        for number, place in zip(numbers.tolist(), units.locate(numbers), strict=True):
            draws = zlib.crc32(f"{seed} {shard.source} {number}".encode())
            _, start, end, _ = place
            if not is_supervised:
                for at in range(start, end, longest):
                    tokens = units.corpus.store.tokens[at : min(at + longest, end)].astype(np.int64)
                    yield _Reading(tokens, slice(0, len(tokens)), at, draws + at)
                continue
            raw = units.pieces(Unit(shard.source, 0, number), place)[0].example.raw
            assert raw is not None
            of_text = raw.origins[raw.origins >= 0]
            if len(of_text):
                wanted = slice(int(of_text[0]), int(of_text[-1]) + 1)
                yield _Reading(raw.tokens, wanted, raw.start + wanted.start, draws)


@torch.no_grad()
def _predict(
    writer: ShardWriter,
    readings: Sequence[_Reading],
    teacher: DecoderTeacher,
    recipe: TargetsRecipe,
    header: TargetsHeader,
) -> None:
    read = [with_bos(reading.tokens, teacher.bos_token_id) for reading in readings]
    lengths = np.asarray([len(tokens) for tokens, _ in read])
    segments = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    ids = np.zeros_like(segments)
    for row, (tokens, _) in enumerate(read):
        ids[row, : len(tokens)] = tokens
    device = teacher.device
    output = teacher.read(torch.from_numpy(ids).to(device), torch.from_numpy(segments).to(device))
    states = output.last_hidden_state
    for reading, (_, before), states_RE in zip(readings, read, states, strict=True):
        # Token i is predicted at the state before it, the first one only where there is a BOS.
        silent = max(0, 1 - before - reading.wanted.start)
        at = slice(reading.wanted.start + silent + before - 1, reading.wanted.stop + before - 1)
        entries = _entries(states_RE[at], teacher, recipe, reading.seed)
        writer.add(reading.place, _predictions(entries, silent, header))


def _entries(states_LE: Tensor, teacher: DecoderTeacher, recipe: TargetsRecipe, seed: int) -> Entries:
    """What is kept at some positions; logits exist for a few of them at a time."""
    weight_VE, softcap = teacher.weight_VE, teacher.softcap
    generator = torch.Generator(weight_VE.device).manual_seed(seed)
    parts = []
    for states in torch.split(states_LE, max(CHUNK_BYTES // (4 * len(weight_VE)), 1)):
        logits = (states @ weight_VE.t()).float()
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        if recipe.method == "top_k":
            parts.append(top_k_entries(logits, recipe.k))
        else:
            parts.append(sampled_entries(logits, recipe.k, generator))
    return Entries(*(torch.cat(same).cpu() for same in zip(*parts, strict=True)))


def _predictions(entries: Entries, silent: int, header: TargetsHeader) -> Predictions:
    """Entries as they are stored, after some tokens that were not predicted."""
    ids, shares, kept = (tensor.numpy() for tensor in entries)
    shares = shares.astype(np.float16)
    is_entry = shares > 0  # tiny ones vanish in float16
    return Predictions(
        counts=np.concatenate([np.zeros(silent, np.int64), is_entry.sum(axis=1)]),
        ids=ids[is_entry].astype(header.id_dtype),
        shares=shares[is_entry],
        kept=np.concatenate([np.zeros(silent), kept]).astype(np.float16),
    )


def _device(recipe: TargetsRecipe) -> torch.device:
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but PyTorch finds no CUDA device; set device to 'cpu' or 'auto'")
    if recipe.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
