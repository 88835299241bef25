"""Where names go in a picture: each beside its point, covering nothing. In pixels, y upwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Shared area."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)

    def outside(self, other: Box) -> float:
        """Area that is not in `other`."""
        return (self.right - self.left) * (self.top - self.bottom) - self.overlap(other)


def place(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    taken: Sequence[Box],
    bounds: Box,
) -> list[Box]:
    """Where names go beside their points.

    Each gets the place nearest to its point that covers nothing, or the one that covers least; points with the fewest
    free places choose first.

    Args:
        anchors: points, in pixels.
        sizes: width and height of each name.
        taken: what is not to be covered: markers, error bars, lines.
        bounds: what names should stay in.
    """
    boxes: dict[int, Box] = {}

    def cost(anchor: tuple[float, float], box: Box, distance: float) -> float:
        covered = sum(box.overlap(other) for other in (*taken, *boxes.values()))
        crossed = 0
        if is_far(anchor, box):
            crossed = sum(_crosses(anchor, nearest(anchor, box), other) for other in boxes.values())
        return 10 * covered + 40 * box.outside(bounds) + 60 * crossed + distance

    candidates = [_around(anchor, size) for anchor, size in zip(anchors, sizes, strict=True)]
    free = [
        sum(cost(anchor, box, 0.0) == 0 for box, _ in places)
        for anchor, places in zip(anchors, candidates, strict=True)
    ]
    for i in sorted(range(len(anchors)), key=lambda i: free[i]):
        costs = [cost(anchors[i], *candidate) for candidate in candidates[i]]
        boxes[i] = candidates[i][costs.index(min(costs))][0]
    return [boxes[i] for i in range(len(anchors))]


def _around(anchor: tuple[float, float], size: tuple[float, float]) -> list[tuple[Box, float]]:
    """Boxes near a point, with how far each is and how little its side is liked."""
    (x, y), (width, height) = anchor, size
    found: list[tuple[Box, float]] = []
    for rise in (0, 12, -12, 18, -18, 26, -26, 36, -36, 48, -48, 62, -62):
        bottom = y + rise - height / 2
        lefts = [(x + 10, 0), (x - 10 - width, 3), (x + 24, 14), (x - 24 - width, 17)]
        lefts += [(x + 4, 2), (x - width / 2, 4), (x - 4 - width, 5)] if abs(rise) > 12 else []
        found += [
            (Box(left, bottom, left + width, bottom + height), abs(rise) + dislike) for left, dislike in lefts
        ]
    return found


def nearest(point: tuple[float, float], box: Box) -> tuple[float, float]:
    """The place of a box that is nearest to a point."""
    x, y = point
    return min(max(x, box.left), box.right), min(max(y, box.bottom), box.top)


def is_far(point: tuple[float, float], box: Box) -> bool:
    """A name so far from its point that a line has to join them."""
    return math.dist(nearest(point, box), point) > 20


def _crosses(start: tuple[float, float], end: tuple[float, float], box: Box) -> bool:
    steps = [i / 20 for i in range(1, 20)]
    places = ((start[0] + t * (end[0] - start[0]), start[1] + t * (end[1] - start[1])) for t in steps)
    return any(box.left <= x <= box.right and box.bottom <= y <= box.top for x, y in places)
