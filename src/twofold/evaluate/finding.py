"""What a frontier shows, in one sentence that claims no more than the intervals allow."""

from __future__ import annotations

import math
from typing import Literal

from twofold.evaluate.frontier import Entry, Frontier

Verdict = Literal["better", "worse", "not told apart"]
Expense = Literal["less", "the same", "more", "mixed", "unknown"]

_SAME_COST = 0.02
"""Costs this close, as a part of the baseline's, count as equal."""


def verdict(entry: Entry) -> Verdict:
    """Whether a model differs from the baseline by more than chance; without an interval it is not told."""
    difference = entry.difference
    if difference is None or not difference.leaves_out(0.0):
        return "not told apart"
    return "better" if difference.value > 0 else "worse"


def cost_ratios(entry: Entry, base: Entry) -> dict[str, float]:
    """A model's costs as multiples of the baseline's, where both are known: `FLOPs`, `latency`."""
    pairs = {
        "FLOPs": (entry.flops, base.flops),
        "latency": (entry.latency_median_s, base.latency_median_s),
    }
    return {name: ours / theirs for name, (ours, theirs) in pairs.items() if ours and theirs}


def clear_ratios(entry: Entry, base: Entry) -> dict[str, float]:
    """The same, but 1 for latencies whose runs overlap: these do not tell two models apart."""
    ratios = cost_ratios(entry, base)
    ours, theirs = entry.latency_s, base.latency_s
    if ours and theirs and ours["min"] <= theirs["max"] and theirs["min"] <= ours["max"]:
        ratios["latency"] = 1.0
    return ratios


def expense(ratios: dict[str, float]) -> Expense:
    """All costs in one word."""
    if not ratios:
        return "unknown"
    is_less = any(ratio < 1 - _SAME_COST for ratio in ratios.values())
    is_more = any(ratio > 1 + _SAME_COST for ratio in ratios.values())
    if is_less and is_more:
        return "mixed"
    return "less" if is_less else "more" if is_more else "the same"


def told(frontier: Frontier) -> Entry | None:
    """The model that the finding is about: an encoder-decoder if there is one; the best of those that are better than
    the baseline at no more cost; else the one whose cost is nearest. None where there is only the baseline."""
    base = frontier.entry(frontier.baseline)
    others = [entry for entry in frontier.entries if entry is not base]
    pairs = [entry for entry in others if entry.kind == "encoder-decoder"]

    def rank(entry: Entry) -> tuple[bool, float, float]:
        ratios = clear_ratios(entry, base)
        if verdict(entry) == "better" and expense(ratios) in ("less", "the same"):
            return True, 0.0, entry.score.value
        apart = max((abs(math.log2(ratio)) for ratio in ratios.values()), default=0.0)
        return False, -round(apart, 1), entry.score.value

    return max(pairs or others, key=rank, default=None)


def finding(frontier: Frontier) -> str:
    """The sentence, as plain text."""
    base = frontier.entry(frontier.baseline)
    entry = told(frontier)
    n = len(frontier.tasks)
    over = "one task" if n == 1 else f"{n} tasks"
    if entry is None:
        return f"{base.name} scores {base.score.value:.1f} points over {over}."
    assert entry.difference is not None
    difference, ratios = entry.difference, cost_ratios(entry, base)
    size = f"{abs(difference.value):.1f} points {'above' if difference.value >= 0 else 'below'} {base.name}"
    if difference.low is not None:
        size += f" (95% interval {difference.low:+.1f} to {difference.high:+.1f})"
    costs = " and ".join(f"{ratio:.2f} times its {name}" for name, ratio in ratios.items())
    return (
        f"Over {over}, {entry.name} scores {entry.score.value:.1f} points, {size}"
        f"{', at ' + costs if costs else ''}: {_summary(entry, expense(clear_ratios(entry, base)))}."
    )


def _summary(entry: Entry, cost: Expense) -> str:
    quality = {
        "better": "better",
        "worse": "worse",
        "not told apart": "no difference that these examples show",
    }[verdict(entry)]
    if entry.difference is not None and entry.difference.low is None:
        quality = "a difference without an interval"
    price = {
        "less": "at less cost",
        "the same": "at the same cost",
        "more": "at more cost",
        "mixed": "cheaper in one cost and dearer in the other",
        "unknown": "at a cost that is not known",
    }[cost]
    return f"{quality}, {price}"
