"""`twofold plan`: what a recipe will take, before anything is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from twofold.cli.console import note, out, print_json
from twofold.posttrain.stages import read_run
from twofold.train.plan import DEFAULT_EFFICIENCY, NAMES, RunPlan, find_device, plan_run


def plan_command(
    recipe: Annotated[Path, typer.Argument(help="YAML file that describes the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as data.rows_per_batch=8.")
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", help="Number of devices.")] = 1,
    gpu: Annotated[str, typer.Option("--gpu", help=f"Device: {', '.join(NAMES)}.")] = "h100",
    efficiency: Annotated[
        float, typer.Option("--efficiency", help="Share of the peak rate that useful FLOPs reach.")
    ] = DEFAULT_EFFICIENCY,
    mean_source: Annotated[
        int | None, typer.Option("--mean-source", help="Mean source tokens of an example, for packed rows.")
    ] = None,
    mean_target: Annotated[
        int | None, typer.Option("--mean-target", help="Mean target tokens of an example, for packed rows.")
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option("--price-per-hour", help="Of one device, in any currency.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Take rates from this machine instead of a datasheet.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the plan as one JSON object, as last line.")
    ] = False,
) -> None:
    """Plan a run: parameters, FLOPs, memory per device, time and cost. Reads configurations, no weights, no data."""
    if (mean_source is None) != (mean_target is None):
        raise ValueError("--mean-source and --mean-target go together; give both or neither")
    lengths = None if mean_source is None or mean_target is None else (mean_source, mean_target)
    run = read_run(recipe, overrides or ())
    device = find_device(gpu, measure=measure)
    plan = plan_run(
        run,
        device,
        gpus,
        efficiency=efficiency,
        example_lengths=lengths,
        price_per_hour=price_per_hour,
    )
    note(f"planning {recipe} for {gpus} x {device.name}, {efficiency:.0%} of its peak rate")
    _show(plan)
    if json:
        print_json(plan.as_json())


def _show(plan: RunPlan) -> None:
    parameters = ", ".join(
        f"{part} {_count(n)}" for part, n in plan.parameters.items() if part != "total" and n
    )
    out.print(f"[bold]parameters[/] {plan.parameters['total']:,}: {parameters}", soft_wrap=True)
    if plan.teacher is not None:
        out.print(
            f"[bold]teacher[/] {plan.teacher.parameters:,} parameters, whole on every device", soft_wrap=True
        )
    table = Table("per phase", *(phase.name for phase in plan.phases), pad_edge=False)
    rows: dict[str, list[str]] = {
        "steps": [f"{phase.steps:,}" for phase in plan.phases],
        "trainable parameters": [_count(phase.num_trainable) for phase in plan.phases],
    }
    for name in plan.phases[0].memory.parts():
        sizes = [phase.memory.parts()[name] for phase in plan.phases]
        if any(sizes):
            rows[f"memory: {name.replace('_', ' ')}"] = [_bytes(size) for size in sizes]
    rows["memory: peak per device"] = [
        f"[bold]{_bytes(phase.memory.total)}[/] ({phase.memory.when})" for phase in plan.phases
    ]
    flops = [phase.flops_per_step for phase in plan.phases]
    rows["FLOPs per step"] = [f"{f.total:.3g}" for f in flops]
    rows["FLOPs per token, forward / all"] = [
        f"{f.forward / plan.tokens_per_step:.3g} / {f.total / plan.tokens_per_step:.3g}" for f in flops
    ]
    if plan.total_s is not None:
        for part in ("compute", "communication", "update"):
            rows[f"time of a step: {part}"] = [_seconds(getattr(p, f"{part}_s")) for p in plan.phases]
        rows["time of a step"] = [f"[bold]{_seconds(phase.step_s)}[/]" for phase in plan.phases]
    for name, cells in rows.items():
        table.add_row(name, *cells)
    out.print(table)

    steps = sum(phase.steps for phase in plan.phases)
    total_flops = sum(phase.steps * phase.flops_per_step.total for phase in plan.phases)
    run = f"{steps:,} steps, {_count(steps * plan.tokens_per_step)} tokens, {total_flops:.3g} FLOPs"
    if plan.total_s is None:
        run += "; for times measure this machine: --measure"
    else:
        run += f", {_seconds(plan.total_s)}"
    if plan.cost is not None:
        run += f", cost {plan.cost:,.2f}"
    out.print(f"[bold]the run[/] {run}", soft_wrap=True)
    usable = f"{_bytes(plan.peak.total)} of {_bytes(plan.usable_bytes)} usable per device"
    verdict = "[bold green]fits[/]" if plan.fits else "[bold red]does not fit[/]"
    out.print(f"{verdict}: {usable}; largest {plan.rows_key}: {plan.largest_rows_per_batch}", soft_wrap=True)
    for change in plan.changes:
        mark = "fits" if change.fits else "not enough alone"
        out.print(f"  saves {_bytes(change.saves_bytes)}, {mark}: {escape(change.what)}", soft_wrap=True)
    for what in plan.notes:
        out.print(f"[bold]note:[/] {escape(what)}", soft_wrap=True)
    for problem in plan.problems:
        out.print(f"[yellow]look at this:[/] {escape(problem)}", soft_wrap=True)


def _count(number: float) -> str:
    """12.3M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _bytes(number: float) -> str:
    """12.3 GB, decimal as datasheets count."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.1f} kB"


def _seconds(seconds: float | None) -> str:
    """1.2 ms, 3.4 s, 2.5 h, 3.1 days."""
    assert seconds is not None
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s")):
        if seconds >= size * (2 if unit == "days" else 1):
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds * 1e3:.1f} ms"
