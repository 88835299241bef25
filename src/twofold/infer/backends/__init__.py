"""What runs the model for the engine: `base.Backend` says what the engine asks of one."""

from twofold.infer.backends.base import Backend, BackendName, Held, Precision, Start
from twofold.infer.backends.choose import BACKENDS, PRECISIONS, make_backend
from twofold.infer.backends.paged import PagedBackend
from twofold.infer.backends.torch_backend import TorchBackend

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "Backend",
    "BackendName",
    "Held",
    "PagedBackend",
    "Precision",
    "Start",
    "TorchBackend",
    "make_backend",
]
