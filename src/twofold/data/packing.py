"""Packing: several examples in one row, both sides within their budgets."""

from typing import Generic, TypeVar

import numpy as np

Item = TypeVar("Item")

LOOKAHEAD = 256
"""Examples that wait to be packed; more of them fill better, and are more to make again on resuming."""


class Packer(Generic[Item]):
    """Fills rows out of a window of waiting examples, deterministic in their order.

    A row starts with the example that has waited longest, so none waits for ever. Then it takes, of those that
    fit, the one that points most in the direction of the room that is left (the dot product heuristic of
    Panigrahy et al. 2011, "Heuristics for vector bin packing"), until nothing fits.
    """

    def __init__(
        self, source_length: int, target_length: int, *, packing: bool = True, lookahead: int = LOOKAHEAD
    ) -> None:
        """Budgets of one row in tokens; without packing each example is a row of its own."""
        self.source_length = source_length
        self.target_length = target_length
        self._is_packing = packing
        self._lookahead = lookahead if packing else 1
        self.waiting: list[Item] = []
        """Examples that were added and are in no row yet, in the order they came."""
        self._sizes: list[tuple[int, int]] = []

    @property
    def wants_more(self) -> bool:
        """Whether the window is not full yet."""
        return len(self.waiting) < self._lookahead

    def add(self, item: Item, source_length: int, target_length: int) -> None:
        """Let an example wait.

        Raises:
            ValueError: it is longer than a row.
        """
        if source_length > self.source_length or target_length > self.target_length:
            raise ValueError(
                f"an example of {source_length} source and {target_length} target tokens does not fit a row of "
                f"{self.source_length} and {self.target_length}; raise source_length or target_length"
            )
        self.waiting.append(item)
        self._sizes.append((source_length, target_length))

    def next_row(self) -> list[Item]:
        """Fill a row; at least one example must be waiting."""
        if not self._is_packing:
            self._sizes.pop(0)
            return [self.waiting.pop(0)]
        budget = np.asarray([self.source_length, self.target_length], dtype=np.float64)
        sizes = np.asarray(self._sizes) / budget
        # How much each side is in demand: the tighter one counts more.
        weights = sizes.mean(axis=0)
        scaled = sizes * weights
        room = np.ones(2)
        taken = np.zeros(len(sizes), dtype=np.bool_)
        order, pick = [], 0
        while True:
            order.append(pick)
            taken[pick] = True
            room = room - sizes[pick]
            fits = np.flatnonzero(~taken & (sizes <= room + 1e-9).all(axis=1))
            if len(fits) == 0:
                break
            pick = int(fits[np.argmax(scaled[fits] @ room)])
        row = [self.waiting[number] for number in order]
        left = np.flatnonzero(~taken)
        self.waiting = [self.waiting[number] for number in left]
        self._sizes = [self._sizes[number] for number in left]
        return row
