"""Rows of examples to tensors.

B: rows. S: source positions. T: decoder positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twofold.data.convention import IGNORE_INDEX, Example

__all__ = ["IGNORE_INDEX", "Batch", "collate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one step of a model takes.

    Segments number the examples of a row 1, 2, ... from the left; 0 is padding.
    """

    input_ids: Tensor
    """int64 [B, S]."""

    segment_ids: Tensor
    """int64 [B, S]."""

    decoder_input_ids: Tensor
    """int64 [B, T]; shifted already."""

    decoder_segment_ids: Tensor
    """int64 [B, T]; equal numbers belong to one example on both sides."""

    labels: Tensor
    """int64 [B, T]: the token after each decoder input, IGNORE_INDEX where nothing is scored."""

    @property
    def num_scored_tokens(self) -> int:
        """Labels that count in the loss (waits for the device)."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def num_real_tokens(self) -> int:
        """Tokens on both sides that are not padding (waits for the device)."""
        return int((self.segment_ids > 0).sum() + (self.decoder_segment_ids > 0).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def collate(
    rows: Sequence[Sequence[Example]],
    pad_token_id: int,
    source_length: int | None = None,
    target_length: int | None = None,
) -> Batch:
    """Put rows into tensors.

    Args:
        rows: examples of each row, left to right.
        pad_token_id: fills both inputs; labels are padded with IGNORE_INDEX.
        source_length: S. None: the longest row.
        target_length: T. None: the longest row.

    Raises:
        ValueError: a row is longer than the given lengths, or nothing is scored.
    """
    source_rows = [[example.source for example in row] for row in rows]
    decoder_rows = [[example.decoder_input_ids for example in row] for row in rows]
    batch = Batch(
        input_ids=_pad(source_rows, pad_token_id, source_length, "source_length"),
        segment_ids=_pad(_segments(source_rows), 0, source_length, "source_length"),
        decoder_input_ids=_pad(decoder_rows, pad_token_id, target_length, "target_length"),
        decoder_segment_ids=_pad(_segments(decoder_rows), 0, target_length, "target_length"),
        labels=_pad(
            [[example.labels for example in row] for row in rows],
            IGNORE_INDEX,
            target_length,
            "target_length",
        ),
    )
    if batch.num_scored_tokens == 0:
        raise ValueError(
            f"a batch of {len(rows)} rows has no scored token, its loss would be 0; check that examples have "
            "targets"
        )
    return batch


_Rows = list[list[npt.NDArray[np.int64]]]


def _segments(rows: _Rows) -> _Rows:
    """The number of its example for each token."""
    return [
        [np.full(len(ids), number, dtype=np.int64) for number, ids in enumerate(row, start=1)] for row in rows
    ]


def _pad(rows: _Rows, fill: int, length: int | None, name: str) -> Tensor:
    """Concatenate the parts of each row and pad on the right; int64 [B, length], at least one column."""
    longest = max((sum(map(len, row)) for row in rows), default=0)
    if length is not None and longest > length:
        raise ValueError(
            f"a row of {longest} tokens does not fit {name}={length}; raise it, or pack with this length"
        )
    padded = np.full((len(rows), max(longest, 1) if length is None else length), fill, dtype=np.int64)
    for number, row in enumerate(rows):
        if row:
            ids = np.concatenate(row)
            padded[number, : len(ids)] = ids
    return torch.from_numpy(padded)
