"""Graphs compiled side by side, and what OpenVINO's compiler leaves behind in the thread that calls it."""

import subprocess
import sys
import threading

import numpy as np
import openvino.opset15 as op
import pytest
import torch
from torch import nn

from twofold.infer.backends.openvino import compiling
from twofold.infer.backends.openvino.compiling import Compiler
from twofold.infer.backends.openvino.lower import Lowering, model_of, parameter

CODE = """
import openvino as ov
from twofold.infer.backends.openvino.compiling import compile_graph, signal_stack
from twofold.infer.backends.openvino.lower import Lowering, model_of, parameter
from torch import nn

x = parameter("x", [-1, 1, 8])
graph = model_of([Lowering().linear(nn.Linear(8, 8), x)], [x], "linear")
before = signal_stack()
compiled = compile_graph(ov.Core(), graph, {"INFERENCE_NUM_THREADS": 1})
after = signal_stack()
assert (after.pointer, after.flags, after.size) == (before.pointer, before.flags, before.size)
"""


def plus(number):
    x = parameter("x", [2])
    return model_of([op.add(x, np.float32(number))], [x], "plus")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="signal stacks as Linux has them")
def test_the_stack_for_signal_handlers_stays():
    """In a process of its own, where nothing has been compiled yet; with one thread, which then is the calling one."""
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_graphs_are_compiled_side_by_side(monkeypatch):
    """Two at a time: neither is done before the other has begun."""
    both, compile_graph = threading.Barrier(2, timeout=30), compiling.compile_graph

    def meeting(*arguments):
        both.wait()
        return compile_graph(*arguments)

    monkeypatch.setattr(compiling, "compile_graph", meeting)
    with Compiler({}, threads=2) as compiler:
        compiled = [compiler(plus(number)) for number in range(4)]
    assert [model.result()(np.zeros(2, np.float32))[0].tolist() for model in compiled] == [
        [number] * 2 for number in range(4)
    ]


def test_a_graph_that_does_not_compile_ends_the_context():
    with pytest.raises(RuntimeError, match="NO_SUCH_SETTING"), Compiler({"NO_SUCH_SETTING": "1"}) as compiler:
        compiler(plus(1))


def test_an_error_beside_the_compiler_is_the_one_that_is_seen():
    def make():
        with Compiler({"NO_SUCH_SETTING": "1"}) as compiler:
            compiler(plus(1))
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_matrices_are_not_copied_into_graphs(dtype):
    """Those that are float32, and nothing else: a norm's weight may be computed, and is small."""
    linear = nn.Linear(3, 2).to(dtype)
    node = Lowering().linear(linear, parameter("x", [-1, 1, 3]))
    matrix = node.input_value(0).get_node().input_value(1).get_node()
    bias = node.input_value(1).get_node()
    assert np.array_equal(matrix.data, linear.weight.detach().float().numpy())
    is_shared = matrix.data.ctypes.data == linear.weight.data_ptr()
    assert is_shared == (dtype == torch.float32)
    assert bias.data.ctypes.data != linear.bias.data_ptr()
