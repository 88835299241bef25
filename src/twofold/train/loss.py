"""The loss of one batch, as a sum, so that a step can divide by the tokens of all its batches."""

from torch import Tensor
from torch.nn import functional as F

from twofold.data import IGNORE_INDEX


def token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over scored tokens.

    Args:
        logits_BTV: [B, T, V], any float dtype; the softmax is taken in float32.
        labels_BT: int64 [B, T]: the right token at each position, IGNORE_INDEX where nothing is scored.

    Returns:
        The sum in nats, float32 [], and the number of scored tokens, int64 []; 0 and 0 where there are none.
    """
    logits = logits_BTV.float().flatten(0, 1)
    total = F.cross_entropy(logits, labels_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total, (labels_BT != IGNORE_INDEX).sum()
