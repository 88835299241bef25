"""The engine that writes answers while a model trains."""

from __future__ import annotations

import warnings
from typing import Literal, Self

from pydantic import Field, model_validator

from twofold.config.base import Config


class RolloutEngineConfig(Config):
    """How long answers are, and what runs the model."""

    max_new_tokens: int = Field(ge=1)
    """Of an answer, its stop token included; an answer without one by then is truncated."""

    temperature: float = Field(default=1.0, gt=0)
    """Of what is sampled from. Filters (top-k, top-p) are not offered, because what they sample from is another policy
    than the one that is trained."""

    backend: Literal["auto", "torch", "openvino"] = "auto"
    """`torch` runs the very parameters that are trained. `openvino` (CPU only) is compiled anew from them, in memory,
    before each rollout: seconds that pay where rollouts take longer. `auto`: `torch`."""

    precision: Literal["float32", "bfloat16", "int8", "int4"] | None = None
    """Of the engine, where it is another than the parameters': `torch` then runs a copy that is filled before each
    rollout. null: float32, the parameters themselves (with an adapter, a copy that has it merged)."""

    batch_size: int = Field(default=64, ge=1)
    """Answers that are written together; see `twofold.infer.Engine`."""

    cache_bytes: int | None = Field(default=None, ge=1)
    """Of keys and values; see `twofold.infer.Engine`."""

    @model_validator(mode="after")
    def _precision_is_offered(self) -> Self:
        if self.backend != "openvino" and self.precision in ("int8", "int4"):
            raise ValueError(
                f"precision {self.precision!r} is for backend 'openvino'; backend {self.backend!r} takes float32 or "
                "bfloat16"
            )
        if self.backend != "openvino" and self.precision == "float32":
            warnings.warn(
                "precision='float32' has no effect beside null: the parameters are float32", stacklevel=2
            )
        return self
