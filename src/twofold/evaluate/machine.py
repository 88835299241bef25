"""Where a number comes from: hardware, versions, command."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("twofold", "torch", "transformers", "lm_eval", "datasets", "openvino", "numba")


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads, and the GPU where `device` is one."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def versions() -> dict[str, str]:
    """Installed versions of what can change a figure."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def command() -> str:
    """What was typed."""
    program = Path(sys.argv[0]).name
    return shlex.join(["twofold" if program == "__main__.py" else program, *sys.argv[1:]])
