"""From single runs to figures: what systems agree on, medians, shares of the bandwidth, ratios.

An entry is what one contestant of a case did: {"runs": [...]} or {"failed": why}. A contestant is a system, with its
mode behind it where that is not greedy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from inference_cases import MODELS, Lengths
from inference_contenders import SYSTEMS

from twofold.infer.quality import shared_tokens
from twofold.infer.timing import spread

Entry = Mapping[str, Any]

CORE = Lengths(512, 64)
"""Whose metrics have no lengths in their names."""

WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}
"""Scales of groups, some percent of 4-bit weights, are not counted."""

TOLERANCE = 1e-3
"""Nats by which two float32 ways to compute a token's log-probability may differ."""

RIVALS = {
    "ctranslate2_int8": ("ours_int8", ("ctranslate2_int8",)),
    "ctranslate2_fp32": ("ours_float32", ("ctranslate2_float32",)),
    "transformers_bf16": ("ours_bfloat16", ("transformers_bfloat16", "transformers_bfloat16_compiled")),
    "transformers_fp32": (
        "ours_float32",
        ("transformers_float32", "transformers_float32_static", "transformers_float32_compiled"),
    ),
    "donor_bf16": ("ours_bfloat16", ("donor_bfloat16",)),
    "donor_fp32": ("ours_float32", ("donor_float32",)),
}
"""By the name in metrics: ours of the same precision, and the settings of the other, of which the fastest counts."""

MODES = ("beam4", "sampling")


class DisagreementError(RuntimeError):
    """Two systems that should compute the same do not."""


def compare_exact(ours: Entry, theirs: Entry) -> dict[str, float]:
    """Token for token; where the best two of a place are closer than rounding, the row is compared no further.

    Args:
        ours, theirs: `Checked` of both, as dictionaries.

    Raises:
        DisagreementError: another token, or another log-probability, than rounding explains.
    """
    largest, compared, ties = 0.0, 0, 0
    rows = zip(ours["tokens"], theirs["tokens"], ours["top"], theirs["top"], strict=True)
    for row, (mine, others, my_top, other_top) in enumerate(rows):
        for place, (a, b) in enumerate(zip(mine, others, strict=True)):
            (my_best, _), (best, second) = my_top[place], other_top[place]
            largest = max(largest, abs(my_best - best))
            if largest > TOLERANCE:
                raise DisagreementError(
                    f"log-probabilities of row {row}, token {place} differ by {largest:.2g}, more than {TOLERANCE}"
                )
            if a != b:
                if best - second > 2 * TOLERANCE:
                    raise DisagreementError(f"row {row}, token {place}: ours writes {a}, transformers {b}")
                ties += 1
                break
            compared += 1
    return {"equal_tokens": compared, "near_ties": ties, "largest_difference": largest}


def agreement(found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> float:
    """Share of tokens before the first difference of each row."""
    shared = sum(shared_tokens(a, b) for a, b in zip(found, wanted, strict=True))
    return shared / sum(map(len, wanted))


def decode_rate(run: Entry) -> float:
    """Tokens a second of all rows, after the first ones."""
    rate: float = (run["n_tokens"] - run["n_tokens_at_first"]) / (run["total_s"] - run["first_s"])
    return rate


def step_rate(run: Entry) -> float:
    """Steps a second after the first one, in which sources are encoded."""
    rate: float = (run["n_steps"] - 1) / (run["total_s"] - run["first_step_s"])
    return rate


def summary(
    entry: Entry, facts: Mapping[str, int], rows: int, lengths: Lengths, precision: str
) -> dict[str, Any]:
    """Figures of one contestant that decoded greedily: median, min and max over runs."""
    runs = entry["runs"]
    rates = spread([decode_rate(run) for run in runs])
    weights = facts["weights"] * WEIGHT_BYTES[precision]
    cache = entry.get("cache_bytes")
    if cache is None:  # keys and values in 16 bits with such weights, else in 32
        per_key = 2 if precision == "bfloat16" else 4
        cache = rows * facts["keys_per_token"] * (lengths.source + lengths.new / 2) * per_key
    return {
        "decode_tokens_per_s": rates,
        "first_token_s": spread([run["first_s"] for run in runs]),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "bytes_per_step": weights + cache,
        "bytes_per_s": (weights + cache) * rates["median"] / rows,
    }


def load_summary(arrivals: Sequence[Any], done_s: Sequence[float]) -> dict[str, float]:
    """Of one system under load; latencies are from arrival to the last token."""
    latencies = [done - one.at_s for done, one in zip(done_s, arrivals, strict=True)]
    seconds = max(done_s) - arrivals[0].at_s
    p50, p95 = np.quantile(latencies, [0.5, 0.95]).tolist()
    return {
        "requests_per_s": len(arrivals) / seconds,
        "tokens_per_s": sum(one.new for one in arrivals) / seconds,
        "latency_p50_s": p50,
        "latency_p95_s": p95,
    }


def metrics(details: Mapping[str, Any]) -> tuple[dict[str, float | None], dict[str, str]]:
    """Everything flat, and why what is None is missing.

    Args:
        details: `cases` by name, with `model`, `part` and `entries`; `facts` by model; `read_bytes_per_s`.
    """
    found: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for case in details["cases"].values():
        part = {"speed": _speed, "modes": _modes, "load": _load}[case["part"]]
        part(case, details, found, reasons)
    return dict(sorted(found.items())), reasons


def _speed(
    case: Mapping[str, Any], details: Mapping[str, Any], found: dict[str, Any], reasons: dict[str, str]
) -> None:
    rows, lengths = case["rows"], Lengths(case["source"], case["new"])
    suffix = ("" if lengths in (CORE, Lengths(64, 8)) else f"_{lengths.source}") + MODELS[
        case["model"]
    ].suffix
    facts = details["facts"][case["model"]]
    figures = {}
    for name, entry in case["entries"].items():
        if entry.get("runs"):
            found_here = summary(entry, facts, rows, lengths, SYSTEMS[name].precision)
            figures[name] = entry["summary"] = found_here
            found[f"decode_b{rows}_tokens_per_s_{name}{suffix}"] = found_here["decode_tokens_per_s"]["median"]
            found[f"first_token_b{rows}_s_{name}{suffix}"] = found_here["first_token_s"]["median"]
            found[f"peak_gb_b{rows}_{name}{suffix}"] = found_here["peak_bytes"] / 1e9
            share = found_here["bytes_per_s"] / details["read_bytes_per_s"]
            found[f"decode_b{rows}_share_of_bandwidth_{name}{suffix}"] = share
    if rows == 1:
        _put(found, reasons, f"decode_b1_share_of_bandwidth{suffix}", case, ["ours_int8"])
        if "ours_int8" in figures:
            found[f"decode_b1_share_of_bandwidth{suffix}"] = found[
                f"decode_b1_share_of_bandwidth_ours_int8{suffix}"
            ]
    for rival, (ours, theirs) in RIVALS.items():
        if not any(name in case["entries"] for name in theirs):
            continue
        rates = {name: figures[name]["decode_tokens_per_s"]["median"] for name in theirs if name in figures}
        firsts = [figures[name]["first_token_s"]["median"] for name in theirs if name in figures]
        first = "first_token_over_" if rows == 1 else f"first_token_b{rows}_over_"
        names = (f"decode_b{rows}_over_{rival}{suffix}", f"{first}{rival}{suffix}")
        for name in names:
            _put(found, reasons, name, case, [ours, *theirs])
        if ours in figures and rates:
            found[names[0]] = figures[ours]["decode_tokens_per_s"]["median"] / max(rates.values())
            found[names[1]] = figures[ours]["first_token_s"]["median"] / min(firsts)
            reasons.pop(names[0], None)
            reasons.pop(names[1], None)


def _put(
    found: dict[str, Any], reasons: dict[str, str], name: str, case: Mapping[str, Any], needed: Sequence[str]
) -> None:
    """A figure that is missing until all is there that it needs."""
    found[name] = None
    missing = [system for system in needed if not case["entries"].get(system, {}).get("runs")]
    told = [f"{s}: {case['entries'].get(s, {}).get('failed', 'not measured yet')}" for s in missing]
    if told:
        reasons[name] = "; ".join(told)


def _modes(
    case: Mapping[str, Any], _details: Mapping[str, Any], found: dict[str, Any], reasons: dict[str, str]
) -> None:
    """Steps a second, encoding not counted, over greedy's; the lowest of all precisions goes by itself."""
    suffix = MODELS[case["model"]].suffix
    for mode in MODES:
        ratios = {}
        for name, entry in case["entries"].items():
            system, _, kind = name.partition(" ")
            greedy = case["entries"].get(f"{system} greedy", {})
            if kind == mode and entry.get("runs") and greedy.get("runs"):
                rate, greedy_rate = (median(map(step_rate, e["runs"])) for e in (entry, greedy))
                ratios[system] = rate / greedy_rate
        found |= {f"{mode}_over_greedy_{system}{suffix}": ratio for system, ratio in ratios.items()}
        found[f"{mode}_over_greedy{suffix}"] = min(ratios.values()) if ratios else None
        if not ratios:
            reasons[f"{mode}_over_greedy{suffix}"] = json.dumps(
                {name: entry.get("failed") for name, entry in case["entries"].items()}
            )


def _load(
    case: Mapping[str, Any], _details: Mapping[str, Any], found: dict[str, Any], _reasons: dict[str, str]
) -> None:
    suffix = MODELS[case["model"]].suffix
    for name, entry in case["entries"].items():
        for run in entry.get("runs", ()):
            found |= {f"load_{key}_{name}{suffix}": value for key, value in run["summary"].items()}
