"""The process that `sandbox` starts: puts itself under limits, runs code and a test, and says the proof if they passed.

Run as a script, in isolated mode; imports nothing of twofold.
"""

import ctypes
import json
import math
import os
import resource
import signal
import sys
from typing import Any

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_REFUSED = (
    "socket.",
    "subprocess.",
    "ctypes.",
    "os.fork",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.kill",
    "os.putenv",
    "pty.",
    "webbrowser.",
    "urllib.",
    "ftplib.",
    "smtplib.",
)
_CHANGES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.utime",
    "os.setxattr",
    "shutil.",
)
"""Whose first arguments are paths that would be changed."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    order = json.loads(sys.stdin.buffer.read())
    out = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    _leave_network()
    _limit(order)
    sys.addaudithook(_hook_for(order["folder"]))
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(order["code"], "answer.py", "exec"), scope)
    exec(compile(order["test"], "test.py", "exec"), scope)
    os.write(out, order["proof"].encode())


def _leave_network() -> None:
    """A namespace without network, where the system allows one."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if libc.unshare(_CLONE_NEWNET) != 0:
        libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def _limit(order: dict[str, Any]) -> None:
    signal.setitimer(signal.ITIMER_REAL, order["time_s"])  # SIGALRM ends the process
    megabyte = 2**20
    wanted = {
        "RLIMIT_CPU": math.ceil(order["time_s"]),
        "RLIMIT_AS": order["memory_mb"] * megabyte,
        "RLIMIT_FSIZE": order["file_mb"] * megabyte,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 0,
        "RLIMIT_CORE": 0,
    }
    for name, value in wanted.items():
        if hasattr(resource, name):
            resource.setrlimit(getattr(resource, name), (value, value))


def _hook_for(folder: str) -> Any:
    inside = folder.rstrip(os.sep) + os.sep
    real = os.path.realpath

    def is_inside(path: Any) -> bool:
        return (
            isinstance(path, int) or path is None or real(os.fsdecode(path)).startswith((inside, os.devnull))
        )

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_REFUSED):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open" and arguments[2] & _WRITES and not is_inside(arguments[0]):
            raise PermissionError("files are written in the current folder only")
        if event.startswith(_CHANGES):
            paths = [a for a in arguments[:2] if isinstance(a, (str, bytes, os.PathLike))]
            if not all(map(is_inside, paths)):
                raise PermissionError("files are changed in the current folder only")

    return hook


if __name__ == "__main__":
    main()
