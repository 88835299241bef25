"""Lists of token ids to a padded batch.

Letters: B rows, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def padded(
    rows: Sequence[Sequence[int]], side: Literal["left", "right"], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids int64 [B, L], 0 where padded on the given side, and mask bool [B, L]. At least one column."""
    length = max(1, *(len(row) for row in rows))
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        span = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, span] = torch.tensor(row, dtype=torch.int64)
        mask[i, span] = True
    return ids.to(device), mask.to(device)
