"""What replies come to: answers, refusals, failures, and percentiles of times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from serving_client import Reply

PERCENTILES = (50, 95, 99)


def summary(replies: Sequence[Reply]) -> dict[str, Any]:
    """Of one load on one system.

    Returns:
        requests, answered, refused (a status and a reason), failed (anything else), http_5xx, seconds until the last
        one ended, tokens_per_s over that time, and percentiles of the answered: `first_token_s` since the request was
        due, `per_token_s` after the first token.
    """
    answered = [reply for reply in replies if reply.is_answered]
    refused = [reply for reply in replies if is_refused(reply)]
    seconds = max((reply.ended_s for reply in replies), default=0.0)
    return {
        "requests": len(replies),
        "answered": len(answered),
        "refused": len(refused),
        "failed": len(replies) - len(answered) - len(refused),
        "http_5xx": sum((reply.status or 0) >= 500 for reply in replies),
        "seconds": seconds,
        "tokens_per_s": sum(reply.n_tokens for reply in answered) / seconds if seconds else 0.0,
        "first_token_s": percentiles([reply.first_s for reply in answered if reply.times_s]),
        "per_token_s": percentiles([r.per_token_s for r in answered if r.per_token_s is not None]),
    }


def is_refused(reply: Reply) -> bool:
    """The server said no, and why."""
    return reply.status is not None and reply.status >= 400 and reply.is_whole and bool(reply.error)


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p95, p99; None where there is nothing."""
    if not values:
        return None
    return {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}


def is_sustained(runs: Sequence[Mapping[str, Any]], first_token_limit_s: float) -> bool:
    """All requests of all runs were answered, 95 of 100 with a first token in time."""
    return all(
        run["answered"] == run["requests"] and run["first_token_s"]["p95"] <= first_token_limit_s
        for run in runs
    )


def metrics(details: Mapping[str, Any]) -> dict[str, float]:
    """Flat figures out of `details`: medians over runs, by system and rate, and what the servers' cost."""
    found: dict[str, float] = {}
    loads: Mapping[str, Mapping[str, Any]] = details["loads"]
    for rate, systems in loads.items():
        for system, runs in systems.items():
            name = f"{system}_rate_{rate}"
            found[f"{name}_tokens_per_s"] = median(run["tokens_per_s"] for run in runs)
            for what in ("first_token_s", "per_token_s"):
                for p in PERCENTILES:
                    values = [run[what][f"p{p}"] for run in runs if run[what]]
                    if values:
                        found[f"{name}_{what}_p{p}"] = median(values)
    for system, rate in details["sustained_rate"].items():
        found[f"{system}_sustained_rate"] = rate
    flood = details["flood"]
    found["http_5xx"] = sum(
        run["http_5xx"]
        for systems in (*loads.values(), flood)
        for name, runs in systems.items()
        if name == "server"
        for run in runs
    )
    speeds = {name: median(run["tokens_per_s"] for run in runs) for name, runs in flood.items()}
    for name, speed in speeds.items():
        found[f"{name}_flood_tokens_per_s"] = speed
    if "server" in speeds and "engine" in speeds:
        # Runs were taken in turns: each pair of neighbours is compared, so that a slow minute counts for both.
        pairs = zip(flood["server"], flood["engine"], strict=True)
        found["overhead_over_engine"] = median(s["seconds"] / e["seconds"] for s, e in pairs) - 1
    for name in ("transformers", "transformers_batched"):
        if name in speeds and "server" in speeds:
            found[f"flood_tokens_per_s_over_{name}"] = speeds["server"] / speeds[name]
    return found
