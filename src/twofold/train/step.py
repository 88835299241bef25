"""One optimizer step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from twofold.data import Batch
from twofold.models import EncoderDecoder
from twofold.train.loss import token_loss

Precision = Literal["float32", "bfloat16"]


class NonFiniteError(ArithmeticError):
    """A loss or gradient is infinite or not a number; the weights are still those of the step before."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did."""

    loss: float
    """Nats per scored token, before the update."""
    scored_tokens: int
    real_tokens: int
    """Tokens on both sides that are not padding."""
    grad_norm: float
    """Global L2 norm before clipping."""
    learning_rate: float
    seconds: float


def batch_loss(model: EncoderDecoder, batch: Batch, precision: Precision) -> torch.Tensor:
    """The summed loss of a batch that lies on the model's device, in nats, float32 []."""
    with torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits_BTV = model(
            input_ids=batch.input_ids,
            segment_ids=batch.segment_ids,
            decoder_input_ids=batch.decoder_input_ids,
            decoder_segment_ids=batch.decoder_segment_ids,
        ).logits
    total, _ = token_loss(logits_BTV, batch.labels)
    return total


def train_step(
    model: EncoderDecoder,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    *,
    step: int,
    learning_rate: float,
    max_grad_norm: float | None = None,
    precision: Precision = "float32",
) -> StepResult:
    """Update the model once on several batches, as if they were one.

    The loss is the sum over the scored tokens of all batches, divided by their number, so that padding and
    the way tokens are dealt out to batches change nothing.

    Args:
        model: in train mode. Parameters without `requires_grad` stay as they are.
        batches: on the CPU, where counting their tokens does not wait for the device.
        step: for messages.
        learning_rate: of this step.
        max_grad_norm: see `TrainSettings`.
        precision: see `TrainSettings`.

    Raises:
        NonFiniteError: loss or gradient norm is not finite; nothing was updated.
        ValueError: no token is scored.
    """
    started = time.perf_counter()
    n_scored = sum(batch.num_scored_tokens for batch in batches)
    if n_scored == 0:
        raise ValueError(
            f"step {step} has no scored token in {len(batches)} batches; check the labels of the data"
        )
    device = next(model.parameters()).device
    optimizer.zero_grad(set_to_none=True)
    total_loss = torch.zeros((), device=device)
    for batch in batches:
        summed = batch_loss(model, batch.to(device), precision)
        (summed / n_scored).backward()  # type: ignore[no-untyped-call]
        total_loss += summed.detach()

    trained = [p for p in model.parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for p in trained if p.grad is not None])
    loss, grad_norm = torch.stack(
        [total_loss / n_scored, norm]
    ).tolist()  # the step's one wait for the device
    if not (isfinite(loss) and isfinite(grad_norm)):
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(
            f"step {step} has loss {loss} and gradient norm {grad_norm}; stopped before the update, the "
            f"weights are those of step {step - 1}. Start a new run with a lower optimizer.learning_rate or "
            "more schedule.warmup_steps; model.path can be the last checkpoint of this one"
        )
    if max_grad_norm is not None:
        clip_grads_with_norm_(trained, max_grad_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    n_real = sum(batch.num_real_tokens for batch in batches)
    return StepResult(loss, n_scored, n_real, grad_norm, learning_rate, time.perf_counter() - started)
