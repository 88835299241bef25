"""How fast an engine answers, and what memory its process takes: what `twofold bench` and `benchmarks/` share."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from twofold.config import EncoderDecoderConfig
from twofold.data.convention import Convention, split_inputs
from twofold.infer.backends import BackendName, Precision
from twofold.infer.engine import Engine
from twofold.infer.request import Completion, Delta, Request
from twofold.models import EncoderDecoder


class NotAvailableError(ValueError):
    """This backend or precision cannot run here; the message says why."""


def make_engine(
    model: EncoderDecoder,
    *,
    backend: BackendName = "auto",
    precision: Precision = "float32",
    batch_size: int = 8,
    threads: int | None = None,
) -> Engine:
    """An engine at its own settings but for these.

    Args:
        model: in float32; it is the engine's from now on, which may change its weights.
        backend: what runs it.
        precision: of weights, and of what else the backend keeps in it.
        batch_size: rows decoded together.
        threads: of the processor. None: as the backend chooses.

    Raises:
        NotAvailableError: see there.
    """
    try:
        return Engine(model, backend=backend, precision=precision, batch_size=batch_size, threads=threads)
    except (ValueError, ImportError) as error:
        raise NotAvailableError(
            f"backend={backend!r} with precision={precision!r} is not available: {error}"
        ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """One batch from request to answers."""

    first_s: float
    """Until every row had its first token."""
    total_s: float
    n_tokens: int
    """Of all rows."""
    n_tokens_at_first: int
    """Of all rows at `first_s`: rows that were encoded earlier may have several."""
    n_steps: int | None = None
    """Of the engine; None for what does not show its steps."""
    first_step_s: float | None = None
    """Until its first step ended, in which what fits one group was encoded."""

    @property
    def decode_tokens_per_s(self) -> float | None:
        """After the first tokens; None where there was nothing more."""
        # Of beams all tokens come at the end.
        later = self.n_tokens - self.n_tokens_at_first
        return later / (self.total_s - self.first_s) if later else None

    @property
    def steps_per_s(self) -> float | None:
        """After the first step; None where there was one only, or none was seen."""
        if self.n_steps is None or self.first_step_s is None or self.n_steps < 2:
            return None
        return (self.n_steps - 1) / (self.total_s - self.first_step_s)


def time_batch(engine: Engine, requests: Sequence[Request]) -> tuple[Timed, list[tuple[Completion, ...]]]:
    """Answer requests that come together, in the calling thread.

    Args:
        engine: idle, without a thread of its own.
        requests: as many rows as the engine decodes together, or fewer.

    Returns:
        The times, and the answers in order.
    """
    started = time.perf_counter()
    handles = [engine.submit(request) for request in requests]
    waiting = set(range(len(handles)))
    n_tokens = n_tokens_at_first = 0
    first_s = first_step_s = 0.0
    n_steps = 0

    def note(index: int, delta: Delta | None) -> None:
        nonlocal n_tokens, n_tokens_at_first, first_s
        if delta is None or not delta.token_ids:
            return
        n_tokens += len(delta.token_ids)
        if index in waiting:
            waiting.remove(index)
            first_s, n_tokens_at_first = time.perf_counter() - started, n_tokens

    for index, handle in enumerate(handles):
        handle.listen(partial(note, index))
    is_open = True
    while is_open:
        is_open = engine.loop.step()
        n_steps += 1
        first_step_s = first_step_s or time.perf_counter() - started
    answers = [handle.result() for handle in handles]
    total_s = time.perf_counter() - started
    timed = Timed(
        first_s=first_s,
        total_s=total_s,
        n_tokens=n_tokens,
        n_tokens_at_first=n_tokens_at_first,
        n_steps=n_steps,
        first_step_s=first_step_s,
    )
    return timed, answers


def random_ids(vocab_size: int, count: int, length: int, seed: int) -> list[list[int]]:
    """Token ids of `count` sources; the first 16 of the vocabulary, where special tokens usually are, are left out."""
    draw = random.Random(seed)
    return [[draw.randrange(16, vocab_size) for _ in range(length)] for _ in range(count)]


def request_of(
    ids: Sequence[int], config: EncoderDecoderConfig, max_new_tokens: int, **options: Any
) -> Request:
    """A request over a source, as the model's convention has it, that ends after exactly so many tokens.

    Args:
        ids: what is read.
        config: of the model.
        max_new_tokens: of every row.
        options: other fields of `Request`.
    """
    source, prefix = split_inputs(np.asarray(ids, dtype=np.int64), Convention.of(config))
    return Request(
        source_ids=source.tolist(),
        prefix_ids=prefix.tolist(),
        max_new_tokens=max_new_tokens,
        stop_token_ids=(),
        **options,
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def resident_bytes() -> int | None:
    """Memory of this process now; None where the system does not tell."""
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """The most memory this process has had, since `forget_peak` where that works (Linux)."""
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Let `peak_bytes` begin anew from what is used now. Does nothing where the system has no such thing."""
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5")


def _status_bytes(key: str) -> int | None:
    file = Path("/proc/self/status")
    if not file.exists():
        return None
    lines = file.read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), None)
