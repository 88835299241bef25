"""From prompts to batches: answers are written, rewarded and compared when a step asks for them.

G: prompts. K: answers to each. R = G K.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from twofold.config.grpo import PolicyRecipe
from twofold.config.history import Reading, SourceUse
from twofold.data import Batch, Example
from twofold.data.loader import refuse_other_state
from twofold.models import EncoderDecoder
from twofold.posttrain.answers import answer_tensors
from twofold.posttrain.grpo import RolloutBatch, advantages, placed_logprobs
from twofold.posttrain.prompts import Prompt, PromptOrder, Prompts, prompts_digest
from twofold.posttrain.rewards import Rewards, Scores
from twofold.posttrain.rollouts import Answer, RolloutEngine, answer_seed, evaluating
from twofold.train.evaluate import Evaluation
from twofold.train.step import StepResult
from twofold.train.trackers import MetricsFile
from twofold.train.world import World

_HELD_OUT = 2**31
"""In place of a rollout's number, in seeds of held-out prompts, which are the same in every evaluation."""

_SHOWN = 8
"""Held-out prompts whose answers are kept to be read."""


class Group(NamedTuple):
    """A prompt with its answers, and their rewards."""

    prompt: Prompt
    answers: list[Answer]
    rewards: list[list[float]]
    """Of each answer the weighted sum, and each reward by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutParts:
    """What a run's rollouts are made with."""

    recipe: PolicyRecipe
    engine: RolloutEngine
    rewards: Rewards
    world: World
    pad_token_id: int

    def groups(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], *, num_samples: int, temperature: float
    ) -> tuple[list[Group], list[float]]:
        """Answers and rewards, with the weights as they are; and the seconds that either took. On all ranks, also on
        one that has no prompt."""
        started = time.perf_counter()
        self.engine.refresh()
        if not prompts:
            return [], [time.perf_counter() - started, 0.0]
        answers = self.engine.answer(prompts, seeds, num_samples=num_samples, temperature=temperature)
        written = time.perf_counter()
        pairs = [(p, answer) for p, group in zip(prompts, answers, strict=True) for answer in group]
        scores = self.rewards.score([p for p, _ in pairs], [answer.text for _, answer in pairs])
        table = _table(scores).reshape(len(prompts), num_samples, -1).tolist()
        groups = [Group(*group) for group in zip(prompts, answers, table, strict=True)]
        return groups, [written - started, time.perf_counter() - written]

    def batch(
        self, groups: Sequence[Group], advantages_GK: Sequence[Sequence[float]], seconds: Sequence[float]
    ) -> RolloutBatch:
        """What a step takes of some groups; log-probabilities are not known yet."""
        examples = [
            [
                Example(g.prompt.source, g.prompt.prefix, np.asarray(a.token_ids), ends=not a.is_truncated)
                for a in g.answers
            ]
            for g in groups
        ]
        return RolloutBatch(
            **answer_tensors(examples, self.pad_token_id),
            documents=tuple(group.prompt.where for group in groups),
            advantages=torch.tensor(advantages_GK, dtype=torch.float32).flatten(),
            rewards=torch.tensor([row for g in groups for row in g.rewards], dtype=torch.float64),
            is_truncated=torch.tensor([a.is_truncated for g in groups for a in g.answers]),
            seconds=torch.tensor([*seconds, 0.0], dtype=torch.float64),
        )


def _table(scores: Scores) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[R, 1 + rewards]."""
    return np.stack([scores.total, *scores.by_name.values()], axis=1)


class RolloutLoader:
    """The batches of a run's steps: every `num_iterations` steps a rollout with the weights of that step.

    Prompt number n of the run goes to batch n // prompts_per_batch, and batches to streams in turn, so that neither the
    number of ranks nor a stop changes what comes. Answers are drawn with seeds of the run's seed, the rollout, the
    prompt's place in the run, and the answer's in its group.
    """

    def __init__(
        self, prompts: Prompts, parts: RolloutParts, *, reference: EncoderDecoder | None = None
    ) -> None:
        """
        Args:
            reference: frozen, in eval mode, on the rank's device. None: no divergence is penalised.
        """
        recipe, data = parts.recipe, parts.recipe.data
        self._prompts, self._parts, self._reference = prompts.train, parts, reference
        self._order = PromptOrder(len(prompts.train), data.seed, shuffle=data.shuffle)
        self.num_streams = recipe.accumulate_batches
        self.owned = parts.world.streams(self.num_streams)
        self._steps = 0
        self._kept: list[RolloutBatch] = []
        self._digest = prompts_digest(prompts.train)
        self._sources = prompts.train_sources

    def reading(self, state: Mapping[str, Any] | None = None) -> Reading:
        """What the prompts were read from, and how many answers to them were written up to a state."""
        if state is None:
            return Reading(sources=self._sources)
        recipe = self._parts.recipe
        steps = max(stream["steps"] for stream in state["streams"].values())
        prompts = -(-steps // recipe.policy.num_iterations) * self.num_streams * recipe.data.prompts_per_batch
        return Reading(sources=self._sources, examples_drawn=prompts * recipe.rollout.num_samples)

    def next_step(self) -> list[Batch]:
        """One batch of each owned stream, in their order."""
        rollout, iteration = divmod(self._steps, self._parts.recipe.policy.num_iterations)
        if iteration == 0:
            self._kept = self._roll_out(rollout)
        else:
            self._kept = [replace(b, seconds=torch.zeros_like(b.seconds)) for b in self._kept]
        self._steps += 1
        return list(self._kept)

    def state_dict(self) -> dict[str, Any]:
        """Where the owned streams stand, JSON-able; with their answers, where a rollout is not used up."""
        is_used_up = self._steps % self._parts.recipe.policy.num_iterations == 0
        batches = [None] * len(self.owned) if is_used_up else map(_packed, self._kept)
        streams = {
            str(n): {"steps": self._steps, "batch": batch}
            for n, batch in zip(self.owned, batches, strict=True)
        }
        return {**self._identity(), "streams": streams}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: the state belongs to other prompts, another order, seed or number of streams.
        """
        refuse_other_state(state, self._identity(), otherwise="start a new run in another output")
        own = [state["streams"][str(n)] for n in self.owned]
        self._steps = own[0]["steps"]
        self._kept = [_unpacked(stream["batch"]) for stream in own if stream["batch"] is not None]

    def _identity(self) -> dict[str, Any]:
        data = self._parts.recipe.data
        return {
            "seed": data.seed,
            "shuffle": data.shuffle,
            "num_streams": self.num_streams,
            "prompts_per_batch": data.prompts_per_batch,
            "prompts": self._digest,
        }

    def _roll_out(self, rollout: int) -> list[RolloutBatch]:
        recipe, parts = self._parts.recipe, self._parts
        size = recipe.data.prompts_per_batch
        draws = [
            (rollout * self.num_streams + stream) * size + i for stream in self.owned for i in range(size)
        ]
        groups, seconds = parts.groups(
            [self._prompts[self._order[draw]] for draw in draws],
            [answer_seed(recipe.seed, rollout, draw) for draw in draws],
            num_samples=recipe.rollout.num_samples,
            temperature=recipe.rollout.temperature,
        )
        rewards_GK = np.asarray([[row[0] for row in group.rewards] for group in groups])
        advantages_GK = advantages(rewards_GK, recipe.policy, self._batch_std(rewards_GK)).tolist()
        batches = [
            parts.batch(groups[i : i + size], advantages_GK[i : i + size], seconds)
            for i in range(0, len(groups), size)
        ]
        started = time.perf_counter()
        scored = [self._scored(batch) for batch in batches]
        scoring_s = time.perf_counter() - started
        for batch in scored:
            batch.seconds[2] = scoring_s
        return scored

    def _batch_std(self, rewards_GK: np.ndarray[Any, np.dtype[np.float64]]) -> float | None:
        """Over all ranks, in the order of the streams, so that their number changes nothing."""
        if self._parts.recipe.policy.scale != "batch":
            return None
        own = np.split(rewards_GK, len(self.owned))
        parts = self._parts.world.gather(dict(zip(self.owned, own, strict=True)))
        by_stream = {n: rewards for part in parts for n, rewards in part.items()}
        return float(np.concatenate([by_stream[n] for n in sorted(by_stream)]).std(ddof=1))

    def _scored(self, batch: RolloutBatch) -> RolloutBatch:
        """With the log-probabilities that the policy's updates need."""
        recipe, policy = self._parts.recipe, self._parts.engine.policy
        settings = recipe.precision, recipe.rollout.temperature
        if recipe.policy.num_iterations > 1:
            with evaluating(policy):
                batch = replace(batch, old_logprobs=placed_logprobs(policy, batch, *settings))
        if self._reference is not None:
            batch = replace(batch, reference_logprobs=placed_logprobs(self._reference, batch, *settings))
        return batch


class HeldOutRollouts:
    """Held-out prompts, answered anew with the weights as they are each time they are asked for."""

    def __init__(
        self, prompts: Sequence[Prompt], parts: RolloutParts, sources: Sequence[SourceUse] = ()
    ) -> None:
        """`sources`: what the prompts were read from."""
        self._prompts, self._parts, self._sources = list(prompts), parts, tuple(sources)
        self.last: list[Group] = []
        """What the last pass came to, by prompt."""

    def reading(self, state: Mapping[str, Any] | None = None) -> Reading:
        """What the prompts were read from."""
        return Reading(sources=self._sources)

    def one_pass(self) -> Iterator[RolloutBatch]:
        """All prompts in their order, the same batches on every rank; each rank answers a part of them."""
        parts, world = self._parts, self._parts.world
        recipe, sampling = parts.recipe, parts.recipe.rollout.held_out
        numbers = range(world.rank, len(self._prompts), world.size)
        groups, seconds = parts.groups(
            [self._prompts[n] for n in numbers],
            [answer_seed(recipe.seed, _HELD_OUT, n) for n in numbers],
            num_samples=sampling.num_samples,
            temperature=sampling.temperature,
        )
        own = {n: (group.answers, group.rewards) for n, group in zip(numbers, groups, strict=True)}
        whole = {n: found for part in world.gather(own) for n, found in part.items()}
        self.last = [Group(prompt, *whole[n]) for n, prompt in enumerate(self._prompts)]
        size = recipe.data.prompts_per_batch
        for start in range(0, len(self.last), size):
            part = self.last[start : start + size]
            yield parts.batch(part, [[0.0] * sampling.num_samples] * len(part), seconds)


class HeldOutAnswers(MetricsFile):
    """Answers to the first held-out prompts after each evaluation, for people to read: a line of JSON for each."""

    def __init__(self, path: Path, rollouts: HeldOutRollouts, names: Sequence[str]) -> None:
        """
        Args:
            rollouts: the run's.
            names: of its rewards.
        """
        super().__init__(path, every=1)
        self._rollouts, self._names = rollouts, ("reward", *(f"reward_{name}" for name in names))

    def on_step(self, step: int, result: StepResult) -> None:
        """Nothing is held out there."""

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        for group in self._rollouts.last[:_SHOWN]:
            for answer, rewards in zip(group.answers, group.rewards, strict=True):
                told = dict(zip(self._names, rewards, strict=True))
                of_prompt = {"step": step, "where": group.prompt.where, "prompt": group.prompt.prompt}
                self._write(of_prompt | {"answer": answer.text, "is_truncated": answer.is_truncated, **told})

    def on_average_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Of the weights alone."""


def _packed(batch: RolloutBatch) -> dict[str, Any]:
    """JSON-able; numbers stay what they are, bit for bit."""
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    tensors = {
        name: {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    return {"tensors": tensors, "documents": list(batch.documents)}


def _unpacked(packed: Mapping[str, Any]) -> RolloutBatch:
    tensors = {
        name: torch.tensor(kept["values"], dtype=getattr(torch, kept["dtype"]))
        for name, kept in packed["tensors"].items()
    }
    return RolloutBatch(**tensors, documents=tuple(packed["documents"]))
