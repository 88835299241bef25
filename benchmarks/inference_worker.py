"""One system of the inference benchmark in a process of its own, which waits for commands on its input.

    python benchmarks/inference_worker.py SPEC

Prints one line of JSON once it is ready, and one per command. A process may not take more memory than is free.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from inference_cases import Load
from inference_contenders import LOAD_ROWS, SYSTEMS, Contender, open_contender

from twofold.infer.timing import forget_peak, peak_bytes, random_ids, resident_bytes

RESERVE_BYTES = 10**9
WARMUP_TOKENS = 4
WARMUP_SOURCE = 4096
"""Source tokens of a batch up to which it is warmed up at full length."""
MEMORY_SIGNS = ("can't allocate memory", "memoryerror", "out of memory", "bad_alloc", "not enough memory")


class OutOfMemoryError(RuntimeError):
    """A contender needed more than there was."""


class Failed(RuntimeError):
    """A contender cannot do it; the message says why."""


def perform(contender: Contender, spec: Mapping[str, Any], command: Mapping[str, Any]) -> dict[str, Any]:
    """Carry out a command; all are made of plain numbers, sources are drawn from a seed."""
    vocab_size: int = spec["vocab_size"]
    what = command["do"]
    if what == "check":
        sources = [random_ids(vocab_size, 1, length, seed=length)[0] for length in command["sources"]]
        return contender.check(sources, command["new"])._asdict()
    if what == "serve":
        arrivals = Load(**{k: command[k] for k in Load._fields}).arrivals()
        sources = [random_ids(vocab_size, 1, one.source, seed=i)[0] for i, one in enumerate(arrivals)]
        done, peak = _watched(lambda: contender.serve(arrivals, sources))
        return {"done_s": done, "peak_bytes": peak, "most_rows": LOAD_ROWS}
    rows, source, new, mode = (command[name] for name in ("rows", "source", "new", "mode"))
    if what == "warm":
        # Compiled code is made for one length of the cache.
        tokens = new if SYSTEMS[spec["system"]].compiles else min(WARMUP_TOKENS, new)
        length = source if rows * source <= WARMUP_SOURCE else min(source, 64)
        contender.answer(random_ids(vocab_size, rows, length, seed=0), tokens, mode)
        return {"cache_bytes": contender.cache_bytes(rows, source, new)}
    assert what == "run", what
    sources = random_ids(vocab_size, rows, source, seed=command["seed"])
    (timed, answers), peak = _watched(lambda: contender.answer(sources, new, mode))
    if any(len(answer) != new for answer in answers):
        raise Failed(f"answers of {sorted(map(len, answers))} tokens where {new} were wanted")
    return asdict(timed) | {"peak_bytes": peak}


def _watched(work: Any) -> tuple[Any, int]:
    gc.collect()
    forget_peak()
    found = work()
    return found, peak_bytes()


class Worker(Protocol):
    """A contender somewhere."""

    def ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer to a command.

        Raises:
            Failed, OutOfMemoryError: see there.
        """
        ...

    def close(self) -> None:
        """Let go of its memory."""
        ...


class Local:
    """In this process: for small models, where importing would take longer than measuring."""

    def __init__(self, spec: Mapping[str, Any], _timeout_s: float) -> None:
        self._spec = spec
        try:
            self._contender: Contender = open_contender(spec)
        except (ValueError, ImportError) as error:
            raise Failed(str(error)) from error
        self.ready = {"ready_bytes": resident_bytes()}

    def ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """See `Worker`."""
        return perform(self._contender, self._spec, command)

    def close(self) -> None:
        """See `Worker`."""


class Apart:
    """In a process of its own."""

    def __init__(self, spec: Mapping[str, Any], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        threads = {"OMP_NUM_THREADS": str(spec["threads"])}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | threads,
        )
        self.ready = self._answer()

    def ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """See `Worker`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._ended()
        return self._answer()

    def close(self) -> None:
        """See `Worker`."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(self._timeout_s):
                self.close()
                raise Failed(f"not done after {self._timeout_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise (OutOfMemoryError if answer["memory"] else Failed)(answer["failed"])
        return answer

    def _ended(self) -> None:
        status = self._process.wait()
        if status in (-9, -6):  # killed, or aborted by a failed allocation
            raise OutOfMemoryError(f"its process ended with status {status}, as where memory is short")
        raise Failed(f"its process ended with status {status}")


def main() -> None:
    spec = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print

    def reply(answer: Mapping[str, Any]) -> None:
        replies.write(json.dumps(answer) + "\n")
        replies.flush()

    limit_memory()
    try:
        contender = open_contender(spec)
    except Exception as error:
        reply(failure(error))
        return
    reply({"ready_bytes": resident_bytes(), "load_peak_bytes": peak_bytes()})
    for line in sys.stdin:
        limit_memory()
        try:
            answer = perform(contender, spec, json.loads(line))
        except Exception as error:
            answer = failure(error)
        reply(answer)


def failure(error: Exception) -> dict[str, Any]:
    """Why something could not be done."""
    text = f"{type(error).__name__}: {error}"
    is_memory = any(sign in text.lower() for sign in MEMORY_SIGNS)
    return {"failed": text.splitlines()[0][:300], "memory": is_memory}


def limit_memory() -> None:
    """Allow this process what it has and what is free now, less a reserve; only Linux says what that is."""
    meminfo, status = Path("/proc/meminfo"), Path("/proc/self/status")
    if not meminfo.exists():
        return
    import resource

    def kilobytes(file: Path, key: str) -> int:
        return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(key))

    limit = 1024 * (kilobytes(meminfo, "MemAvailable") + kilobytes(status, "VmData")) - RESERVE_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(
        resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )


class Workers:
    """The contenders of one model, started when they are first asked, waiting while others work.

    Args:
        specs: by system.
        make: `Local` or `Apart`.
        timeout_s: of one command.
    """

    def __init__(self, specs: Mapping[str, Mapping[str, Any]], make: Any, timeout_s: float) -> None:
        self._specs, self._make, self._timeout_s = specs, make, timeout_s
        self._alive: dict[str, Worker] = {}
        self._warm: dict[str, list[Mapping[str, Any]]] = {}
        self._cannot: dict[str, str] = {}

    def warm(self, system: str, command: Mapping[str, Any]) -> dict[str, Any]:
        """The same for a command that need not be repeated until the contender is started anew; else {}."""
        if command in self._warm.get(system, []):
            return {}
        answer = self.ask(system, command)
        self._warm.setdefault(system, []).append(command)
        return answer

    def ask(self, system: str, command: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer; where memory is short, once more without the others beside it.

        Raises:
            Failed: it cannot do this, also alone.
        """
        try:
            return self._ask(system, command)
        except OutOfMemoryError as error:
            if not set(self._alive) - {system}:
                self._close(system)
                raise Failed(f"out of memory: {error}") from error
        self.close()
        try:
            return self._ask(system, command)
        except OutOfMemoryError as error:
            self._close(system)
            raise Failed(f"out of memory: {error}") from error

    def close(self) -> None:
        """End all of them."""
        for system in list(self._alive):
            self._close(system)

    def _ask(self, system: str, command: Mapping[str, Any]) -> dict[str, Any]:
        if system in self._cannot:
            raise Failed(self._cannot[system])
        if system not in self._alive:
            try:
                self._alive[system] = self._make(self._specs[system], self._timeout_s)
            except Failed as error:
                self._cannot[system] = str(error)
                raise
        try:
            return self._alive[system].ask(command)
        except Failed:
            self._close(system)
            raise

    def _close(self, system: str) -> None:
        self._warm.pop(system, None)
        worker = self._alive.pop(system, None)
        if worker is not None:
            worker.close()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main()
