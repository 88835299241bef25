"""Packing: several examples in one row, both sides within their budgets."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from twofold.data.convention import Example
from twofold.objectives.pair import Tokens

MAX_OPEN_ROWS = 16
"""Rows that wait for short examples; more of them fill better and keep more text in memory."""


class Packer:
    """Streaming first-fit packing, deterministic in the order of the examples.

    An example goes to the oldest open row that has room for it on both sides. A row is finished when its
    target (or source) is full, or when too many are open and it is the oldest.
    """

    def __init__(self, source_length: int, target_length: int, *, packing: bool = True) -> None:
        """Budgets of one row in tokens; without packing each example is a row of its own."""
        self.source_length = source_length
        self.target_length = target_length
        self.packing = packing
        self._open: list[list[Example]] = []

    def add(self, example: Example) -> list[list[Example]]:
        """Place an example.

        Returns:
            Rows that are finished now: none or one.

        Raises:
            ValueError: the example is longer than a row.
        """
        if len(example.source) > self.source_length or example.decoder_length > self.target_length:
            raise ValueError(
                f"an example of {len(example.source)} source and {example.decoder_length} target tokens does "
                f"not fit a row of {self.source_length} and {self.target_length}; raise source_length or "
                "target_length"
            )
        if not self.packing:
            return [[example]]
        row = next((row for row in self._open if self._has_room(row, example)), None)
        if row is None:
            row = []
            self._open.append(row)
        row.append(example)
        if self._is_full(row):
            self._open = [other for other in self._open if other is not row]
            return [row]
        return [self._open.pop(0)] if len(self._open) > MAX_OPEN_ROWS else []

    def flush(self) -> list[list[Example]]:
        """Finish all open rows, oldest first."""
        rows, self._open = self._open, []
        return rows

    def _room(self, row: list[Example]) -> tuple[int, int]:
        return (
            self.source_length - sum(len(example.source) for example in row),
            self.target_length - sum(example.decoder_length for example in row),
        )

    def _has_room(self, row: list[Example], example: Example) -> bool:
        source_room, target_room = self._room(row)
        return len(example.source) <= source_room and example.decoder_length <= target_room

    def _is_full(self, row: list[Example]) -> bool:
        return min(self._room(row)) == 0

    def state_dict(self) -> dict[str, Any]:
        """The open rows, JSON-able."""
        return {
            "open": [
                [[e.source.tolist(), e.decoder_prefix.tolist(), e.target.tolist(), e.ends] for e in row]
                for row in self._open
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._open = [
            [Example(_ids(source), _ids(prefix), _ids(target), ends) for source, prefix, target, ends in row]
            for row in state["open"]
        ]


def _ids(values: list[int]) -> Tokens:
    return np.asarray(values, dtype=np.int64)
