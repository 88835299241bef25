"""What OpenVINO's compiler leaves behind in the thread that calls it."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="signal stacks as Linux has them"
)

CODE = """
import ctypes
from tests.models.tiny import build, pair_config, stack
from twofold.infer import Engine

class SignalStack(ctypes.Structure):
    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

def signal_stack():
    found = SignalStack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
    return found.pointer, found.flags, found.size

before = signal_stack()
engine = Engine(build(pair_config(stack())), backend="openvino", threads=1)
assert signal_stack() == before
"""


def test_the_stack_for_signal_handlers_stays():
    """In a process of its own, where nothing has been compiled yet; with one thread, which then is the calling one."""
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
