"""Which backend runs a model, and in what precision."""

from __future__ import annotations

import importlib.util
from typing import get_args

import torch

from twofold.infer.backends.base import Backend, BackendName, Precision
from twofold.infer.backends.torch_backend import TorchBackend
from twofold.models import EncoderDecoder

BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_NEEDED = ("openvino", "numba")
"""Packages of the extra `cpu`."""


def make_backend(
    model: EncoderDecoder,
    *,
    backend: BackendName = "auto",
    precision: Precision | None = None,
    threads: int | None = None,
) -> Backend:
    """What runs a model where it lies.

    Args:
        model: in evaluation mode, on its device.
        backend: `openvino` is for the CPU, and `auto` means it there if it is installed, else `torch`.
        precision: of weights and computation. None: the model's own dtype. With `torch`, `float32` and `bfloat16` are
            what the model is converted to, in place.
        threads: of the processor. None: one for each core.

    Raises:
        ValueError: an unknown name, or a combination that is not available; the message says what is.
        ImportError: `openvino` without its packages.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; use one of {', '.join(BACKENDS)}")
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; use one of {', '.join(PRECISIONS)}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    weight = model.lm_head.out_proj.weight
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if backend == "auto":
        backend = "openvino" if weight.device.type == "cpu" and not missing else "torch"
        if backend == "torch" and precision in ("int8", "int4") and weight.device.type == "cpu":
            backend = "openvino"  # and say what is missing
    precision = precision or _own_precision(weight.dtype)
    if backend == "openvino":
        return _openvino(model, precision, threads, missing)
    if precision not in ("float32", "bfloat16"):
        raise ValueError(
            f"the torch backend runs float32 and bfloat16, got precision={precision!r}; use one of these, or "
            "backend='openvino' on the CPU"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    return TorchBackend(model.to(getattr(torch, precision)))


def _openvino(
    model: EncoderDecoder, precision: Precision, threads: int | None, missing: list[str]
) -> Backend:
    device = model.lm_head.out_proj.weight.device
    if device.type != "cpu":
        raise ValueError(
            f"the openvino backend runs on the CPU, and the model is on {device}; pass device='cpu', or use "
            "backend='torch'"
        )
    if missing:
        raise ImportError(
            f"the openvino backend needs {' and '.join(missing)}; pip install 'twofold[cpu]', or use backend='torch'"
        )
    from twofold.infer.backends.openvino.backend import OpenVinoBackend

    return OpenVinoBackend(model, precision, threads)


def _own_precision(dtype: torch.dtype) -> Precision:
    name = str(dtype).removeprefix("torch.")
    if name not in ("float32", "bfloat16"):
        raise ValueError(
            f"the model's weights are {name}, which no backend runs; pass precision='bfloat16' or 'float32'"
        )
    found: Precision = "float32" if name == "float32" else "bfloat16"
    return found
