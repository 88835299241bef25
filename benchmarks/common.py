"""What every benchmark reports beside its figures: hardware, versions, command, commit."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("twofold", "torch", "transformers", "safetensors", "numpy", "gguf", "ctranslate2", "openvino")


def result(name: str, metrics: dict[str, float], details: dict[str, Any]) -> dict[str, Any]:
    """The JSON object of a benchmark; `metrics` is flat and holds numbers only."""
    return {
        "benchmark": name,
        "metrics": metrics,
        "details": details,
        "hardware": hardware(),
        "versions": versions(),
        "command": command(sys.orig_argv[1:]),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def command(arguments: list[str]) -> str:
    """What was typed, from the root of the repository; of files elsewhere the name alone."""
    root = Path(__file__).resolve().parents[1]

    def shown(argument: str) -> str:
        path = Path(argument)
        if not path.is_absolute():
            return argument
        return (
            str(path.relative_to(root))
            if path.is_relative_to(root) and ".venv" not in path.parts
            else path.name
        )

    return shlex.join(["python", *map(shown, arguments)])


def publish(report: dict[str, Any], out: Path | None) -> None:
    """Write the report to a file, if asked, and print it as the last line."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report), flush=True)


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, and the GPU where there is one."""
    import torch

    info: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Installed versions of what matters here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit measured, with a mark if the tree had changes."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-changed" if changed else "")
