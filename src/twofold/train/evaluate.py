"""Held-out loss."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from twofold.data import Batch
from twofold.train.step import LossModule, batch_loss


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The loss over a set of batches."""

    loss: float
    """Nats per scored token, every token with the same weight."""
    scored_tokens: int


@torch.no_grad()
def evaluate(module: LossModule, batches: Iterable[Batch]) -> Evaluation:
    """The mean loss per scored token, without dropout or teacher; the module's mode is left as it was.

    Args:
        batches: `loader.one_pass()`.

    Raises:
        ValueError: nothing is scored.
    """
    device = next(module.parameters()).device
    was_training = module.training
    module.eval()
    total, n_scored = torch.zeros((), dtype=torch.float64, device=device), 0
    try:
        for batch in batches:
            n_scored += batch.num_scored_tokens
            total += batch_loss(module, batch, device)
    finally:
        module.train(was_training)
    if n_scored == 0:
        raise ValueError("the held-out batches have no scored token; check data.held_out")
    return Evaluation(total.item() / n_scored, n_scored)
