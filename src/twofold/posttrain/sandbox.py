"""Running code that a model wrote, with limits.

Each test runs in a Python process of its own (`sandbox_child`), in an empty temporary folder, with an empty
environment and without input or output. Limits of the operating system hold for it: processor time, address space, size
of files, open files, and (unless it is root's) processes; a clock outside kills it with all it started. Where the
system allows it, the process has no network: a network namespace of its own. An audit hook of Python refuses sockets,
other programs, `ctypes`, and changes to files outside the temporary folder.

This keeps mistakes in: endless loops, all memory used, files deleted, downloads. It is no wall against an adversary:
the process has the user's rights to read files, and code that wants to can get around the hook, which runs in the same
interpreter. Models that are rewarded do look for such ways. Train on a machine, or in a container, that holds nothing
of value and has no network.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_CHILD = Path(__file__).with_name("sandbox_child.py")
_START_S = 10.0
"""For the interpreter to start on a busy machine, beside the test's own time."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one test."""

    time_s: float = 5.0
    """Of the clock, from when the code starts; rounded up, of the processor."""
    memory_mb: int = 512
    """Address space."""
    file_mb: int = 8
    """Of each file that is written."""


def passes(code: str, test: str, limits: Limits) -> bool:
    """Whether code, followed by a test, runs to the end without an error and within the limits.

    Raises:
        RuntimeError: the system has no such limits (Windows).
    """
    if os.name != "posix":
        raise RuntimeError("limits for code need a POSIX system; leave reward 'code' out, or use Linux")
    proof = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="twofold-code-") as folder:
        order = {
            "code": code,
            "test": test,
            "proof": proof,
            "time_s": limits.time_s,
            "memory_mb": limits.memory_mb,
            "file_mb": limits.file_mb,
            "folder": os.path.realpath(folder),
        }
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_CHILD)],
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(json.dumps(order).encode(), timeout=_START_S + limits.time_s)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)
    # That the code ended says nothing: it could have called os._exit(0).
    return said == proof.encode()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all that is still in its session's group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
