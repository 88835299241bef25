"""What OpenVINO's compiler leaves behind in the thread that calls it."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="signal stacks as Linux has them"
)

CODE = """
from tests.models.tiny import build, pair_config, stack
from twofold.infer import Engine
from twofold.infer.backends.openvino.compiling import signal_stack

before = signal_stack()
engine = Engine(build(pair_config(stack())), backend="openvino", threads=1)
after = signal_stack()
assert (after.pointer, after.flags, after.size) == (before.pointer, before.flags, before.size)
"""


def test_the_stack_for_signal_handlers_stays():
    """In a process of its own, where nothing has been compiled yet; with one thread, which then is the calling one."""
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
