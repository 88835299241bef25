"""How a model becomes an engine, written down: other processes and machines open the same."""

from __future__ import annotations

from dataclasses import dataclass

from twofold.checkpoint.load import load
from twofold.infer import Engine
from twofold.infer.backends import BackendName, Precision
from twofold.models import EncoderDecoder


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """See `infer.Engine`; whoever opens it must be able to reach the model."""

    model: str
    """A folder or hub name."""
    skip_vision: bool = False
    """T5Gemma 2: load without its vision tower."""
    backend: BackendName = "auto"
    precision: Precision | None = None
    threads: int | None = None
    batch_size: int = 8

    def load(self) -> EncoderDecoder:
        """The model. Errors as of `checkpoint.load`."""
        return load(self.model, skip_vision=self.skip_vision)

    def engine(self, model: EncoderDecoder | None = None) -> Engine:
        """Over the model, loaded unless it is given. Errors as of `Engine`."""
        return Engine(
            model or self.load(),
            backend=self.backend,
            precision=self.precision,
            threads=self.threads,
            batch_size=self.batch_size,
        )
