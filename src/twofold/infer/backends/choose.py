"""Which backend runs a model, and in what precision."""

from __future__ import annotations

import importlib.util
from typing import get_args

import torch

from twofold.infer.backends.base import Backend, BackendName, Precision
from twofold.infer.backends.paged import PagedBackend
from twofold.infer.backends.torch_backend import TorchBackend
from twofold.infer.backends.weight_only import quantise
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
    cache_bytes: int | None = None,
) -> Backend:
    """What runs a model where it lies.

    Args:
        model: in evaluation mode, on its device.
        backend: `openvino` is for the CPU, and `auto` means it there if it is installed, else `torch`. That is the
            model's own modules: on CUDA with graphs, see `PagedBackend`, elsewhere as they are.
        precision: of weights and computation. None: the model's own dtype. With `torch` the model is converted to it,
            in place; `int8` and `int4`, for CUDA only, are weights beside computation in bfloat16.
        threads: of the processor. None: one for each core.
        cache_bytes: keys and values that will be held together at most, where that is known.

    Raises:
        ValueError: an unknown name, or a combination that is not available; the message says what is.
        ImportError: `openvino`, or weights in int8 or int4 on CUDA, without their packages.
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
    if threads is not None:
        torch.set_num_threads(threads)
    if weight.device.type == "cuda":
        return _cuda(model, precision, cache_bytes)
    if precision not in ("float32", "bfloat16"):
        raise ValueError(
            f"the torch backend runs float32 and bfloat16, got precision={precision!r}; use one of these, or "
            "backend='openvino' on the CPU; on CUDA it has int8 and int4 too"
        )
    return TorchBackend(model.to(getattr(torch, precision)))


def _cuda(model: EncoderDecoder, precision: Precision, cache_bytes: int | None) -> Backend:
    if precision == "int8" or precision == "int4":
        quantise(model.to(torch.bfloat16), precision)
    else:
        model.to(getattr(torch, precision))
    # Only a compiled product reads int8 as it goes: an eager one first writes the matrix out in bfloat16.
    return PagedBackend(model, cache_bytes=cache_bytes, compiles=precision == "int8")


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
