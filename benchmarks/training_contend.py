"""One contender of the throughput comparison, in a process of its own.

    python benchmarks/training_contend.py SPEC.json

Prints its figures as one line of JSON. A process may not take more memory than was free when it began: one that needs
more ends with an error of its own, instead of being killed together with its neighbours.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DEFAULTS: dict[str, Any] = {
    "contender": "ours",
    "model": None,  # T5Gemma folder
    "pool": None,  # JSON lines of pairs
    "check": None,  # a smaller pool, over which the float32 loss is computed first
    "device": "cpu",
    "warmup_steps": 2,
    "measured_steps": 0,  # ours; the peer does one epoch
    "precision": "float32",
    "source_length": 0,  # ours: of a packed row
    "target_length": 0,
    "rows_per_batch": 1,
    "tuned": False,  # peer: its best settings, or its defaults
    "attention": None,
    "batch_size": 8,
    "accumulate": 1,
    "compile": False,
}


def contend(changes: dict[str, Any]) -> dict[str, Any]:
    """Measure in this process.

    Args:
        changes: to DEFAULTS.

    Raises:
        KeyError: a key that DEFAULTS does not have.
    """
    if unknown := set(changes) - set(DEFAULTS):
        raise KeyError(f"unknown settings {sorted(unknown)}; known are {', '.join(DEFAULTS)}")
    spec = DEFAULTS | changes
    if spec["contender"] == "peer":
        import training_peer

        return training_peer.measure(spec)
    import torch
    import training_ours

    import twofold

    model = twofold.load(spec["model"], dtype=torch.float32)
    report: dict[str, Any] = {}
    row = (spec["source_length"], spec["target_length"], spec["rows_per_batch"])
    if spec["check"]:
        data = training_ours.supervised_data(Path(spec["check"]), *row)
        report["check"] = training_ours.pool_loss(model, data)
    loader = training_ours.pool_loader(model, training_ours.supervised_data(Path(spec["pool"]), *row))
    steps = {name: spec[name] for name in ("warmup_steps", "measured_steps")}
    return report | training_ours.measure(
        model, loader, device=spec["device"], precision=spec["precision"], **steps
    )


def contend_apart(changes: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Measure in a new process, and add its peak memory.

    Returns:
        Its figures, or {"failed": why} where it ran out of memory or time.

    Raises:
        RuntimeError: it failed otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "spec.json"
        spec.write_text(json.dumps(changes))
        command = [sys.executable, "-W", "ignore", __file__, str(spec)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {timeout_s:.0f} s"}
    if done.returncode == 0:
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return report
    if any(text in done.stderr for text in ("can't allocate memory", "MemoryError", "out of memory")):
        return {"failed": "out of memory"}
    if done.returncode == -9:
        return {"failed": "killed, which is what happens where memory is short"}
    raise RuntimeError(f"{changes} failed with status {done.returncode}:\n{done.stderr[-2000:]}")


def main() -> None:
    limit_memory()
    changes = json.loads(Path(sys.argv[1]).read_text())
    with contextlib.redirect_stdout(sys.stderr):  # the trainer prints
        report = contend(changes)
    print(json.dumps(report | {"peak_memory_gb": peak_memory_gb(changes.get("device", "cpu"))}))


def limit_memory() -> None:
    """Allow this process what is free now, less a reserve; only Linux says what that is."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return
    import resource

    free = next(int(line.split()[1]) for line in meminfo.read_text().splitlines() if "MemAvailable" in line)
    limit = int(os.environ.get("TWOFOLD_BENCHMARK_MEMORY_GB", 0)) * 10**9 or free * 1024 - 10**9
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def peak_memory_gb(device: str) -> float:
    """Of the GPU's allocator, or the largest resident set of this process."""
    if device == "cuda":
        import torch

        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


if __name__ == "__main__":
    main()
