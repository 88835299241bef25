"""The study's pictures and its one table, out of the files of its arms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.study.text import DOMAINS


def draw(folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """start.png and train.png, and the final figures of every arm as metrics.

    Raises:
        FileNotFoundError: no arm has been measured.
    """
    starts = _read(folder, "start-*.json")
    curves = _read(folder, "train-*.json")
    if not starts and not curves:
        raise FileNotFoundError(f"no results in {folder}; run --part start or --part train first")
    import matplotlib

    matplotlib.use("Agg")
    metrics: dict[str, float] = {}
    if starts:
        metrics |= _draw_starts(starts, folder / "start.png")
    if curves:
        metrics |= _draw_curves(curves, folder / "train.png")
    return metrics, {"starts": len(starts), "curves": len(curves)}


def _read(folder: Path, pattern: str) -> list[dict[str, Any]]:
    return [json.loads(file.read_text())["details"] for file in sorted(folder.glob(pattern))]


def _draw_starts(starts: list[dict[str, Any]], path: Path) -> dict[str, float]:
    from matplotlib import pyplot as plt

    losses = {
        start["arm"]: {domain: sum(x) / len(x) for domain, x in start["losses"].items()} for start in starts
    }
    order = sorted(losses, key=lambda arm: -max(losses[arm].values()))
    figure, axes = plt.subplots(figsize=(8, 0.35 * len(order) + 1.2), layout="constrained")
    for shift, domain in enumerate(DOMAINS):
        places = [i + 0.25 * (shift - 1) for i in range(len(order))]
        axes.barh(places, [losses[arm][domain] for arm in order], 0.25, label=domain)
    axes.set_yticks(range(len(order)), order)
    axes.set_xlabel("nats per token, before any training")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return {
        f"{arm} {domain} start": loss
        for arm, by_domain in losses.items()
        for domain, loss in by_domain.items()
    }


def _draw_curves(curves: list[dict[str, Any]], path: Path) -> dict[str, float]:
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(DOMAINS), figsize=(5 * len(DOMAINS), 4), layout="constrained")
    arms = list(dict.fromkeys(curve["arm"] for curve in curves))
    colours = {arm: f"C{i}" for i, arm in enumerate(arms)}
    metrics: dict[str, float] = {}
    named: set[str] = set()
    for curve in curves:
        points = curve["curve"]
        for axes, domain in zip(panels, DOMAINS, strict=True):
            losses = [point["loss"][domain] for point in points]
            label = None if curve["arm"] in named else curve["arm"]
            axes.plot(
                [p["tokens"] for p in points], losses, "o-", ms=3, color=colours[curve["arm"]], label=label
            )
            metrics[f"{curve['arm']} {domain} after {points[-1]['tokens']} tokens"] = losses[-1]
        named.add(curve["arm"])
    for axes, domain in zip(panels, DOMAINS, strict=True):
        axes.set(title=domain, xlabel="tokens, both sides", yscale="log")
    panels[0].set_ylabel("held-out loss, nats per target token")
    panels[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return metrics
