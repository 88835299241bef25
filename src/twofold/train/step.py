"""One optimizer step."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Generic, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from typing_extensions import TypeVar

from twofold.data import IGNORE_INDEX, Batch
from twofold.models import EncoderDecoder, EncoderModel
from twofold.train.loss import Matching, Teacher, TeacherHead, chunked_loss, hidden_loss
from twofold.train.opening import Opening
from twofold.train.parallel import local_part, reduce_gradients
from twofold.train.world import ONE_PROCESS, World

Precision = Literal["float32", "bfloat16"]
Trained = TypeVar("Trained", bound=EncoderModel, default=EncoderDecoder)


class NonFiniteError(ArithmeticError):
    """A loss or gradient is infinite or not a number; the weights are still those of the step before."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did."""

    loss: float
    """Nats per scored token, before the update, with what matching hidden states adds to it; of other objectives than
    likelihood what they say."""
    scored_tokens: int
    real_tokens: int
    """Tokens on both sides that are not padding."""
    grad_norm: float
    """Global L2 norm before clipping."""
    learning_rate: float
    seconds: float
    """Of the update; in a run also of what it waited for, its batches above all."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the objective says besides, see `Objective.reported`."""


TeacherOf = Callable[[Batch, torch.Tensor], Teacher]
"""What a teacher says at given positions of a batch on the device (int64 [N], of the flattened labels)."""


class Objective(nn.Module, Generic[Trained]):
    """A batch in, its summed loss out: what is sharded over devices, and what a step differentiates."""

    metric_names: tuple[str, ...] = ()
    """What `note` is told of every batch."""

    def __init__(self, model: Trained, precision: Precision = "float32") -> None:
        """`precision`: see `TrainSettings`."""
        super().__init__()
        self.model = model
        self.precision = precision
        self._noted: list[torch.Tensor] = []
        self.train(model.training)

    @abstractmethod
    def forward(self, batch: Batch, scored: torch.Tensor) -> torch.Tensor:
        """The summed loss, float32 [].

        Args:
            batch: on the device of the model.
            scored: int64 [N], there too: the places of the scored labels in the flattened labels
                (`scored_positions`, taken before the batch is moved, so that nothing waits for the device).
        """

    def count(self, batch: Batch) -> int:
        """What summed losses and metrics are divided by: the scored tokens (of a batch on the CPU)."""
        return batch.num_scored_tokens

    def note(self, *sums: torch.Tensor) -> None:
        """Keep what a batch adds to each of `metric_names`, summed over what `count` counts."""
        self._noted.append(torch.stack([total.detach().double() for total in sums]))

    def reported(self, means: dict[str, float]) -> dict[str, float]:
        """What is told of the means of `metric_names`: they themselves, unless something is made of them."""
        return means

    def take_metrics(self) -> torch.Tensor:
        """float64 [metrics]: the sums since the last call, on the model's device."""
        device = next(self.model.parameters()).device
        total = torch.zeros(len(self.metric_names), dtype=torch.float64, device=device)
        for sums in self._noted:
            total += sums
        self._noted.clear()
        return total


class LossModule(Objective):
    """The likelihood of the labels, or what a teacher says in their place, in nats.

    The head is part of it, so that the logits of all positions never exist (`chunked_loss`).
    """

    def __init__(
        self,
        model: EncoderDecoder,
        precision: Precision = "float32",
        *,
        teacher: TeacherOf | None = None,
        teacher_share: float = 1.0,
        matching: Matching | None = None,
    ) -> None:
        """
        Args:
            teacher: asked in train mode only, so that held-out losses stay comparable.
            teacher_share: see `chunked_loss`.
            matching: whose hidden states are to be the teacher's too; its answer, a `TeacherHead`, must have them.
        """
        super().__init__(model, precision)
        self.teacher = teacher
        self.teacher_share = teacher_share
        self.matching = matching

    def forward(self, batch: Batch, scored: torch.Tensor) -> torch.Tensor:
        """See `Objective.forward`."""
        device = batch.labels.device.type
        asked = self.teacher if self.training else None
        matching = self.matching if asked is not None else None
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            states_BTD, _, hidden_BTD = self.model.states(
                input_ids=batch.input_ids,
                segment_ids=batch.segment_ids,
                decoder_input_ids=batch.decoder_input_ids,
                decoder_segment_ids=batch.decoder_segment_ids,
                output_hidden_states=matching is not None,
            )
            teacher = asked(batch, scored) if asked is not None else None
            head = self.model.lm_head
            loss: torch.Tensor = chunked_loss(
                states_BTD.flatten(0, 1)[scored],
                batch.labels.flatten()[scored],
                head.out_proj.weight,
                softcap=head.softcap,
                teacher=teacher,
                teacher_share=self.teacher_share,
            )
        if matching is not None:
            assert isinstance(teacher, TeacherHead)
            read_ND = [hidden_BTD[i].flatten(0, 1)[scored] for i in matching.layers]
            loss = loss + matching.weight * hidden_loss(read_ND, teacher)
        return loss


def scored_positions(batch: Batch) -> torch.Tensor:
    """int64 [N]: the places of the scored labels in the flattened labels (waits for the batch's device)."""
    return (batch.labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]


def batch_loss(module: nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
    """The summed loss of a batch on the CPU, computed on a device, float32 []."""
    scored = scored_positions(batch).to(device, non_blocking=True)
    loss: torch.Tensor = module(batch.to(device), scored)
    return loss


def train_step(
    module: Objective,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    *,
    step: int,
    learning_rate: float,
    max_grad_norm: float | None = None,
    seed: int = 0,
    world: World = ONE_PROCESS,
    reduce_every_batch: bool = False,
    opening: Opening | None = None,
) -> StepResult:
    """Update the model once on the batches of all ranks, as if they were one.

    The loss is the sum over the scored tokens of all batches (or what else `Objective.count` counts), divided by
    their number, so that padding and the way tokens are dealt out to batches, and batches to ranks, change nothing.

    Args:
        module: in train mode; of several ranks sharded. Parameters without `requires_grad` stay as they are.
        batches: of this rank's streams, in their order; every rank has as many. On the CPU, where counting their
            tokens does not wait for the device.
        step: for messages and dropout.
        learning_rate: of this step.
        max_grad_norm: see `TrainSettings`.
        seed: of dropout. Torch's generators are seeded for each batch from (seed, step, stream), so that what is
            dropped depends neither on the number of ranks nor on what was drawn before.
        reduce_every_batch: see `TrainSettings`.
        opening: says what the encoder sees in each batch; the model is left with the masks of the last one.

    Raises:
        NonFiniteError: loss or gradient norm is not finite; nothing was updated on any rank.
        ValueError: nothing is scored.
    """
    started = time.perf_counter()
    counts = [
        sum(module.count(b) for b in batches),
        sum(b.num_scored_tokens for b in batches),
        sum(b.num_real_tokens for b in batches),
    ]
    count, n_scored, n_real = world.sum_(torch.tensor(counts)).tolist()
    num_streams = len(batches) * world.size
    if count == 0 or n_scored == 0:
        raise ValueError(
            f"step {step} has no scored token in {num_streams} batches; check the labels of the data"
        )
    device = next(module.parameters()).device
    optimizer.zero_grad(set_to_none=True)
    losses = torch.zeros(num_streams, dtype=torch.float64, device=device)
    streams = world.streams(num_streams)
    for stream, batch in zip(streams, batches, strict=True):
        reduce_gradients(module, reduce_every_batch or stream == streams[-1])
        torch.manual_seed(batch_seed(seed, step, stream))
        if opening is not None:
            opening.of_batch(step, stream).apply(module.model)
        summed = batch_loss(module, batch, device)
        (summed / count).backward()  # type: ignore[no-untyped-call]
        losses[stream] = summed.detach()

    gradients = [local_part(p.grad) for p in module.parameters() if p.grad is not None]
    # Summed over all ranks and then divided by the replicas, which all have the same gradients.
    squared_norm = get_total_norm(gradients).double().square() / world.replicas
    # The step's one wait for the device.
    found = world.sum_(torch.cat([losses, module.take_metrics(), squared_norm[None]])).tolist()
    loss_of_stream, metric_sums, squared = found[:num_streams], found[num_streams:-1], found[-1]
    loss, grad_norm = sum(loss_of_stream) / count, squared**0.5
    if not (isfinite(loss) and isfinite(grad_norm)):
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(
            f"step {step} has loss {loss} and gradient norm {grad_norm}"
            f"{_where_from(world, loss_of_stream, batches)}; stopped before the update, the weights are those of step "
            f"{step - 1}. Start a new run with a lower optimizer.learning_rate or more schedule.warmup_steps; "
            "model.path can be the last checkpoint of this one"
        )
    if max_grad_norm is not None and grad_norm > max_grad_norm:
        torch._foreach_mul_(gradients, max_grad_norm / (grad_norm + 1e-6))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    means = {name: total / count for name, total in zip(module.metric_names, metric_sums, strict=True)}
    seconds = time.perf_counter() - started
    return StepResult(loss, n_scored, n_real, grad_norm, learning_rate, seconds, module.reported(means))


def batch_seed(seed: int, step: int, stream: int) -> int:
    """A seed of its own for every batch of a run, 63 bits."""
    return int(np.random.SeedSequence((seed, step, stream)).generate_state(1, np.uint64)[0] >> 1)


def _where_from(world: World, loss_of_stream: Sequence[float], batches: Sequence[Batch]) -> str:
    """Which batches are to blame, and of which documents they are; "" where only gradients are not finite."""
    bad = [stream for stream, loss in enumerate(loss_of_stream) if not isfinite(loss)]
    if not bad:
        return ""
    streams = world.streams(len(loss_of_stream))
    own = {n: batch.documents for n, batch in zip(streams, batches, strict=True) if n in bad}
    documents = {stream: known for part in world.gather(own) for stream, known in part.items()}
    named = [f"{n} (documents {', '.join(documents[n]) or 'unknown'})" for n in bad]
    return f", from batch {', '.join(named)} of 0 to {len(loss_of_stream) - 1}"
