"""Which backend runs a model, and what cannot be had."""

import importlib.util

import pytest
import torch

from tests.models.tiny import build, pair_config, stack
from twofold.infer.backends import TorchBackend, make_backend
from twofold.infer.backends.openvino.backend import OpenVinoBackend


@pytest.fixture
def model():
    return build(pair_config(stack()))


@pytest.fixture
def without_openvino(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))


def test_on_the_cpu_openvino_where_it_is_installed(model):
    assert isinstance(make_backend(model), OpenVinoBackend)
    assert isinstance(make_backend(model, backend="torch"), TorchBackend)


def test_without_openvino_pytorch_runs_what_it_can(model, without_openvino):
    assert isinstance(make_backend(model), TorchBackend)
    for settings in ({"backend": "openvino"}, {"precision": "int8"}):
        with pytest.raises(ImportError, match=r"needs openvino; pip install 'twofold\[cpu\]'"):
            make_backend(model, **settings)


def test_precision_is_the_models_own_unless_asked_for(model):
    assert make_backend(model)._layout.dtype == "float32"
    assert make_backend(model, precision="int4")._layout.dtype == "int8"
    assert make_backend(model.bfloat16())._layout.dtype == "bfloat16"
    assert make_backend(model, backend="torch").model.lm_head.out_proj.weight.dtype == torch.bfloat16
    make_backend(model, backend="torch", precision="float32")
    assert model.lm_head.out_proj.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "jax"}, "unknown backend 'jax'; use one of auto, torch, openvino"),
        ({"precision": "float8"}, "unknown precision 'float8'; use one of float32, bfloat16, int8, int4"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"backend": "torch", "precision": "int8"}, "runs float32 and bfloat16, got precision='int8'"),
    ],
)
def test_what_cannot_be_had(model, settings, message):
    with pytest.raises(ValueError, match=message):
        make_backend(model, **settings)


def test_half_precision_is_refused(model):
    with pytest.raises(
        ValueError, match=r"weights are float16, which no backend runs; pass precision='bfloat16'"
    ):
        make_backend(model.half())


def test_a_model_elsewhere(model):
    with pytest.raises(ValueError, match="runs on the CPU, and the model is on meta"):
        make_backend(model.to("meta"), backend="openvino")
