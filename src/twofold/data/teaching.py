"""What a batch carries for a teacher, beside what the student reads.

B: rows. R: positions of the raw text. T: decoder positions. N: scored positions. K: entries of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from twofold.data.batch import Batch
from twofold.data.convention import Example, RawText
from twofold.data.targets import TargetReader

Rows = Sequence[Sequence[Example]]


class Teaching(Protocol):
    """Adds to a batch what a teacher needs; the examples have their `raw` text."""

    def __call__(self, rows: Rows, batch: Batch) -> Batch:
        """`batch` is made of `rows`."""
        ...


class RawRows:
    """The raw texts of a batch as rows of their own, for a language model in the loop.

    Each is one segment, BOS first where the model has one. A target token that is token i of its text is predicted
    at the state of the token before it: at BOS for i = 0, and nowhere where there is none.
    """

    def __init__(self, bos_token_id: int | None, pad_multiple: int = 64) -> None:
        """Args:
        bos_token_id: what the teacher's texts begin with, None where they begin with themselves.
        pad_multiple: rows are as long as the longest, rounded up to a multiple of this.
        """
        self._bos = bos_token_id
        self._multiple = pad_multiple

    def __call__(self, rows: Rows, batch: Batch) -> Batch:
        """Fill `teacher_input_ids`, `teacher_segment_ids` and `teacher_index`."""
        texts = [[self._read(_raw_of(example)) for example in row] for row in rows]
        longest = max(sum(len(tokens) for tokens, _ in row) for row in texts)
        shape = len(rows), -(-longest // self._multiple) * self._multiple
        ids, segments = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        index = np.full(tuple(batch.labels.shape), -1, dtype=np.int64)
        for n, row in enumerate(rows):
            r = t = 0
            for segment, (example, (tokens, before)) in enumerate(zip(row, texts[n], strict=True), start=1):
                ids[n, r : r + len(tokens)] = tokens
                segments[n, r : r + len(tokens)] = segment
                origins = _raw_of(example).origins
                # The state that predicts token i of the text is that of the token before it.
                at = np.where((origins >= 0) & (origins + before >= 1), r + origins + before - 1, -1)
                scored = t + len(example.decoder_prefix) - 1
                t += example.decoder_length
                index[n, scored:t] = at
                r += len(tokens)
        return replace(
            batch,
            teacher_input_ids=torch.from_numpy(ids),
            teacher_segment_ids=torch.from_numpy(segments),
            teacher_index=torch.from_numpy(index),
        )

    def _read(self, raw: RawText) -> tuple[np.ndarray, int]:
        """What the teacher reads, and how many tokens of it stand before the raw text."""
        return with_bos(raw.tokens, self._bos)


def with_bos(tokens: np.ndarray, bos_token_id: int | None) -> tuple[np.ndarray, int]:
    """A text with the BOS it should begin with; returns how many tokens (0 or 1) were put in front."""
    if bos_token_id is None or tokens[:1].tolist() == [bos_token_id]:
        return tokens, 0
    return np.concatenate([[bos_token_id], tokens]), 1


class StoredTargets:
    """What a teacher said earlier, from a folder of targets."""

    def __init__(self, reader: TargetReader) -> None:
        self._reader = reader

    def __call__(self, rows: Rows, batch: Batch) -> Batch:
        """Fill `teacher_token_ids` and `teacher_shares`."""
        raws = [_raw_of(example) for row in rows for example in row]
        places = np.concatenate([np.where(raw.origins >= 0, raw.start + raw.origins, -1) for raw in raws])
        sources = np.repeat([raw.source for raw in raws], [len(raw.origins) for raw in raws])
        ids, shares = self._reader.lookup(sources, places)
        return replace(
            batch, teacher_token_ids=torch.from_numpy(ids), teacher_shares=torch.from_numpy(shares)
        )


def _raw_of(example: Example) -> RawText:
    assert example.raw is not None, "the loader keeps raw texts where there is a teacher"
    return example.raw
