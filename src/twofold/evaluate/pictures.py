"""The frontier as a picture: score against cost, the Pareto line, intervals, and a name at every point.

Colours stand for the kind of model and follow Okabe and Ito's palette, darkened to be read on white; markers tell the
kinds apart too. In the SVG of a page every colour becomes a CSS variable, so that one picture serves light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from twofold.evaluate.contender import Kind
from twofold.evaluate.frontier import Frontier
from twofold.evaluate.labels import Box, is_far, nearest, place

Cost = Literal["flops", "latency"]

COLOURS = {
    "ink": "#1b1d22",
    "muted": "#5b616e",
    "rule": "#dfe2e8",
    "paper": "#ffffff",
    "pair": "#0065a3",
    "stack": "#b54708",
}
"""By the name of the CSS variable."""

_STYLES: dict[Kind, tuple[str, str, float]] = {
    "encoder-decoder": ("pair", "o", 8.0),
    "decoder-only": ("stack", "D", 7.0),
}
"""Colour, marker, its size."""

_LOG_FROM = 3.0
"""Costs this many times apart get a logarithmic axis."""
_LEAST_SPAN = 0.4
"""Of an axis of costs, as a part of the largest: a few percent are not to look like much."""
_LEAST_POINTS = 5.0
"""Of the axis of scores."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a picture, in points; a page shows one for wide screens and one for phones."""

    width: int
    height: int
    font: float
    longest_name: int
    """Characters; of longer names the rest is left out."""


WIDE = Shape(860, 430, 13, longest_name=36)
NARROW = Shape(340, 380, 12, longest_name=24)


@dataclass(frozen=True, slots=True)
class Point:
    """One model in a picture."""

    name: str
    kind: Kind
    cost: float
    score: float
    low: float | None
    high: float | None
    cheapest: float
    dearest: float
    """Cost in its fastest and slowest run; equal where costs are exact."""
    is_on_frontier: bool


def points_of(frontier: Frontier, cost: Cost) -> list[Point]:
    """Models whose cost is known."""
    on_frontier = frontier.on_flops if cost == "flops" else frontier.on_latency
    points = []
    for entry in frontier.entries:
        if cost == "flops" and entry.flops is not None:
            costs = (entry.flops, entry.flops, entry.flops)
        elif cost == "latency" and entry.latency_s is not None:
            costs = (entry.latency_s["median"], entry.latency_s["min"], entry.latency_s["max"])
        else:
            continue
        points.append(
            Point(
                name=entry.name,
                kind=entry.kind,
                cost=costs[0],
                score=entry.score.value,
                low=entry.score.low,
                high=entry.score.high,
                cheapest=costs[1],
                dearest=costs[2],
                is_on_frontier=entry.name in on_frontier,
            )
        )
    return points


def write_pictures(frontier: Frontier, folder: Path) -> list[Path]:
    """quality-flops and quality-latency as PNG and SVG, of what is known; returns the files.

    Raises:
        ImportError: matplotlib is missing.
    """
    files = []
    for cost in ("flops", "latency"):
        points = points_of(frontier, cost)
        if not points:
            continue
        figure = draw(points, cost, WIDE)
        for ending, options in (("png", {"dpi": 200}), ("svg", {"metadata": {"Date": None}})):
            file = folder / f"quality-{cost}.{ending}"
            with _settings(WIDE):
                figure.savefig(file, facecolor=COLOURS["paper"], **options)
            files.append(file)
    return files


def inline_svg(points: Sequence[Point], cost: Cost, shape: Shape, *, title: str, description: str) -> str:
    """An `<svg>` element for a page, in the page's fonts and colours.

    Raises:
        ImportError: matplotlib is missing.
    """
    buffer = io.StringIO()
    with _settings(shape):
        draw(points, cost, shape).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(buffer.getvalue(), f"{cost}-{shape.width}", title, description)


def _for_page(svg: str, prefix: str, title: str, description: str) -> str:
    """Without what only a file needs, and with ids of its own."""
    from html import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"font: (?:(\d+) )?([\d.]+)px [^;\"]*", r"font: \1 \2px var(--sans)", svg)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    head, body = svg.split(">", 1)
    width, height = (float(x) for x in re.findall(r'(?:width|height)="([\d.]+)pt"', head))
    return (
        f'<svg class="picture" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-labelledby="{prefix}-title {prefix}-desc"><title id="{prefix}-title">{escape(title)}</title>'
        f'<desc id="{prefix}-desc">{escape(description)}</desc>{body.strip()}'
    )


def _settings(shape: Shape) -> Any:
    import matplotlib

    return matplotlib.rc_context(
        {"font.size": shape.font, "font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "twofold"}
    )  # fmt: skip


def draw(points: Sequence[Point], cost: Cost, shape: Shape) -> Any:
    """A matplotlib figure of some points.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the report's pictures need matplotlib, which is missing; pip install 'twofold[eval]'"
        ) from error

    with _settings(shape):
        figure = Figure(figsize=(shape.width / 72, shape.height / 72), dpi=72, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        _axes(axes, points, cost, shape)
        _line(axes, points)
        for point in points:
            _mark(axes, point)
        _legend(figure, points)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # names are placed for the axes as they are now
        _name_points(figure, axes, points, shape)
    return figure


def _axes(axes: Any, points: Sequence[Point], cost: Cost, shape: Shape) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    costs = [c for p in points for c in (p.cost, p.cheapest, p.dearest)]
    scores = [s for p in points for s in (p.score, p.low, p.high) if s is not None]
    is_log = max(costs) / min(costs) >= _LOG_FROM
    if is_log:
        axes.set_xscale("log")
        margin = (max(costs) / min(costs)) ** 0.16
        axes.set_xlim(min(costs) / margin, max(costs) * margin)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(round_steps(*axes.get_xlim(), most=6 if shape.width > 500 else 4))
    else:
        axes.set_xlim(*_room(costs, 0.15, _LEAST_SPAN * max(costs)))
        axes.xaxis.set_major_locator(MaxNLocator(5 if shape.width > 500 else 3))
    axes.set_ylim(*_room(scores, 0.1, _LEAST_POINTS))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    unit = "FLOPs per request" if cost == "flops" else "time per request at batch 1"
    axes.set_xlabel(f"{unit}{', log scale' if is_log else ''}", color=COLOURS["muted"])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(format_cost(x, cost))))
    axes.set_ylabel("mean score, points", color=COLOURS["muted"])
    axes.grid(axis="y", color=COLOURS["rule"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=COLOURS["muted"], length=0, pad=6)
    axes.tick_params(axis="x", length=4, color=COLOURS["rule"])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["muted"])


def _room(values: Sequence[float], margin: float, least: float) -> tuple[float, float]:
    """Bounds around values: with a margin, a part of their span, on both sides, and no narrower than `least`."""
    low, high = min(values), max(values)
    half = max((0.5 + margin) * (high - low), least / 2)
    return (low + high) / 2 - half, (low + high) / 2 + half


def round_steps(low: float, high: float, *, most: int) -> list[float]:
    """1, 2 and 5 times powers of ten within bounds, or fewer of them: at most `most`."""
    tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        steps = [digit * 10.0**ten for ten in tens for digit in digits]
        inside = [step for step in steps if low <= step <= high]
        if len(inside) <= most:
            return inside
    return inside[:: math.ceil(len(inside) / most)]


def format_cost(value: float, cost: Cost) -> str:
    """With its unit: `1.5 T`, `620 ms`."""
    if cost == "latency":
        return f"{_three_digits(1000 * value)} ms" if value < 0.9995 else f"{_three_digits(value)} s"
    return format_count(value)


def format_count(value: float) -> str:
    """Three digits and a prefix: `61.2 G`."""
    for factor, prefix in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * factor:
            return f"{_three_digits(value / factor)}{prefix}"
    return _three_digits(value)


def _tick(text: str) -> str:
    """Without zeros after the point: `2.00 T` is `2 T`."""
    number, _, unit = text.partition(" ")
    return f"{float(number):g} {unit}".strip()


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def _line(axes: Any, points: Sequence[Point]) -> None:
    """The best score to be had for each cost: steps, from the cheapest point on to the right edge."""
    kept = sorted((p.cost, p.score) for p in points if p.is_on_frontier)
    costs, scores = [cost for cost, _ in kept], [score for _, score in kept]
    edge = axes.get_xlim()[1]
    axes.step(
        [*costs, edge], [*scores, scores[-1]], where="post", color=COLOURS["muted"], linewidth=1.4, alpha=0.75, zorder=2
    )  # fmt: skip


def _mark(axes: Any, point: Point) -> None:
    colour, marker, size = _STYLES[point.kind]
    shade = COLOURS[colour]
    bar = {"color": shade, "linewidth": 1.5, "alpha": 0.55, "zorder": 3}
    if point.low is not None and point.high is not None:
        axes.plot([point.cost] * 2, [point.low, point.high], **bar)
    if point.dearest > point.cheapest:
        axes.plot([point.cheapest, point.dearest], [point.score] * 2, **bar)
    axes.plot(
        [point.cost], [point.score], marker, markersize=size, markeredgewidth=1.8, markeredgecolor=shade,
        markerfacecolor=shade if point.is_on_frontier else COLOURS["paper"], zorder=4,
    )  # fmt: skip


def _legend(figure: Any, points: Sequence[Point]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for kind, (colour, marker, size) in _STYLES.items():
        if any(point.kind == kind for point in points):
            shade = COLOURS[colour]
            handles.append(
                Line2D([], [], color=shade, marker=marker, markersize=size, linestyle="none", label=kind)
            )
    handles.append(Line2D([], [], color=COLOURS["muted"], linewidth=1.4, alpha=0.75, label="best per cost"))
    figure.legend(
        handles=handles, loc="outside upper left", ncols=3, frameon=False, labelcolor=COLOURS["muted"],
        handletextpad=0.4, columnspacing=1.2, borderpad=0.1, fontsize="small", handlelength=1.4,
    )  # fmt: skip


def _name_points(figure: Any, axes: Any, points: Sequence[Point], shape: Shape) -> None:
    """Direct labels, with a hair line where one had to go further off."""
    renderer = figure.canvas.get_renderer()
    to_pixels: Callable[[Any], Any] = axes.transData.transform
    anchors = [tuple(to_pixels((p.cost, p.score))) for p in points]
    taken = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in anchors]
    for point, (x, y) in zip(points, anchors, strict=True):
        if point.low is not None and point.high is not None:
            bottom, top = (to_pixels((point.cost, score))[1] for score in (point.low, point.high))
            taken.append(Box(x - 2, bottom, x + 2, top))
        if point.dearest > point.cheapest:
            left, right = (to_pixels((cost, point.score))[0] for cost in (point.cheapest, point.dearest))
            taken.append(Box(left, y - 2, right, y + 2))
    kept = sorted((a, p.score) for a, p in zip(anchors, points, strict=True) if p.is_on_frontier)
    edge = axes.bbox.x1
    for i, ((x, y), _) in enumerate(kept):
        after = kept[i + 1][0] if i + 1 < len(kept) else (edge, y)
        taken += [
            Box(x, y - 1.5, after[0], y + 1.5),
            Box(after[0] - 1.5, y, after[0] + 1.5, max(after[1], y)),
        ]
    look = {"color": COLOURS["ink"], "fontsize": shape.font - 1, "zorder": 5, "va": "bottom"}
    inches = figure.dpi_scale_trans
    texts = [
        axes.text(0, 0, _shortened(p.name, shape.longest_name), transform=inches, **look) for p in points
    ]
    extents = [text.get_window_extent(renderer) for text in texts]
    frame = axes.bbox
    boxes = place(
        anchors,
        [(extent.width, extent.height) for extent in extents],
        taken,
        Box(frame.x0 + 2, frame.y0 + 3, frame.x1, frame.y1),
    )
    for text, box, (x, y) in zip(texts, boxes, anchors, strict=True):
        text.set_position((box.left / figure.dpi, box.bottom / figure.dpi))
        if is_far((x, y), box):
            ends = axes.transData.inverted().transform([(x, y), nearest((x, y), box)])
            axes.plot(ends[:, 0], ends[:, 1], color=COLOURS["muted"], linewidth=0.7, zorder=3)


def _shortened(name: str, longest: int) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"
