"""From a recipe of stage `grpo` to a run: model, prompts, rewards, engine, and all checks before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from twofold.config.grpo import PolicyRecipe
from twofold.data import Convention
from twofold.infer.limits import check_inputs
from twofold.models import EncoderDecoder
from twofold.posttrain.grpo import PolicyObjective
from twofold.posttrain.prompts import Prompts, open_prompts, prompt_reader
from twofold.posttrain.rewards import Rewards
from twofold.posttrain.rollout_loader import HeldOutAnswers, HeldOutRollouts, RolloutLoader, RolloutParts
from twofold.posttrain.rollouts import RolloutEngine
from twofold.train.build import build_on_ranks, require_tokenizer
from twofold.train.callbacks import Callback, TrainResult, tokenise_progress
from twofold.train.loop import fit
from twofold.train.run import RunFiles, build_model, find_checked_start, weights_of
from twofold.train.world import World, start_world


def train_policy(
    recipe: PolicyRecipe, *, resume: bool = False, callbacks: Sequence[Callback] = ()
) -> TrainResult:
    """Stage `grpo`: let a pair learn from rewards of what it writes. Arguments and errors as for `twofold.train.train`.

    The held-out loss is minus the mean reward of held-out prompts; the curve is in metrics.jsonl. Beside what that
    writes, `output` gets held_out.jsonl with answers to the first held-out prompts.

    Raises:
        RewardError: a reward failed; see `Rewards.score`.
    """
    with start_world(recipe) as world:
        checkpoint = world.from_main(lambda: find_checked_start(recipe, Path(recipe.output), resume=resume))
        rewards = Rewards(recipe.rewards, world.device)

        def make() -> EncoderDecoder:
            for source in (*recipe.data.sources, *recipe.data.held_out):
                prompt_reader(source, rewards.columns)  # finds missing files before the model is loaded
            return build_model(recipe.model, weights_of(recipe, checkpoint))

        model, prompts = build_on_ranks(
            world,
            make=make,
            make_empty=EncoderDecoder,
            read=lambda model: _read(recipe, model, rewards, world, callbacks),
        )
        parts = RolloutParts(
            recipe=recipe,
            engine=RolloutEngine(model, recipe.rollout, world),
            rewards=rewards,
            world=world,
            pad_token_id=Convention.of(model.config).pad_token_id,
        )
        reference = None
        if recipe.policy.kl_coefficient:
            reference = build_model(recipe.model).to(world.device).eval().requires_grad_(False)
        watchers = [RunFiles(recipe, model, prompts.report), *callbacks] if world.is_main else [*callbacks]
        held_out = (
            HeldOutRollouts(prompts.held_out, parts, prompts.held_out_sources) if prompts.held_out else None
        )
        if held_out is not None and world.is_main:
            watchers.append(HeldOutAnswers(Path(recipe.output) / "held_out.jsonl", held_out, rewards.names))
        return fit(
            model,
            RolloutLoader(prompts, parts, reference=reference),
            held_out,
            recipe,
            recipe.output,
            watchers,
            resume=resume,
            world=world,
            objective=partial(
                PolicyObjective,
                config=recipe.policy,
                rollout=recipe.rollout,
                reward_names=rewards.names,
            ),
        )


def _read(
    recipe: PolicyRecipe,
    model: EncoderDecoder,
    rewards: Rewards,
    world: World,
    callbacks: Sequence[Callback],
) -> Prompts:
    """The prompts of a run, each of which the model can take and answer."""

    require_tokenizer(model)
    prompts = open_prompts(
        recipe.data,
        rewards.columns,
        model.tokenizer,
        Convention.of(model.config),
        check=rewards.check,
        progress=tokenise_progress(callbacks) if world.is_main else None,
    )
    for prompt in (*prompts.train, *prompts.held_out):
        ids = prompt.source.tolist(), prompt.prefix.tolist()
        check_inputs(model.config, *ids, recipe.rollout.max_new_tokens, name=f"the prompt of {prompt.where}")
    for callback in callbacks:
        callback.on_data(prompts.report)
    return prompts
