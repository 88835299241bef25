"""Held-out loss."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from twofold.data import Batch
from twofold.train.parallel import release
from twofold.train.step import LossModule, batch_loss
from twofold.train.world import ONE_PROCESS, World


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The loss over a set of batches."""

    loss: float
    """Nats per scored token, every token with the same weight."""
    scored_tokens: int


@torch.no_grad()
def evaluate(module: LossModule, batches: Iterable[Batch], world: World = ONE_PROCESS) -> Evaluation:
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
    n_scored = 0
    batch = None
    try:
        for number, batch in enumerate(batches):
            n_scored += batch.num_scored_tokens
            is_own = number % world.size == world.rank
            losses.append(batch_loss(module, batch, device) if is_own else torch.zeros((), device=device))
        if batch is not None and 0 < len(losses) % world.size <= world.rank:
            batch_loss(module, batch, device)  # the others gather parameters for a batch that this rank lacks
    finally:
        module.train(was_training)
        release(module)
    if n_scored == 0:
        raise ValueError("the held-out batches have no scored token; check data.held_out")
    return Evaluation(sum(world.sum_(torch.stack(losses).double()).tolist()) / n_scored, n_scored)
