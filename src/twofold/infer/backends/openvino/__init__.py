"""The CPU backend: OpenVINO for everything but the attention of decoding steps. Needs the extra `cpu`."""

from twofold.infer.backends.openvino.backend import OpenVinoBackend

__all__ = ["OpenVinoBackend"]
