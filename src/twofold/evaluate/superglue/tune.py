"""One cell of the grid: a classifier from the base weights, tuned on a task, and its answers on the dev set.

Letters: B examples, C labels, R rows (texts of the examples), L tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, isfinite

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twofold.config.recipe import OptimizerConfig, ScheduleConfig
from twofold.evaluate.superglue.reader import Encoded
from twofold.evaluate.superglue.tasks import Task
from twofold.infer.padding import padded
from twofold.models import EncoderClassifier, EncoderDecoder
from twofold.train.optimizer import new_optimizer, trainable_parameters
from twofold.train.schedule import learning_rate_factor
from twofold.train.step import NonFiniteError, Precision

_POOL_BATCHES = 8
"""Batches of an epoch that are made together, from examples sorted by length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """How every cell is trained; what a grid does not vary."""

    epochs: int = 5
    """Passes over the training examples."""

    steps: int | None = None
    """Optimizer steps, in place of `epochs`."""

    warmup_share: float = 0.06
    """Of the steps, those in which the learning rate rises; then it falls in a line to a tenth."""

    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients whose global L2 norm is above this are scaled down to it."""

    precision: Precision = "float32"
    """`bfloat16` computes under autocast; weights, gradients and optimizer stay in float32."""

    max_tokens: int | None = None
    """Of a text; default and upper limit: what the encoder takes."""

    pass_tokens: int = 8192
    """Computed at once, padding included; a batch with more is passed through in parts, with the same gradient."""

    def __post_init__(self) -> None:
        for name, value in (("epochs", self.epochs), ("pass_tokens", self.pass_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, optional in (("steps", self.steps), ("max_tokens", self.max_tokens)):
            if optional is not None and optional < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {optional}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', got {self.precision!r}")
        if not 0 <= self.warmup_share <= 1:
            raise ValueError(f"warmup_share must be from 0 to 1, got {self.warmup_share}")
        if not self.max_grad_norm > 0 or self.weight_decay < 0:
            raise ValueError(
                f"max_grad_norm must be above 0 and weight_decay 0 or more, got {self.max_grad_norm} and "
                f"{self.weight_decay}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """What a cell gave."""

    answers: tuple[int, ...]
    """Label index for each dev example."""
    first_loss: float
    """Nats per example, of the first batch before the first update."""
    last_loss: float
    """The same of the last batch, before the last update."""
    steps: int
    seconds: float
    """Training and answers together."""
    step_s: float
    """Seconds per optimizer step, mean."""


def tune(
    model: EncoderDecoder,
    task: Task,
    train: Sequence[Encoded],
    dev: Sequence[Encoded],
    *,
    learning_rate: float,
    batch_size: int,
    dropout_rate: float,
    tuning: Tuning,
    seed: int,
) -> Tuned:
    """Train a classifier on the encoder of a model, all parameters of both, and answer the dev set with it.

    Args:
        model: its encoder, float32 and on its device, is changed.
        batch_size: examples of a step.
        dropout_rate: of the head; the encoder keeps its own, 0 in released models.
        seed: of the head, the order of examples, and dropout. Torch's generators are left as they were.

    Raises:
        NonFiniteError: a loss or gradient norm is not finite.
    """
    started = time.perf_counter()
    device = model.encoder.embed_tokens.weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        classifier = EncoderClassifier(model, task.num_logits, dropout_rate=dropout_rate)
        # As transformers starts such a head: close to equal odds, whatever the scale of hidden states.
        nn.init.normal_(classifier.score.out_proj.weight, std=model.config.encoder.initializer_range)
        nn.init.zeros_(classifier.score.out_proj.bias)
        classifier.to(device).requires_grad_(True).train()
        n_steps = tuning.steps or tuning.epochs * ceil(len(train) / batch_size)
        schedule = ScheduleConfig(warmup_steps=round(tuning.warmup_share * n_steps), decay="linear")
        optimizer_config = OptimizerConfig(
            learning_rate=learning_rate, betas=(0.9, 0.999), weight_decay=tuning.weight_decay
        )
        optimizer = new_optimizer(classifier, trainable_parameters(classifier), optimizer_config)
        batches = shuffled_batches([one.length for one in train], batch_size, seed=seed)
        losses: list[float] = []
        for step, rows in zip(range(1, n_steps + 1), batches, strict=False):
            optimizer.zero_grad(set_to_none=True)
            losses.append(accumulate(classifier, [train[i] for i in rows], tuning))
            norm = nn.utils.clip_grad_norm_(classifier.parameters(), tuning.max_grad_norm).item()
            if not (isfinite(losses[-1]) and isfinite(norm)):
                raise NonFiniteError(f"step {step} has loss {losses[-1]} and gradient norm {norm}")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * learning_rate_factor(step, schedule, n_steps)
            optimizer.step()
        trained = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        answers = answer(classifier.eval(), dev, tuning)
    return Tuned(
        answers=tuple(answers),
        first_loss=losses[0],
        last_loss=losses[-1],
        steps=n_steps,
        seconds=time.perf_counter() - started,
        step_s=(trained - started) / n_steps,
    )


def accumulate(classifier: EncoderClassifier, batch: Sequence[Encoded], tuning: Tuning) -> float:
    """Add the gradient of the mean loss over a batch; returns that loss, in nats per example."""
    total = 0.0
    for rows in _passes(batch, tuning.pass_tokens):
        part = [batch[i] for i in rows]
        logits_BC = label_logits(classifier, part, tuning.precision)
        labels_B = torch.tensor([one.label for one in part], device=logits_BC.device)
        loss = F.cross_entropy(logits_BC, labels_B, reduction="sum") / len(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


@torch.no_grad()
def answer(classifier: EncoderClassifier, examples: Sequence[Encoded], tuning: Tuning) -> list[int]:
    """The label with the largest logit for each example, the first of equals."""
    found = [0] * len(examples)
    for rows in _passes(examples, tuning.pass_tokens):
        logits_BC = label_logits(classifier, [examples[i] for i in rows], tuning.precision)
        for i, label in zip(rows, logits_BC.argmax(dim=1).tolist(), strict=True):
            found[i] = label
    return found


def label_logits(classifier: EncoderClassifier, batch: Sequence[Encoded], precision: Precision) -> Tensor:
    """Logits float32 [B, C]: of the labels of one text, or one of each alternative."""
    device = classifier.score.out_proj.weight.device
    ids_RL, mask_RL = padded([ids for one in batch for ids in one.texts], "right", device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits: Tensor = classifier(ids_RL, mask_RL)
    return logits.float().view(len(batch), -1)


def shuffled_batches(lengths: Sequence[int], batch_size: int, *, seed: int) -> Iterator[list[int]]:
    """Batches of example numbers without end, epoch after epoch; each epoch has every example once.

    An epoch is shuffled, cut into pools of some batches, each sorted by length so that its batches pad little, and the
    batches are shuffled again; the smallest may come anywhere.
    """
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(len(lengths)).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(order), _POOL_BATCHES * batch_size):
            pool = sorted(order[start : start + _POOL_BATCHES * batch_size], key=lambda i: lengths[i])
            batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        for number in generator.permutation(len(batches)).tolist():
            yield batches[number]


def _passes(examples: Sequence[Encoded], pass_tokens: int) -> Iterator[list[int]]:
    """Example numbers in groups of similar length, of at most so many tokens, but at least one example."""
    group: list[int] = []
    for i in sorted(range(len(examples)), key=lambda i: examples[i].length):
        tokens = (len(group) + 1) * len(examples[i].texts) * examples[i].length
        if group and tokens > pass_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
