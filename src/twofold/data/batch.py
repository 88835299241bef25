"""Rows of examples to tensors.

B: rows. S: source positions. T: decoder positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twofold.data.convention import IGNORE_INDEX, Example

__all__ = ["IGNORE_INDEX", "Batch", "Texts", "collate"]


class Texts(NamedTuple):
    """An example as token ids, read back from a batch."""

    source: list[int]
    prefix: list[int]
    """What the decoder is given, up to the token that predicts the first of the target."""
    target: list[int]


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

    documents: tuple[str, ...] = ()
    """Where the examples come from, for messages: source and number of the document."""

    # For a teacher only (`twofold.data.teaching`).
    teacher_input_ids: Tensor | None = None
    """int64 [B, R]: the raw texts of each row, for a language model."""

    teacher_segment_ids: Tensor | None = None
    """int64 [B, R]."""

    teacher_index: Tensor | None = None
    """int64 [B, T]: where in its row of `teacher_input_ids` a label is predicted, -1: nowhere."""

    teacher_token_ids: Tensor | None = None
    """int32 [N, K]: tokens that a teacher named for the scored labels, row by row."""

    teacher_shares: Tensor | None = None
    """float16 [N, K]: of its distribution; all 0 where it said nothing."""

    @property
    def num_scored_tokens(self) -> int:
        """Labels that count in the loss (waits for the device)."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def num_real_tokens(self) -> int:
        """Tokens on both sides that are not padding (waits for the device)."""
        return int((self.segment_ids > 0).sum() + (self.decoder_segment_ids > 0).sum())

    def texts(self) -> Iterator[Texts]:
        """The examples, row by row."""
        for n in range(len(self.input_ids)):
            for segment in range(1, int(self.decoder_segment_ids[n].max()) + 1):
                source = self.input_ids[n][self.segment_ids[n] == segment]
                yield self._texts(source, n, segment)

    def _texts(self, source: Tensor, row: int, segment: int) -> Texts:
        """The example in a segment of a decoder's row."""
        is_own = self.decoder_segment_ids[row] == segment
        given, labels = self.decoder_input_ids[row][is_own], self.labels[row][is_own]
        is_scored = labels != IGNORE_INDEX
        n_prefix = int(is_scored.int().argmax()) + 1
        return Texts(source.tolist(), given[:n_prefix].tolist(), labels[is_scored].tolist())

    def to(self, device: torch.device | str) -> Self:
        """The same batch on a device."""
        moved: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            moved[f.name] = value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        return type(self)(**moved)


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
    longest_source = max((sum(len(e.source) for e in row) for row in rows), default=0)
    longest_target = max((sum(e.decoder_length for e in row) for row in rows), default=0)
    source_shape = (len(rows), _width(longest_source, source_length, "source_length"))
    target_shape = (len(rows), _width(longest_target, target_length, "target_length"))
    input_ids, segment_ids = _filled(source_shape, pad_token_id), _filled(source_shape, 0)
    decoder_input_ids, decoder_segment_ids = _filled(target_shape, pad_token_id), _filled(target_shape, 0)
    labels = _filled(target_shape, IGNORE_INDEX)
    for n, row in enumerate(rows):
        s = t = 0
        for segment, example in enumerate(row, start=1):
            source, prefix, target = example.source, example.decoder_prefix, example.target
            source_end, scored, target_end = (
                s + len(source),
                t + len(prefix) - 1,
                t + len(prefix) - 1 + len(target),
            )
            input_ids[n, s:source_end] = source
            segment_ids[n, s:source_end] = segment
            decoder_input_ids[n, t : scored + 1] = prefix
            decoder_input_ids[n, scored + 1 : target_end] = target[:-1]
            decoder_segment_ids[n, t:target_end] = segment
            labels[n, scored:target_end] = target
            s, t = source_end, target_end
    batch = Batch(
        input_ids=torch.from_numpy(input_ids),
        segment_ids=torch.from_numpy(segment_ids),
        decoder_input_ids=torch.from_numpy(decoder_input_ids),
        decoder_segment_ids=torch.from_numpy(decoder_segment_ids),
        labels=torch.from_numpy(labels),
    )
    if batch.num_scored_tokens == 0:
        raise ValueError(
            f"a batch of {len(rows)} rows has no scored token, its loss would be 0; check that examples have "
            "targets"
        )
    return batch


def _width(longest: int, length: int | None, name: str) -> int:
    """Columns of a side: as asked for, or the longest row, at least one."""
    if length is not None and longest > length:
        raise ValueError(
            f"a row of {longest} tokens does not fit {name}={length}; raise it, or pack with this length"
        )
    return max(longest, 1) if length is None else length


def _filled(shape: tuple[int, int], fill: int) -> npt.NDArray[np.int64]:
    return np.full(shape, fill, dtype=np.int64)
