"""From graphs to what runs them."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import openvino as ov


class Compiler:
    """Compiles graphs side by side, while others are being made: OpenVINO takes one thread for each.

    A context; at its end all that was asked for is there, or the error that kept a graph from it is raised.

    Args:
        settings: of OpenVINO's CPU plugin.
        threads: that compile. None: as many as there are cores.
    """

    def __init__(self, settings: dict[str, Any], threads: int | None = None) -> None:
        self._core, self._settings = ov.Core(), settings
        self._pool = ThreadPoolExecutor(threads or os.cpu_count(), "twofold-compile")
        self._asked: list[Future[Any]] = []

    def __call__(self, graph: ov.Model) -> Future[Any]:
        """Will be what runs the graph."""
        self._asked.append(self._pool.submit(compile_graph, self._core, graph, self._settings))
        return self._asked[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=error is not None)
        if error is None:
            for compiled in self._asked:
                compiled.result()


def compile_graph(core: ov.Core, graph: Any, settings: dict[str, Any]) -> Any:
    """Compile a graph, or a file of one, for the CPU."""
    with kept_signal_stack():
        return core.compile_model(graph, "CPU", settings)


class SignalStack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Leave the thread with the stack for signal handlers that it had.

    OpenVINO 2026.4 puts one of its own in place when it compiles for one thread: the next Ctrl-C or SIGTERM, whose
    Python handlers ask for that stack, ended the test suite with a segmentation fault.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    before = signal_stack()
    try:
        yield
    finally:
        ctypes.CDLL(None).sigaltstack(ctypes.byref(before), None)


def signal_stack() -> SignalStack:
    """The calling thread's, on Linux."""
    found = SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
    return found
