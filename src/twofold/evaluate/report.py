"""The frontier as one HTML file that needs nothing else, with its pictures and numbers beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Any

from twofold.evaluate.bootstrap import Estimate
from twofold.evaluate.comparable import MODEL_SETTINGS
from twofold.evaluate.contender import Kind
from twofold.evaluate.finding import cost_ratios, finding, verdict
from twofold.evaluate.frontier import Entry, Frontier
from twofold.evaluate.pictures import (
    NARROW,
    WIDE,
    Cost,
    Point,
    format_cost,
    format_count,
    inline_svg,
    points_of,
    write_pictures,
)

_CLASSES: dict[Kind, str] = {"encoder-decoder": "pair", "decoder-only": "stack"}
_MISSING = "–"


def write_report(
    frontier: Frontier, folder: Path, *, command: str, versions: Mapping[str, str]
) -> list[Path]:
    """Write index.html, frontier.json and the pictures; files of these names are replaced.

    Args:
        frontier: what to show.
        folder: made where it is missing.
        command: that made the report.
        versions: it was made with.

    Returns:
        The files.

    Raises:
        ImportError: matplotlib is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sentence = finding(frontier)
    numbers = {"finding": sentence, "command": command, "versions": dict(versions), **frontier.as_json()}
    data, page = folder / "frontier.json", folder / "index.html"
    _replace(page, report_html(frontier, command=command, versions=versions))
    _replace(data, json.dumps(numbers, indent=1) + "\n")
    return [page, data, *write_pictures(frontier, folder)]


def _replace(file: Path, text: str) -> None:
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def report_html(frontier: Frontier, *, command: str, versions: Mapping[str, str]) -> str:
    """The page.

    Raises:
        ImportError: matplotlib is missing.
    """
    template = Template(files("twofold.evaluate").joinpath("report.html").read_text(encoding="utf-8"))
    n = len(frontier.entries)
    return template.substitute(
        title=escape(f"Quality against cost: {', '.join(entry.name for entry in frontier.entries)}"),
        heading="Quality against cost",
        finding=escape(finding(frontier)),
        meta=escape(_meta(frontier, n)),
        warnings=_warnings(frontier),
        pictures=_pictures(frontier),
        bars="".join(_bars(frontier, task) for task in frontier.tasks),
        scores=_scores(frontier),
        paired=_paired(frontier),
        costs=_costs(frontier),
        reading=_reading(frontier),
        caveats=_caveats(frontier),
        settings=_settings(frontier, command, versions),
    )


def _meta(frontier: Frontier, n: int) -> str:
    parts = [f"{n} model{'s' if n > 1 else ''}", f"tasks: {', '.join(frontier.tasks)}"]
    hardware = frontier.measured_on
    if hardware is not None:
        machine = hardware.get("gpu") or hardware.get("processor") or hardware.get("device")
        threads = hardware.get("threads", 1)
        parts.append(
            f"timed on {machine}, {threads} thread{'s' if threads > 1 else ''}, {frontier.precision}"
        )
    dates = sorted({str(evaluation["date"])[:10] for evaluation in frontier.evaluations})
    parts.append(dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}")
    return " · ".join(parts)


def _warnings(frontier: Frontier) -> str:
    if not frontier.warnings:
        return ""
    lines = "".join(f"<li>{escape(line)}</li>" for line in frontier.warnings)
    return (
        '<div class="warning" role="note"><strong>Not everything here was measured alike.</strong> '
        f"Differences between these models may come from this:<ul>{lines}</ul></div>"
    )


def _pictures(frontier: Frontier) -> str:
    texts: dict[Cost, tuple[str, str, str]] = {
        "flops": (
            "Quality against FLOPs",
            "Mean score against floating-point operations per request",
            "Operations to read and answer one request of each task, averaged over tasks; exact, from the models' "
            "shapes.",
        ),
        "latency": (
            "Quality against measured latency",
            "Mean score against measured time per request",
            f"Seconds from request to last token at batch 1, {_latency_lengths(frontier)}; median, and the range of "
            "all runs.",
        ),
    }
    sections = []
    for cost, (heading, title, caption) in texts.items():
        points = points_of(frontier, cost)
        if not points:
            continue
        described = _described(points, cost)
        wide, narrow = (
            inline_svg(points, cost, s, title=title, description=described) for s in (WIDE, NARROW)
        )
        sections.append(
            f'<section aria-labelledby="{cost}"><h2 id="{cost}">{heading}</h2><figure>'
            f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
            f"<figcaption>{caption} Filled points lie on the line of best score per cost. Vertical bars: 95% "
            "intervals.</figcaption></figure></section>"
        )
    return "".join(sections)


def _latency_lengths(frontier: Frontier) -> str:
    if not frontier.is_at_reference:
        return "at the mean lengths of each task, averaged over tasks"
    return f"{frontier.reference.source} tokens read and {frontier.reference.target} written"


def _described(points: Sequence[Point], cost: Cost) -> str:
    """What the picture shows, in words."""
    told = (
        f"{p.name} ({p.kind}): {p.score:.1f} points at {format_cost(p.cost, cost)}"
        f"{', on the line of best score per cost' if p.is_on_frontier else ''}"
        for p in sorted(points, key=lambda p: p.cost)
    )
    return "; ".join(told) + "."


def _bars(frontier: Frontier, task: str) -> str:
    """One card: a bar for each model, from zero."""
    results = [(entry, entry.tasks[task]) for entry in frontier.entries]
    largest = max(x for _, r in results for x in (r.score.value, r.score.high or 0.0, 1e-9))
    rows = []
    for entry, result in results:
        score = result.score
        whisker = ""
        if score.low is not None and score.high is not None:
            left, right = (100 * max(x, 0.0) / largest for x in (score.low, score.high))
            whisker = f'<b style="left:{left:.2f}%;width:{right - left:.2f}%"></b>'
        rows.append(
            f'<div class="bar {_CLASSES[entry.kind]}"><span class="name"><span class="mark"></span>'
            f'{escape(entry.name)}</span><span class="value">{_interval(score)}</span>'
            f'<span class="track" aria-hidden="true"><i style="width:{100 * max(score.value, 0) / largest:.2f}%"></i>'
            f"{whisker}</span></div>"
        )
    first = results[0][1]
    return (
        f'<div class="card"><h3>{escape(task)}</h3><p class="note">{escape(first.metric)}, {first.n:,} examples</p>'
        f"{''.join(rows)}</div>"
    )


def _interval(estimate: Estimate, sign: str = "") -> str:
    """Value, and its interval where there is one."""
    value = _signed(f"{estimate.value:{sign}.1f}")
    if estimate.low is None:
        return value
    bounds = _signed(f"{estimate.low:{sign}.1f} to {estimate.high:{sign}.1f}")
    return f'{value} <span class="unit">{bounds}</span>'


def _signed(text: str) -> str:
    return text.replace("-", "−")


def _table(
    name: str, caption: str, heads: Sequence[str], rows: Iterable[tuple[Entry, Sequence[str]]], baseline: str
) -> str:
    """Scrolls on its own where it is wider than the screen. Cells and heads are HTML."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in ("model", *heads))
    body = "".join(
        f'<tr class="{_CLASSES[entry.kind]}{" strong" if entry.name == baseline else ""}"><th scope="row">'
        f'<span class="mark"></span>{escape(entry.name)} <span class="unit">{entry.kind}</span></th>'
        f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for entry, cells in rows
    )
    return (
        f'<p class="note" id="{name}-caption">{escape(caption)}</p>'
        f'<div class="table" role="region" tabindex="0" aria-labelledby="{name}-caption">'
        f'<table aria-labelledby="{name}-caption"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _scores(frontier: Frontier) -> str:
    def cells(entry: Entry) -> list[str]:
        tasks = [_interval(entry.tasks[task].score) for task in frontier.tasks]
        return [f"<strong>{_interval(entry.score)}</strong>", *tasks, _parameters(entry.parameters)]

    heads = ["mean", *(escape(task) for task in frontier.tasks), "parameters"]
    rows = [(entry, cells(entry)) for entry in frontier.entries]
    caption = "Points of 100, with 95% intervals, best mean first. The baseline is shaded."
    return _table("scores", caption, heads, rows, frontier.baseline)


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def _paired(frontier: Frontier) -> str:
    others = [entry for entry in frontier.entries if entry.name != frontier.baseline]
    if not others:
        return ""
    base = frontier.entry(frontier.baseline)

    def cells(entry: Entry) -> list[str]:
        assert entry.difference is not None
        by_task = [entry.tasks[task].difference for task in frontier.tasks]
        ratios = cost_ratios(entry, base)
        return [
            f"<strong>{_interval(entry.difference, '+')}</strong>",
            verdict(entry) if entry.difference.low is not None else "no interval",
            *(f"{ratios[name]:.2f}×" if name in ratios else _MISSING for name in ("FLOPs", "latency")),
            *(_interval(difference, "+") for difference in by_task if difference is not None),
        ]

    heads = ["mean", "verdict", "FLOPs", "latency", *(escape(task) for task in frontier.tasks)]
    table = _table(
        "paired",
        f"Points above or below {base.name} over the same examples, with 95% intervals of the paired difference; costs "
        "as multiples of its own.",
        heads,
        [(entry, cells(entry)) for entry in others],
        frontier.baseline,
    )
    return (
        f'<section aria-labelledby="paired"><h2 id="paired">Against {escape(base.name)}</h2>{table}</section>'
    )


def _costs(frontier: Frontier) -> str:
    settings = frontier.latency_settings
    exact = _table(
        "exact",
        f"From the models' shapes: operations of a request, and bytes in {frontier.precision}.",
        ["FLOPs per request", "of these reading", "weights", "weights read per token", "cache per token"],
        [(entry, _exact_cells(entry)) for entry in frontier.entries],
        frontier.baseline,
    )
    if settings is None:
        return exact + '<p class="note">Latency was not measured.</p>'
    lengths = frontier.reference
    throughput = f'throughput, batch {settings.batch_size} <span class="unit">tokens/s</span>'
    measured = _table(
        "measured",
        f"Measured, medians of {settings.runs} runs. Per request: {_latency_lengths(frontier)}. The others: "
        f"{lengths.source} tokens read and {lengths.target} written, the same for every model.",
        ["per request", "first token", "each further token", throughput],
        [(entry, _measured_cells(entry)) for entry in frontier.entries],
        frontier.baseline,
    )
    return exact + measured


def _exact_cells(entry: Entry) -> list[str]:
    size = entry.footprint
    if entry.flops is None or size is None:
        return [_MISSING] * 5
    reading = fmean(task.reading_flops or 0 for task in entry.tasks.values())
    sizes = (size.weight_bytes, size.weight_bytes_per_token, size.cache_bytes_per_token)
    return [
        format_count(entry.flops),
        f"{reading / entry.flops:.0%}",
        *(f"{format_count(n_bytes)}B" for n_bytes in sizes),
    ]


def _measured_cells(entry: Entry) -> list[str]:
    one, many, spread = entry.reference, entry.throughput, entry.latency_s
    whole = _MISSING
    if spread is not None:
        middle, low, high = (format_cost(spread[key], "latency") for key in ("median", "min", "max"))
        whole = f'{middle} <span class="unit">{low} to {high}</span>'
    return [
        whole,
        _MISSING if one is None else format_cost(one.first_token_s["median"], "latency"),
        _MISSING if one is None or one.token_s is None else format_cost(one.token_s, "latency"),
        _MISSING if many is None else f"{many.tokens_per_s:.1f}",
    ]


def _reading(frontier: Frontier) -> str:
    return f"""<dl>
<dt>Score</dt><dd>Mean over the tasks, each in points of its metric's best value, so that all tasks weigh the same.</dd>
<dt>Intervals</dt><dd>The middle {frontier.confidence:.0%} of {frontier.draws:,} bootstrap draws of examples within each
task. All models are drawn on the same examples, so a difference has an interval of its own, often narrower than the two
scores suggest. Read it, not whether two bars overlap.</dd>
<dt>The line</dt><dd>The best score that any of these models has at each cost. A model below it is beaten: another one
costs no more and scores no less. Whether the gap is more than chance is for the intervals to say.</dd>
<dt>FLOPs</dt><dd>Two for each multiplication and addition of a matrix product, attention by what each token sees,
windows counted, the vocabulary on answer tokens alone. A decoder-only model is counted as one causal stack.</dd>
<dt>Latency</dt><dd>Measured with the engine, one request at a time, each model in a process of its own. A request of a
task that scores given answers is timed as if it wrote as many tokens.</dd>
<dt>Bytes</dt><dd>Weights: all parameters at {escape(frontier.precision)}. Read per token: those that every written
token passes, which bound the speed of batch 1. Cache: keys and values of one token, read or written.</dd>
</dl>"""


def _caveats(frontier: Frontier) -> str:
    results = [(entry, task, entry.tasks[task]) for entry in frontier.entries for task in frontier.tasks]
    lines = [
        "Intervals cover the choice of examples, not that of training runs, prompts or tasks, and are not corrected "
        "for the number of comparisons.",
        "FLOPs do not predict time: memory and the number of steps do their part. Look at both pictures.",
        "Latency holds for this machine, precision and engine.",
        "A request is one question put to the model: a task with four choices takes several for each example, of every "
        "model alike.",
    ]
    if frontier.latency_settings is not None and frontier.latency_settings.runs == 1:
        lines.append("Latencies are of one run each, so their spread is not known.")
    if frontier.left_out:
        lines.append(f"Left out, as not every model has them: {', '.join(frontier.left_out)}.")
    without = sorted({task for _, task, result in results if result.score.low is None})
    if without:
        lines.append(
            f"{', '.join(without)}: no scores of single examples, so there is no interval, and none for the mean."
        )
    cut: dict[str, list[str]] = {}
    for entry, task, result in results:
        if result.n_truncated:
            cut.setdefault(task, []).append(f"{entry.name} {result.n_truncated} of {result.n}")
    lines += [
        f"{task}: examples longer than a model can read: {', '.join(who)}." for task, who in cut.items()
    ]
    small = sorted({f"{task} ({result.n})" for _, task, result in results if result.n < 100})
    if small:
        lines.append(f"Few examples: {', '.join(small)}. Intervals of so few are rough.")
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _settings(frontier: Frontier, command: str, versions: Mapping[str, str]) -> str:
    shared = {key: value for key, value in frontier.settings.items() if key not in MODEL_SETTINGS}
    parts = ["<h3>Evaluation</h3>", _facts(shared)]
    if frontier.latency_settings is not None:
        parts += [
            "<h3>Latency</h3>",
            _facts(asdict(frontier.latency_settings) | (frontier.measured_on or {})),
        ]
    parts += ["<h3>Versions</h3>", _facts(versions), "<h3>Commands</h3>"]
    parts += [f"<pre>{escape(line)}</pre>" for line in dict.fromkeys([command, *_commands(frontier)])]
    parts.append("<h3>Models</h3>")
    for entry in frontier.entries:
        run = next(each for each in frontier.evaluations if each["model"] == entry.name)
        facts: dict[str, Any] = {"path": entry.path, "evaluated": f"{run['date']}, in {run['seconds']:.0f} s"}
        others = {key: one for key, one in run["versions"].items() if versions.get(key, one) != one}
        if others:
            facts["with other versions"] = others
        lengths = (
            f"{t}: {entry.tasks[t].lengths.source} + {entry.tasks[t].lengths.target}" for t in frontier.tasks
        )
        facts["tokens read + written"] = "; ".join(lengths)
        parts.append(f"<p><strong>{escape(entry.name)}</strong></p>{_facts(facts)}")
    return "".join(parts)


def _commands(frontier: Frontier) -> list[str]:
    return [str(evaluation["command"]) for evaluation in frontier.evaluations]


def _facts(facts: Mapping[str, Any]) -> str:
    rows = (f"<dt>{escape(str(key))}</dt><dd>{escape(_plain(value))}</dd>" for key, value in facts.items())
    return f'<dl class="facts">{"".join(rows)}</dl>'


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(each)}" for key, each in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(each) for each in value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "default", True: "yes", False: "no"}[value]
    return str(value)
