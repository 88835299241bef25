"""What runs the model for the engine: `base.Backend` says what the engine asks of one."""

from twofold.infer.backends.base import Backend, Held, Start
from twofold.infer.backends.torch_backend import TorchBackend

__all__ = ["Backend", "Held", "Start", "TorchBackend"]
