"""From a recipe to a run: model, sentinels, loaders, and all checks that can come before the first step."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
import yaml

from twofold.adapt import adapt
from twofold.adapt.vocabulary import add_sentinels
from twofold.checkpoint.load import load
from twofold.config import EncoderDecoderConfig
from twofold.config.data import DataConfig
from twofold.config.recipe import ModelConfig, Recipe, Run
from twofold.data import (
    BuildProgress,
    Convention,
    Corpus,
    Loader,
    Prefetcher,
    SourceReader,
    longest_text,
    open_corpora,
    required_sentinels,
)
from twofold.data.teaching import Teaching
from twofold.models import EncoderDecoder, EncoderModel
from twofold.objectives import find_sentinels
from twofold.train.build import build_on_ranks, require_tokenizer
from twofold.train.callbacks import Callback, RunStart, TrainResult, tokenise_progress
from twofold.train.loop import find_start, fit, new_state
from twofold.train.step import LossModule
from twofold.train.teacher import Distillation, open_distillation
from twofold.train.world import World, start_world


def train(recipe: Recipe, *, resume: bool = False, callbacks: Sequence[Callback] = ()) -> TrainResult:
    """Do what a recipe says.

    Beside what `fit` writes, `output` gets recipe.resolved.yaml, data.txt (what was read, skipped and dropped)
    and, for a new pair, adaptation.json.

    Args:
        recipe: see `load_recipe`.
        resume: see `fit`.
        callbacks: watchers; with several ranks called on the rank they are given to.

    Raises:
        FileExistsError, FileNotFoundError: see `fit`; before anything is loaded. Also: no donors or no data.
        ValueError: model, data and settings do not go together; nothing has been written.
        NonFiniteError: see `fit`.
    """
    with start_world(recipe) as world:
        output = Path(recipe.output)
        checkpoint = world.from_main(lambda: find_checked_start(recipe, output, resume=resume))
        parts = build_parts(recipe, checkpoint, world, callbacks)
        model, train_loader, held_out_loader, distillation = parts
        watchers = (
            [RunFiles(recipe, model, train_loader.report()), *callbacks] if world.is_main else callbacks
        )
        with Prefetcher(train_loader) as prefetched:
            return fit(
                model,
                prefetched,
                held_out_loader,
                recipe,
                output,
                watchers,
                resume=resume,
                world=world,
                objective=LossModule if distillation is None else distillation.objective,
            )


def find_checked_start(recipe: Run, output: Path, *, resume: bool) -> Path | None:
    """The checkpoint to go on from, which fits the recipe; None: the run begins. Raises: see `fit`."""
    checkpoint = find_start(output, resume=resume)
    new_state(recipe, checkpoint)
    return checkpoint


Parts: TypeAlias = tuple[EncoderDecoder, Loader, Loader | None, Distillation | None]


def build_parts(
    recipe: Recipe, checkpoint: Path | None, world: World, callbacks: Sequence[Callback] = ()
) -> Parts:
    """Model, loaders and teacher of one rank. Rank 0 alone reads weights of the model, and comes first; the others'
    model, with the vocabulary that rank 0 found or made, is on the meta device.

    Raises: see `train`.
    """

    def make() -> EncoderDecoder:
        for source in (*recipe.data.sources, *recipe.data.held_out):
            SourceReader(source)  # finds missing files before the model is loaded
        return build_model(recipe.model, weights_of(recipe, checkpoint))

    def read(model: EncoderDecoder) -> tuple[Loader, Loader | None, Distillation | None]:
        size = model.config.decoder.vocab_size
        distillation = build_distillation(recipe, model, world.device)
        loaders = build_loaders(
            recipe.data,
            model,
            num_streams=recipe.accumulate_batches,
            owned=world.streams(recipe.accumulate_batches),
            progress=tokenise_progress(callbacks) if world.is_main else None,
            teaching=None if distillation is None else distillation.teaching,
        )
        for callback in callbacks:
            callback.on_data(loaders[0].report())
        if distillation is not None:
            distillation.check(model)
        if recipe.adapter is not None and model.config.decoder.vocab_size != size:
            raise ValueError(
                f"the objective adds {model.config.decoder.vocab_size - size} sentinels to the vocabulary, whose "
                "embeddings an adapter would leave untrained; train the whole model, or start from one that has them"
            )
        return *loaders, distillation

    model, (train_loader, held_out, distillation) = build_on_ranks(
        world, make=make, make_empty=EncoderDecoder, read=read
    )
    return model, train_loader, held_out, distillation


def build_distillation(recipe: Recipe, student: EncoderDecoder, device: torch.device) -> Distillation | None:
    """The teacher of a run, checked and loaded; None where it has none.

    Raises:
        FileNotFoundError, ValueError: see `open_distillation`.
    """
    if recipe.distillation is None:
        return None
    if student.tokenizer is None:
        raise ValueError(
            "the student has no tokenizer to compare with its teacher's; put its files into the folder"
        )
    return open_distillation(
        recipe.distillation,
        student,
        pad_multiple=recipe.data.pad_multiple,
        max_raw_length=longest_text(student.tokenizer, recipe.data, Convention.of(student.config)),
        precision=recipe.precision,
        device=device,
    )


def weights_of(recipe: Run, checkpoint: Path | None) -> Path | None:
    """The checkpoint to build a resumed run's model from; None where that has an adapter alone and the model is built
    as for a new run."""
    return checkpoint if recipe.adapter is None else None


def build_model(config: ModelConfig, checkpoint: Path | None = None) -> EncoderDecoder:
    """The model of a run in float32, from a training checkpoint, a checkpoint, or donors."""
    if checkpoint is not None:
        return load(checkpoint, dtype=torch.float32)
    if config.path is not None:
        return load(config.path, dtype=torch.float32, skip_vision=config.skip_vision)
    assert config.adapt is not None
    return adapt(**config.adapt.model_dump(), dtype=torch.float32)


def build_loaders(
    config: DataConfig,
    model: EncoderDecoder,
    *,
    num_streams: int = 1,
    owned: Sequence[int] | None = None,
    progress: Callable[[BuildProgress], None] | None = None,
    teaching: Callable[[Sequence[Corpus]], Teaching | None] | None = None,
) -> tuple[Loader, Loader | None]:
    """The training loader, and that of the held-out documents where there are any.

    Tokenises what is not in the cache yet; other processes that ask for the same wait for it. Adds sentinels to the
    model's vocabulary and tokenizer where the objective needs more than there are.

    Args:
        config: sources, objective and lengths.
        model: with its tokenizer.
        num_streams: batches of one training step, over all ranks.
        owned: the streams of this rank. None: all.
        progress: of tokenising.
        teaching: what a teacher adds to training batches, given the training corpora.

    Raises:
        FileNotFoundError: no data.
        ValueError: no tokenizer, rows longer than the model's positions, bad records, no example in the data, or token
            ids outside the vocabulary.
    """
    require_tokenizer(model)
    check_lengths(config.source_length, config.target_length, model.config)
    convention = Convention.of(model.config)
    sentinels = sentinel_ids(model, required_sentinels(model.tokenizer, config, convention))
    train, held_out = open_corpora(config, model.tokenizer, convention, progress=progress)
    settings = (model.tokenizer, config, convention, sentinels)
    taught = None if teaching is None else teaching(train)
    loaders = [Loader(train, *settings, num_streams=num_streams, owned=owned, teaching=taught)]
    if held_out:
        loaders.append(Loader(held_out, *settings))
    for loader in loaders:
        _check_first_batch(loader, model.config.decoder.vocab_size)
    return loaders[0], loaders[1] if held_out else None


def check_lengths(source_length: int, target_length: int, model: EncoderDecoderConfig) -> None:
    """Refuse rows that could hold an example longer than the model's positions.

    Args:
        source_length: see `DataConfig`, as `target_length`.

    Raises:
        ValueError: says which length, and the limit.
    """
    source, target = ("data.source_length", source_length), ("data.target_length", target_length)
    if model.decoder_positions == "continue":
        # The decoder counts on from the source.
        target = (
            "data.target_length together with data.source_length",
            target_length + source_length,
        )
    for (name, length), stack in ((source, model.encoder), (target, model.decoder)):
        if length > stack.max_position_embeddings:
            raise ValueError(
                f"{name} is {length} tokens, the model has max_position_embeddings "
                f"{stack.max_position_embeddings}; lower it"
            )


def sentinel_ids(model: EncoderDecoder, count: int) -> list[int]:
    """Ids of `count` sentinels: unused tokens of the vocabulary, or new ones where it has too few."""
    size = model.config.decoder.vocab_size
    vocab = {token: i for token, i in model.tokenizer.get_vocab().items() if i < size}
    try:
        return find_sentinels(vocab, count)
    except ValueError:
        return add_sentinels(model, count)


def _check_first_batch(loader: Loader, vocab_size: int) -> None:
    batch = next(loader.one_pass())
    highest = max(int(batch.input_ids.max()), int(batch.decoder_input_ids.max()), int(batch.labels.max()))
    if highest >= vocab_size:
        raise ValueError(
            f"the tokenizer gives id {highest}, the model has {vocab_size} embeddings; use the tokenizer the "
            "model was made with"
        )


class RunFiles(Callback):
    """What a run is, beside its results: recipe.resolved.yaml, data.txt, adaptation.json."""

    def __init__(self, recipe: Run, model: EncoderModel, data_report: Sequence[str]) -> None:
        self._recipe = recipe
        self._model = model
        self._data_report = data_report

    def on_start(self, run: RunStart) -> None:
        content = yaml.safe_dump(self._recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        (run.output / "recipe.resolved.yaml").write_text(content, encoding="utf-8")
        report = "".join(f"{line}\n" for line in self._data_report)
        (run.output / "data.txt").write_text(report, encoding="utf-8")
        if self._model.adaptation is not None:
            report = json.dumps(self._model.adaptation, indent=1) + "\n"
            (run.output / "adaptation.json").write_text(report, encoding="utf-8")
