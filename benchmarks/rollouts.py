"""Where the time of a GRPO step goes, and how fast answers are written: our engine against transformers' `generate`.

    TWOFOLD_DATA=/path/to/data python benchmarks/rollouts.py [--quick] [--out benchmarks/results/rollouts.json]

SmolLM2-135M, adapted, learns to summarise dialogues of DialogSum from ROUGE-L. Each system takes its turn at steps of
one and the same loop: answers, rewards, log-probabilities under policy and reference, an AdamW update; prompts, number
of answers, temperature and limits are equal, and so is everything but who writes the answers:

- `engine`: `twofold.infer.Engine` on OpenVINO in bfloat16, compiled anew from the weights of each step (that time
  counts); `engine_shared`: the same on the trained PyTorch parameters themselves, float32.
- `transformers_float32`: `generate` of transformers on the same modules, all answers of a step in one batch with
  `num_return_sequences`, so that each prompt is read once; `transformers_bfloat16`: on a copy in bfloat16;
  `transformers_repeated`: float32, with each prompt repeated in the batch for each answer, as TRL's trainers do.

`rollout_speedup` is answers per second of `engine` over those of the fastest transformers run; `repeated_speedup` over
those with repeated prompts; `*_share` is where a step's time goes with `engine`. Answers end where the model ends them,
so tokens per second are reported too. `--quick` takes one step of short answers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from adapt import require_smollm2
from common import publish, result
from training_cases import data_file
from transformers import GenerationConfig

import twofold
from twofold.config.grpo import PolicyRecipe
from twofold.data import Convention
from twofold.hf import TwofoldForConditionalGeneration
from twofold.infer.padding import padded
from twofold.models import EncoderDecoder
from twofold.posttrain.grpo import PolicyObjective, RolloutBatch
from twofold.posttrain.prompts import Prompt, Prompts, open_prompts
from twofold.posttrain.rewards import Rewards
from twofold.posttrain.rollout_loader import RolloutLoader, RolloutParts
from twofold.posttrain.rollouts import Answer, RolloutEngine, evaluating
from twofold.train.copies import copy_weights, empty_copy
from twofold.train.optimizer import new_optimizer, trainable_parameters
from twofold.train.step import train_step
from twofold.train.world import ONE_PROCESS

PROMPTS, SAMPLES, NEW_TOKENS, STEPS = 4, 8, 96, 2
PROMPTS_QUICK, SAMPLES_QUICK, NEW_TOKENS_QUICK, STEPS_QUICK = 2, 4, 8, 1
PHASES = ("rollout", "reward", "scoring", "update")


class Writer(Protocol):
    """What writes answers; `RolloutEngine` is one."""

    policy: EncoderDecoder

    def refresh(self) -> None: ...

    def answer(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], *, num_samples: int, temperature: float
    ) -> list[list[Answer]]: ...


class TransformersWriter:
    """`generate` of transformers, on the trained modules or on a copy of them.

    Attributes:
        policy: the model that is trained, which scores.
    """

    def __init__(
        self, model: EncoderDecoder, max_new_tokens: int, dtype: torch.dtype, *, repeats: bool = False
    ) -> None:
        """`repeats`: each prompt stands in the batch as often as it is answered."""
        self.policy, self._repeats = model, repeats
        self._copy = model if dtype == torch.float32 else empty_copy(model, dtype, torch.device("cpu"))
        self._model = TwofoldForConditionalGeneration.of(self._copy)
        self._max_new_tokens = max_new_tokens
        self._stops = list(Convention.of(model.config).stop_token_ids)

    def refresh(self) -> None:
        """Take the weights as they are."""
        if self._copy is not self.policy:
            copy_weights(self._copy, self.policy)

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], *, num_samples: int, temperature: float
    ) -> list[list[Answer]]:
        """See `RolloutEngine.answer`; draws with the first seed."""
        torch.manual_seed(seeds[0])
        if self._repeats:
            prompts = [prompt for prompt in prompts for _ in range(num_samples)]
        ids, mask = padded([prompt.source.tolist() for prompt in prompts], "right", torch.device("cpu"))
        prefix = torch.tensor([prompt.prefix.tolist() for prompt in prompts])  # the template's, equally long
        config = GenerationConfig(
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            num_return_sequences=1 if self._repeats else num_samples,
            max_new_tokens=self._max_new_tokens,
            eos_token_id=self._stops,
            pad_token_id=self._stops[0],
        )
        with evaluating(self._copy):
            self._model.eval()
            written = self._model.generate(
                input_ids=ids, attention_mask=mask.long(), decoder_input_ids=prefix, generation_config=config
            )
        answers = [self._answer(row) for row in written[:, prefix.shape[1] :].tolist()]
        return [answers[i : i + num_samples] for i in range(0, len(answers), num_samples)]

    def _answer(self, row: list[int]) -> Answer:
        end = next((i for i, token in enumerate(row) if token in self._stops), None)
        kept = row if end is None else row[: end + 1]
        text = self.policy.tokenizer.decode(kept, skip_special_tokens=True)
        return Answer(tuple(kept), text, end is None)


@dataclass
class Figures:
    """Of one system, over its steps."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    answers: int = 0
    tokens: int = 0

    def add(self, batches: Sequence[RolloutBatch], update_s: float) -> None:
        for phase, seconds in zip(PHASES, (*batches[0].seconds.tolist(), update_s), strict=True):
            self.seconds[phase].append(seconds)
        self.answers += sum(batch.num_answers for batch in batches)
        self.tokens += sum(batch.num_scored_tokens for batch in batches)

    @property
    def rollout_s(self) -> float:
        return sum(self.seconds["rollout"])

    def metrics(self) -> dict[str, float]:
        """Per second of writing, and the median step."""
        step_s = [sum(parts) for parts in zip(*self.seconds.values(), strict=True)]
        return {
            "rollouts_per_s": self.answers / self.rollout_s,
            "tokens_per_s": self.tokens / self.rollout_s,
            "step_s": statistics.median(step_s),
        }

    def shares(self) -> dict[str, float]:
        """Of each phase in the time of all steps."""
        whole = sum(map(sum, self.seconds.values()))
        return {f"{phase}_share": sum(seconds) / whole for phase, seconds in self.seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one step of short answers")
    parser.add_argument("--steps", type=int, help=f"counted ones of each system; default {STEPS}")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own choice")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    donor = require_smollm2()
    recipe = recipe_of(donor, quick=options.quick)
    model = twofold.adapt(donor, encoder_mask="sink", dtype=torch.float32)
    if options.steps is not None:
        recipe = recipe.model_copy(update={"steps": options.steps})
    figures = compared(model, recipe)
    publish(result("rollouts", *summary(figures, recipe)), options.out)


def recipe_of(donor: Path, *, quick: bool) -> PolicyRecipe:
    """That of smollm2-grpo-summarise, at the benchmark's size."""
    prompts, samples, new_tokens, steps = (
        (PROMPTS_QUICK, SAMPLES_QUICK, NEW_TOKENS_QUICK, STEPS_QUICK)
        if quick
        else (PROMPTS, SAMPLES, NEW_TOKENS, STEPS)
    )
    source = {
        "path": str(data_file("summarization/dialogsum-dev.jsonl.gz")),
        "prompt_field": "dialogue",
        "template": "Summarise this dialogue in one or two sentences.\n\n{prompt}",
        "columns": {"answer": "summary"},
        "max_prompts": 200,
    }
    return PolicyRecipe.model_validate(
        {
            "stage": "grpo",
            "model": {"adapt": {"encoder": str(donor), "start": "lossless", "encoder_mask": "sink"}},
            "data": {
                "sources": [source],
                "source_length": 300,
                "max_length_action": "skip",
                "prompts_per_batch": prompts,
            },
            "rewards": [{"kind": "rouge"}],
            "rollout": {"num_samples": samples, "max_new_tokens": new_tokens},
            "policy": {"kl_coefficient": 0.02},
            "output": "unused",
            "steps": steps,
            "optimizer": {"learning_rate": 1e-6},
            "device": "cpu",
        }
    )


def compared(model: EncoderDecoder, recipe: PolicyRecipe) -> dict[str, Figures]:
    """Steps of every system by turns, after one of each that is not counted."""
    rewards = Rewards(recipe.rewards)
    prompts = open_prompts(recipe.data, rewards.columns, model.tokenizer, Convention.of(model.config))
    reference = empty_copy(model, torch.float32, torch.device("cpu"))
    copy_weights(reference, model)
    loaders = {
        name: loader_of(writer, prompts, recipe, rewards, reference)
        for name, writer in writers(model, recipe).items()
    }
    objective = PolicyObjective(
        model, config=recipe.policy, rollout=recipe.rollout, reward_names=rewards.names
    ).train()
    optimizer = new_optimizer(model, trainable_parameters(model), recipe.optimizer)
    figures = {name: Figures() for name in loaders}
    for step in range(recipe.steps + 1):
        for name, loader in loaders.items():
            batches = loader.next_step()
            started = time.perf_counter()
            train_step(objective, optimizer, batches, step=step, learning_rate=recipe.optimizer.learning_rate)
            if step > 0:
                kept = [batch for batch in batches if isinstance(batch, RolloutBatch)]
                figures[name].add(kept, time.perf_counter() - started)
            print(f"step {step} of {recipe.steps}: {name}", file=sys.stderr)
    return figures


def writers(model: EncoderDecoder, recipe: PolicyRecipe) -> dict[str, Writer]:
    """The systems."""
    rollout = recipe.rollout
    openvino = rollout.model_copy(update={"backend": "openvino", "precision": "bfloat16"})
    new = rollout.max_new_tokens
    return {
        "engine": RolloutEngine(model, openvino, ONE_PROCESS),
        "engine_shared": RolloutEngine(model, rollout, ONE_PROCESS),
        "transformers_float32": TransformersWriter(model, new, torch.float32),
        "transformers_bfloat16": TransformersWriter(model, new, torch.bfloat16),
        "transformers_repeated": TransformersWriter(model, new, torch.float32, repeats=True),
    }


def loader_of(
    writer: Any, prompts: Prompts, recipe: PolicyRecipe, rewards: Rewards, reference: EncoderDecoder
) -> RolloutLoader:
    """The same prompts in the same order for all."""
    pad = Convention.of(reference.config).pad_token_id
    parts = RolloutParts(recipe=recipe, engine=writer, rewards=rewards, world=ONE_PROCESS, pad_token_id=pad)
    return RolloutLoader(prompts, parts, reference=reference)


def summary(figures: dict[str, Figures], recipe: PolicyRecipe) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and details of the report."""
    found = {name: figure.metrics() for name, figure in figures.items()}
    peers = [values for name, values in found.items() if name.startswith("transformers")]
    ours = found["engine"]
    metrics = {
        f"{name}_{key}": round(value, 4) for name, values in found.items() for key, value in values.items()
    }
    metrics |= {name: round(value, 4) for name, value in figures["engine"].shares().items()}
    for key in ("rollouts_per_s", "tokens_per_s"):
        metrics[f"{key.removesuffix('s_per_s')}_speedup"] = round(
            ours[key] / max(peer[key] for peer in peers), 3
        )
    repeated = found["transformers_repeated"]["rollouts_per_s"]
    metrics["repeated_speedup"] = round(ours["rollouts_per_s"] / repeated, 3)
    metrics["step_speedup"] = round(min(peer["step_s"] for peer in peers) / ours["step_s"], 3)
    details = {
        "prompts": recipe.data.prompts_per_batch,
        "answers_per_prompt": recipe.rollout.num_samples,
        "max_new_tokens": recipe.rollout.max_new_tokens,
        "steps": recipe.steps,
        "threads": torch.get_num_threads(),
        "seconds": {
            name: {phase: [round(s, 3) for s in seconds] for phase, seconds in figure.seconds.items()}
            for name, figure in figures.items()
        },
        "tokens": {name: figure.tokens for name, figure in figures.items()},
    }
    return metrics, details


if __name__ == "__main__":
    main()
