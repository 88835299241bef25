"""`twofold bench`: a model's speed, memory and quality on this machine, each precision in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

from twofold.checkpoint.load import load
from twofold.config import EncoderDecoderConfig
from twofold.infer.backends import BackendName, Precision
from twofold.infer.engine import Engine
from twofold.infer.quality import Measured, Quality, compare, measure_quality, references
from twofold.infer.timing import (
    NotAvailableError,
    Timed,
    forget_peak,
    make_engine,
    peak_bytes,
    random_ids,
    request_of,
    resident_bytes,
    spread,
    time_batch,
)

_WARMUP_TOKENS = 4

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is measured of a model, at one precision.

    Raises:
        ValueError: a number below 1.
    """

    model: str
    """Folder or hub name."""
    backend: BackendName = "auto"
    precision: Precision = "float32"
    source_tokens: int = 512
    new_tokens: int = 64
    batch_sizes: tuple[int, ...] = (1, 8)
    runs: int = 5
    """Measured of each batch size, in turns."""
    threads: int | None = None
    skip_vision: bool = False
    records: tuple[dict[str, str], ...] = ()
    """Texts for the quality (`quality.read_texts`); empty: it is not measured."""

    def __post_init__(self) -> None:
        numbers = {"source_tokens": self.source_tokens, "new_tokens": self.new_tokens, "runs": self.runs}
        numbers |= {f"batch size {size}": size for size in self.batch_sizes}
        if self.threads is not None:
            numbers["threads"] = self.threads
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.batch_sizes:
            raise ValueError("no batch size given; name at least one")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchFigures:
    """Of one batch size: median, min and max over runs."""

    batch_size: int
    first_token_s: dict[str, float]
    """Until every row had its first token."""
    decode_tokens_per_s: dict[str, float] | None
    """Of all rows after their first tokens; None where only one token was asked for."""
    total_s: dict[str, float]
    """Until every row had its last token."""
    peak_bytes: int
    """Of the process while it ran, weights included; on a GPU its allocator's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Of one precision."""

    precision: Precision
    device: str
    load_s: float
    """To read the weights and make the engine."""
    load_peak_bytes: int
    ready_bytes: int | None
    """Of the process once loaded."""
    batches: tuple[BatchFigures, ...]
    measured: Measured | None
    """Quality, where it was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """A precision that could not be measured."""

    precision: Precision
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All precisions of one model."""

    plans: tuple[Plan, ...]
    results: tuple[Figures | Failed, ...]

    def quality(self, figures: Figures) -> Quality | None:
        """Beside float32; None where one of the two was not measured."""
        base = next(
            (r.measured for r in self.results if isinstance(r, Figures) and r.precision == "float32"), None
        )
        return None if figures.measured is None or base is None else compare(figures.measured, base)

    def as_json(self) -> dict[str, Any]:
        """Everything but the texts and the single answers."""
        plan = asdict(self.plans[0])
        found = {key: plan[key] for key in ("model", "backend", "source_tokens", "new_tokens", "runs")}
        precisions: dict[str, Any] = {}
        for result in self.results:
            if isinstance(result, Failed):
                precisions[result.precision] = {"failed": result.reason}
                continue
            figures = asdict(result)
            del figures["precision"], figures["measured"]
            quality = self.quality(result)
            precisions[result.precision] = figures | {"quality": None if quality is None else asdict(quality)}
        return found | {"threads": plan["threads"], "precisions": precisions}


def measure(plan: Plan) -> Figures | Failed:
    """Measure in this process."""
    started = time.perf_counter()
    model = load(plan.model, dtype=torch.float32, skip_vision=plan.skip_vision)
    given = []
    if plan.records:
        lengths = {"source_tokens": plan.source_tokens, "target_tokens": plan.new_tokens}
        given = references(model, plan.records, **lengths)
    config = model.config
    try:
        engine = make_engine(
            model,
            backend=plan.backend,
            precision=plan.precision,
            batch_size=max(plan.batch_sizes),
            threads=plan.threads,
        )
    except NotAvailableError as error:
        return Failed(precision=plan.precision, reason=str(error))
    load_s = time.perf_counter() - started
    load_peak, ready = peak_bytes(), resident_bytes()
    return Figures(
        precision=plan.precision,
        device=str(engine.device),
        load_s=load_s,
        load_peak_bytes=load_peak,
        ready_bytes=ready,
        batches=time_batches(engine, config, plan),
        measured=measure_quality(engine, given) if given else None,
    )


def time_batches(engine: Engine, config: EncoderDecoderConfig, plan: Plan) -> tuple[BatchFigures, ...]:
    """Time random sources at the lengths and batch sizes of a plan.

    Args:
        engine: idle, without a thread of its own, for as many rows as the largest batch.
        config: of its model.

    Raises:
        ValueError: the lengths do not fit the model.
    """
    timed: dict[int, list[Timed]] = {size: [] for size in plan.batch_sizes}
    peaks = dict.fromkeys(plan.batch_sizes, 0)
    for run in range(-1, plan.runs):  # the first is not counted: libraries load what they need
        for size in timed:
            ids = random_ids(config.decoder.vocab_size, size, plan.source_tokens, seed=run)
            new_tokens = min(_WARMUP_TOKENS, plan.new_tokens) if run < 0 else plan.new_tokens
            requests = [request_of(source, config, new_tokens) for source in ids]
            _forget_peak(engine.device)
            found, _ = time_batch(engine, requests)
            if run >= 0:
                timed[size].append(found)
                peaks[size] = max(peaks[size], _peak(engine.device))
    return tuple(
        BatchFigures(
            batch_size=size,
            first_token_s=spread([one.first_s for one in runs]),
            decode_tokens_per_s=_rates(runs),
            total_s=spread([one.total_s for one in runs]),
            peak_bytes=peaks[size],
        )
        for size, runs in timed.items()
    )


def _rates(runs: Sequence[Timed]) -> dict[str, float] | None:
    rates = [rate for one in runs if (rate := one.decode_tokens_per_s) is not None]
    return spread(rates) if rates else None


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_peak()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()


class EndedError(RuntimeError):
    """The system ended a process before it had its result."""


def run_apart(work: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a new process, so that memory and threads are its own.

    Args:
        work: of a module, as it goes to the other process by name.
        arguments: and its result: whatever can be pickled.

    Raises:
        EndedError: see there; and whatever `work` raises.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        try:
            return processes.submit(work, *arguments).result()
        except BrokenProcessPool as error:
            raise EndedError(
                "its process was ended by the system, which is what happens where memory is short"
            ) from error


def measure_apart(plan: Plan) -> Figures | Failed:
    """Measure in a new process, so that memory is this precision's alone.

    Raises:
        ValueError, OSError: as for `twofold.load`.
    """
    try:
        return run_apart(measure, plan)
    except EndedError as error:
        return Failed(precision=plan.precision, reason=str(error))


def bench(
    plans: Sequence[Plan],
    *,
    run: Callable[[Plan], Figures | Failed] = measure_apart,
    watch: Callable[[Iterator[Plan], int], Iterator[Plan]] = lambda plans, total: plans,
) -> Report:
    """Measure a model at several precisions, one after another.

    Args:
        plans: that differ in precision.
        run: how each is measured.
        watch: wraps the plans as they are measured, with their number, for a progress bar.
    """
    results = tuple(run(plan) for plan in watch(iter(plans), len(plans)))
    return Report(plans=tuple(plans), results=results)
