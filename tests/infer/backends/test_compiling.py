"""Signals after OpenVINO has compiled something."""

import signal
import sys
import textwrap
from subprocess import run

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the stack for signal handlers is Linux's")
def test_a_signal_after_compiling_reaches_its_handler():
    """In a process of its own, which would die of it; several engines, so that memory is used again."""
    code = """
        import signal
        from tests.models.tiny import build, pair_config, stack
        from twofold.infer import Engine
        for _ in range(3):
            Engine(build(pair_config(stack())), backend="openvino")
        seen = []
        signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
        signal.raise_signal(signal.SIGTERM)
        print(seen)
    """
    found = run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == f"[{int(signal.SIGTERM)}]"
