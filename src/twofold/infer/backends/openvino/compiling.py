"""From a graph to what runs it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openvino as ov


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
