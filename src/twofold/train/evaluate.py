"""Held-out loss."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from twofold.data import Batch
from twofold.train.parallel import release
from twofold.train.step import Objective, batch_loss
from twofold.train.world import ONE_PROCESS, World


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The loss over a set of batches."""

    loss: float
    """Nats per scored token, every token with the same weight; of other objectives than likelihood what they say."""
    scored_tokens: int
    metrics: dict[str, float] = field(default_factory=dict)
    """See `Objective.reported`."""


@torch.no_grad()
def evaluate(module: Objective, batches: Iterable[Batch], world: World = ONE_PROCESS) -> Evaluation:
    """The mean loss per scored token, without dropout or teacher; the module's mode is left as it was.

    Args:
        batches: `loader.one_pass()`, the same on every rank. Rank r computes batches r, r + size, ...; losses are
            added up in the order of the batches, so that the result does not depend on the number of ranks.

    Raises:
        ValueError: nothing is scored.
    """
    device = next(module.parameters()).device
    was_training = module.training
    module.eval()
    losses: list[torch.Tensor] = []
    count = n_scored = 0
    batch = None
    module.take_metrics()
    try:
        for number, batch in enumerate(batches):
            count += module.count(batch)
            n_scored += batch.num_scored_tokens
            is_own = number % world.size == world.rank
            losses.append(batch_loss(module, batch, device) if is_own else torch.zeros((), device=device))
        metrics = module.take_metrics()
        if batch is not None and 0 < len(losses) % world.size <= world.rank:
            batch_loss(module, batch, device)  # the others gather parameters for a batch that this rank lacks
            module.take_metrics()
    finally:
        module.train(was_training)
        release(module)
    if count == 0:
        raise ValueError("the held-out batches have no scored token; check data.held_out")
    found = world.sum_(torch.cat([torch.stack(losses).double(), metrics])).tolist()
    means = [total / count for total in found[len(losses) :]]
    named = dict(zip(module.metric_names, means, strict=True))
    return Evaluation(sum(found[: len(losses)]) / count, n_scored, module.reported(named))
