"""From a recipe of preferences or rewards to a run: model, pairs, reference, and all checks before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twofold.config import EncoderDecoderConfig
from twofold.config.preferences import PairData, PairRun, PreferenceRecipe, RewardRecipe
from twofold.data import Convention
from twofold.models import EncoderDecoder, EncoderModel
from twofold.posttrain.pairs import Collate, PairLoader, Pairs, open_pairs, pair_reader
from twofold.posttrain.preferences import PreferenceObjective, Reference, collate_pairs
from twofold.posttrain.reference import (
    AdapterOff,
    ReferenceFile,
    ReferenceModel,
    compute_reference,
    read_reference,
)
from twofold.posttrain.reward import RewardModel, RewardObjective, collate_texts, load_reward_model
from twofold.train.build import Made, build_on_ranks, require_tokenizer
from twofold.train.callbacks import Callback, TrainResult, tokenise_progress
from twofold.train.loop import fit
from twofold.train.run import RunFiles, build_model, check_lengths, find_checked_start, weights_of
from twofold.train.world import World, start_world


def train_preferences(
    recipe: PreferenceRecipe, *, resume: bool = False, callbacks: Sequence[Callback] = ()
) -> TrainResult:
    """Stage `dpo`: tune a pair on preferences. Arguments and errors as for `twofold.train.train`.

    Beside what that writes, `output` gets reference.safetensors, where log-probabilities are precomputed.
    """
    with start_world(recipe) as world:
        output = Path(recipe.output)
        checkpoint = world.from_main(lambda: find_checked_start(recipe, output, resume=resume))
        data = recipe.data
        model, pairs = _build(
            recipe,
            world,
            callbacks,
            make=lambda: build_model(recipe.model, weights_of(recipe, checkpoint)),
            make_empty=EncoderDecoder,
            check=lambda config: check_lengths(data.source_length, data.target_length, config),
        )
        convention = Convention.of(model.config)
        loaders = _loaders(recipe, world, pairs, [collate_pairs(convention.pad_token_id)] * 2)
        reference: Reference | None = None
        watchers = list(callbacks)
        if recipe.preference.kind != "orpo" and recipe.preference.reference == "model":
            if recipe.adapter is None:
                reference = ReferenceModel(build_model(recipe.model), recipe.precision, world.device)
            else:
                reference = AdapterOff(model, recipe.precision)
        elif recipe.preference.kind != "orpo":
            known, name = _precomputed(
                recipe, world, model, loaders, output, callbacks, is_resumed=checkpoint is not None
            )
            collates = [collate_pairs(convention.pad_token_id, known_P2) for known_P2 in known]
            loaders = _loaders(recipe, world, pairs, collates, known)
            if world.is_main:
                watchers.append(ReferenceFile(known, name))
        objective = partial(PreferenceObjective, config=recipe.preference, reference=reference)
        return _fit(recipe, world, model, pairs, loaders, watchers, objective, resume=resume)


def train_reward(
    recipe: RewardRecipe, *, resume: bool = False, callbacks: Sequence[Callback] = ()
) -> TrainResult:
    """Stage `reward`: make a reward model of a pair's encoder. Arguments and errors as for `twofold.train.train`.

    The model in `output` is for `twofold.posttrain.reward.load_reward_model`.
    """
    with start_world(recipe) as world:
        output = Path(recipe.output)
        checkpoint = world.from_main(lambda: find_checked_start(recipe, output, resume=resume))

        def make() -> RewardModel:
            weights = weights_of(recipe, checkpoint)
            if weights is not None:
                return load_reward_model(weights, dtype=torch.float32)
            return RewardModel.of_pair(build_model(recipe.model), recipe.seed)

        model, pairs = _build(
            recipe,
            world,
            callbacks,
            make=make,
            make_empty=lambda config: RewardModel(EncoderDecoder(config)),
            check=lambda config: _check_texts(recipe.data, config),
        )
        collate = collate_texts(Convention.of(model.config))
        loaders = _loaders(recipe, world, pairs, [collate] * 2)
        return _fit(recipe, world, model, pairs, loaders, callbacks, RewardObjective, resume=resume)


def _build(
    recipe: PairRun,
    world: World,
    callbacks: Sequence[Callback],
    *,
    make: Callable[[], Made],
    make_empty: Callable[[EncoderDecoderConfig], Made],
    check: Callable[[EncoderDecoderConfig], None],
) -> tuple[Made, Pairs]:
    """Model and pairs of one rank, see `build_on_ranks`."""

    def read(model: Made) -> Pairs:
        require_tokenizer(model)
        check(model.config)
        convention = Convention.of(model.config)
        progress = tokenise_progress(callbacks) if world.is_main else None
        pairs = open_pairs(recipe.data, model.tokenizer, convention, progress=progress)
        _check_ids(pairs, model.config)
        for callback in callbacks:
            callback.on_data(pairs.report)
        return pairs

    def make_checked() -> Made:
        for source in (*recipe.data.sources, *recipe.data.held_out):
            pair_reader(source)  # finds missing files before the model is loaded
        return make()

    return build_on_ranks(world, make=make_checked, make_empty=make_empty, read=read)


def _loaders(
    recipe: PairRun,
    world: World,
    pairs: Pairs,
    collates: Sequence[Collate],
    known: Sequence[Tensor] = (),
) -> list[PairLoader]:
    """Of training, and of evaluation where something is held out."""
    num_streams = recipe.accumulate_batches
    identity = b"".join(known_P2.numpy().tobytes() for known_P2 in known)
    loaders = [
        PairLoader(
            pairs.train,
            recipe.data,
            collates[0],
            num_streams=num_streams,
            owned=world.streams(num_streams),
            identity=identity,
            sources=pairs.train_sources,
        )
    ]
    if pairs.held_out:
        held_out = pairs.held_out, recipe.data, collates[1]
        loaders.append(PairLoader(*held_out, sources=pairs.held_out_sources))
    return loaders


def _precomputed(
    recipe: PreferenceRecipe,
    world: World,
    model: EncoderDecoder,
    loaders: Sequence[PairLoader],
    output: Path,
    callbacks: Sequence[Callback],
    *,
    is_resumed: bool,
) -> tuple[list[Tensor], str]:
    """Log-probabilities under the model before the first step, of every loader's pairs, and what they are of."""
    data = " ".join([recipe.precision, *(loader.digest for loader in loaders)])
    if is_resumed:
        known = world.from_main(lambda: read_reference(output, data))
        if known is not None:
            return known, data
    if is_resumed or world.size > 1:
        # A checkpoint's weights have moved, and of several ranks only the first has any: all read the beginning.
        model = build_model(recipe.model)
    model = model.to(world.device).eval()

    def tell_progress(done: int, total: int) -> None:
        for callback in callbacks:
            callback.on_reference(done, total)

    progress = tell_progress if world.is_main else None
    return [compute_reference(model, loader, recipe.precision, world, progress) for loader in loaders], data


def _fit(
    recipe: PairRun,
    world: World,
    model: EncoderModel,
    pairs: Pairs,
    loaders: Sequence[PairLoader],
    callbacks: Sequence[Callback],
    objective: Callable[..., Any],
    *,
    resume: bool,
) -> TrainResult:
    watchers = [RunFiles(recipe, model, pairs.report), *callbacks] if world.is_main else callbacks
    held_out = loaders[1] if len(loaders) > 1 else None
    return fit(
        model,
        loaders[0],
        held_out,
        recipe,
        recipe.output,
        watchers,
        resume=resume,
        world=world,
        objective=objective,
    )


def _check_texts(data: PairData, model: EncoderDecoderConfig) -> None:
    """Refuse prompts and replies that together could be longer than the encoder's positions."""
    longest, limit = data.source_length + data.target_length, model.encoder.max_position_embeddings
    if longest > limit:
        raise ValueError(
            f"a reward model reads a prompt and its reply as one text, of up to data.source_length + "
            f"data.target_length = {longest} tokens, and its encoder has max_position_embeddings {limit}; lower them"
        )


def _check_ids(pairs: Pairs, model: EncoderDecoderConfig) -> None:
    """Refuse ids that have no embedding."""
    size = min(model.encoder.vocab_size, model.decoder.vocab_size)
    both = (*pairs.train, *pairs.held_out)
    replies = (reply for pair in both for reply in (pair.chosen, pair.rejected))
    highest = max(int(part.max()) for reply in replies for part in reply[:3] if len(part))
    if highest >= size:
        raise ValueError(
            f"the tokenizer gives id {highest}, the model has {size} embeddings; use the tokenizer the model was made "
            "with"
        )
