"""On-policy distillation: a teacher's distribution over answers that the student has written.

GKD (Agarwal et al. 2023, arXiv 2306.13649, algorithm 1): a share of the batches keeps its prompts and gets answers of
the student, sampled with the weights of the step; on every token of an answer, the divergence between teacher and
student is minimised. Nothing is differentiated through the sampling.

Unlike in `train.teacher`, a language model is asked about the stop token, too: it reads the conversation in the
template it was tuned with, and what ends a reply there is the student's stop token.

N: scored positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twofold.config.gkd import OnPolicyConfig, OnPolicyRecipe
from twofold.config.history import Reading
from twofold.data import Batch, Convention, Example, Loader, Prefetcher
from twofold.data.batch import Texts, collate
from twofold.data.convention import RawText
from twofold.data.teaching import Teaching
from twofold.models import EncoderDecoder
from twofold.posttrain.divergence import chunked_divergence
from twofold.posttrain.prompts import Prompt
from twofold.posttrain.rollouts import Answer, RolloutEngine, answer_seed
from twofold.train.loss import TeacherHead
from twofold.train.step import Objective, Precision, TeacherOf
from twofold.train.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class AnsweredBatch(Batch):
    """A batch, and who wrote its answers."""

    is_on_policy: bool


class OnPolicyObjective(Objective):
    """The divergence of teacher and student, per scored token; see `chunked_divergence`.

    Metric: `on_policy`, the share of the scored tokens that the student wrote.
    """

    metric_names = ("on_policy",)

    def __init__(
        self,
        model: EncoderDecoder,
        precision: Precision = "float32",
        *,
        teacher: TeacherOf,
        config: OnPolicyConfig,
    ) -> None:
        super().__init__(model, precision)
        self.teacher = teacher
        self.config = config

    def forward(self, batch: Batch, scored: Tensor) -> Tensor:
        """See `Objective.forward`; the batch is an `AnsweredBatch`."""
        assert isinstance(batch, AnsweredBatch)
        device = batch.labels.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            states_BTD, _, _ = self.model.states(
                input_ids=batch.input_ids,
                segment_ids=batch.segment_ids,
                decoder_input_ids=batch.decoder_input_ids,
                decoder_segment_ids=batch.decoder_segment_ids,
            )
            teacher = self.teacher(batch, scored)
            assert isinstance(teacher, TeacherHead)
            head = self.model.lm_head
            total = chunked_divergence(
                states_BTD.flatten(0, 1)[scored],
                head.out_proj.weight,
                teacher,
                kind=self.config.divergence,
                beta=self.config.beta,
                softcap=head.softcap,
            )
        self.note(torch.tensor(len(scored) * batch.is_on_policy, device=total.device))
        return total


@dataclass(frozen=True, kw_only=True, slots=True)
class Answering:
    """Makes batches of what was asked and what was answered."""

    convention: Convention
    teaching: Teaching | None
    """What the teacher reads beside the student's batch."""
    pad_multiple: int

    def batch(self, asked: Batch, answers: Sequence[Answer] | None = None) -> AnsweredBatch:
        """The same prompts in the same rows, for the teacher, too.

        Args:
            asked: on the CPU.
            answers: one for each example. None: those of the batch.
        """
        texts = list(asked.texts())
        targets = [t.target for t in texts] if answers is None else [list(a.token_ids) for a in answers]
        examples = iter(map(self._example, texts, targets))
        n_segments = asked.decoder_segment_ids.amax(dim=1).tolist()
        rows = [[next(examples) for _ in range(n)] for n in n_segments]
        lengths = (
            [sum(len(example.source) for example in row) for row in rows],
            [sum(example.decoder_length for example in row) for row in rows],
        )
        source, target = (-(-max(side) // self.pad_multiple) * self.pad_multiple for side in lengths)
        made = collate(rows, self.convention.pad_token_id, source, target)
        if self.teaching is not None:
            made = self.teaching(rows, made)
        parts = {f.name: getattr(made, f.name) for f in fields(made)} | {"documents": asked.documents}
        return AnsweredBatch(**parts, is_on_policy=answers is not None)

    def _example(self, text: Texts, target: list[int]) -> Example:
        source, prefix, answer = (
            np.asarray(ids, dtype=np.int64) for ids in (text.source, text.prefix, target)
        )
        # BOS that the convention added is no text, and the teacher has its own.
        read = [source[1:] if self.convention.source_bos else source]
        if self.convention.decoder_start == "last_source_token":
            read.append(prefix)
        before = sum(map(len, read))
        raw = RawText(np.concatenate([*read, answer]), np.arange(before, before + len(answer)))
        ends = int(answer[-1]) in self.convention.stop_token_ids
        return Example(source, prefix, answer, ends, raw)


class OnPolicyLoader:
    """A loader's batches, a share of them answered by the student.

    Which batches, and with which seeds, depends on the step and the stream alone.
    """

    def __init__(
        self,
        loader: Loader | Prefetcher,
        answering: Answering,
        engine: RolloutEngine | None,
        recipe: OnPolicyRecipe,
        world: World,
    ) -> None:
        """`engine`: None where the student writes nothing."""
        self._loader, self._answering, self._engine = loader, answering, engine
        self._recipe = recipe
        self.num_streams = loader.num_streams
        self._owned = world.streams(loader.num_streams)
        self._steps = 0

    def next_step(self) -> list[Batch]:
        """See `train.loop.TrainLoader`."""
        asked = dict(zip(self._owned, self._loader.next_step(), strict=True))
        on_policy = [n for n in range(self.num_streams) if self._is_on_policy(n)]
        answers: dict[int, list[Answer]] = {}
        if on_policy:
            assert self._engine is not None
            self._engine.refresh()  # on all ranks, whoever has the batch
            answers = self._write({n: asked[n] for n in on_policy if n in asked})
        self._steps += 1
        return [self._answering.batch(batch, answers.get(n)) for n, batch in asked.items()]

    def state_dict(self) -> dict[str, Any]:
        """See `train.loop.TrainLoader`."""
        return {**self._loader.state_dict(), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `train.loop.TrainLoader`."""
        own = dict(state)
        self._steps = own.pop("steps")
        self._loader.load_state_dict(own)

    def reading(self, state: Mapping[str, Any] | None = None) -> Reading:
        """See `train.phase.TellsReading`."""
        return self._loader.reading(state)

    def _is_on_policy(self, stream: int) -> bool:
        draw = np.random.default_rng((self._recipe.seed, self._steps, stream)).random()
        return bool(draw < self._recipe.gkd.on_policy_share)

    def _write(self, asked: Mapping[int, Batch]) -> dict[int, list[Answer]]:
        """The student's answers to the examples of some streams' batches, written together."""
        assert self._engine is not None
        assert self._recipe.rollout is not None
        texts = {n: list(batch.texts()) for n, batch in asked.items()}
        prompts, seeds = [], []
        for n, of_batch in texts.items():
            for i, text in enumerate(of_batch):
                prompts.append(Prompt(np.asarray(text.source), np.asarray(text.prefix), "", {}, ""))
                seeds.append(answer_seed(self._recipe.seed, self._steps, (n << 20) + i))
        written = iter(
            self._engine.answer(prompts, seeds, num_samples=1, temperature=self._recipe.rollout.temperature)
        )
        return {n: [next(written)[0] for _ in of_batch] for n, of_batch in texts.items()}


class StoredAnswers:
    """Held-out batches with the answers of the data, for the teacher, too."""

    def __init__(self, loader: Loader, answering: Answering) -> None:
        self._loader, self._answering = loader, answering

    def reading(self, state: Mapping[str, Any] | None = None) -> Reading:
        """See `train.phase.TellsReading`."""
        return self._loader.reading(state)

    def one_pass(self) -> Iterator[Batch]:
        """See `train.loop.HeldOutLoader`."""
        return map(self._answering.batch, self._loader.one_pass())
