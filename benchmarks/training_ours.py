"""Our side of the training benchmark: everything that knows how a run of twofold is started and what it reports."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twofold.config.data import DataConfig, ObjectiveConfig, SourceConfig
from twofold.config.recipe import OptimizerConfig, ScheduleConfig, TrainSettings
from twofold.data import Batch
from twofold.models import EncoderDecoder
from twofold.train import evaluate, fit
from twofold.train.callbacks import Callback
from twofold.train.run import build_loaders
from twofold.train.step import LossModule, StepResult

LEARNING_RATE = 1e-5


def supervised_data(
    pool: Path, source_length: int, target_length: int, rows_per_batch: int, **changes: Any
) -> DataConfig:
    """Packed rows of a file of pairs."""
    return DataConfig(
        sources=(SourceConfig(path=str(pool), prompt_field="prompt", completion_field="completion"),),
        objective=ObjectiveConfig(name="supervised"),
        source_length=source_length,
        target_length=target_length,
        rows_per_batch=rows_per_batch,
        **changes,
    )


def pretraining_data(corpus: Path, source_length: int, target_length: int, rows_per_batch: int) -> DataConfig:
    """Packed rows of PrefixLM."""
    return DataConfig(
        sources=(SourceConfig(path=str(corpus)),),
        source_length=source_length,
        target_length=target_length,
        rows_per_batch=rows_per_batch,
    )


def settings(device: str, precision: str, warmup_steps: int, measured_steps: int) -> TrainSettings:
    """AdamW on all parameters, clipping at 1.0."""
    return TrainSettings(
        steps=warmup_steps + measured_steps + 1,  # the last one would save the model
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
        schedule=ScheduleConfig(decay="constant"),
        max_grad_norm=1.0,
        precision=precision,  # type: ignore[arg-type]
        tensorboard=False,
        device=device,  # type: ignore[arg-type]
    )


class Enough(Exception):
    """All steps are measured."""


class Meter(Callback):
    """Time and real tokens of the steps after the warm-up, from the end of one step to the end of the next."""

    def __init__(self, warmup_steps: int, measured_steps: int) -> None:
        self._first, self._last = warmup_steps, warmup_steps + measured_steps
        self.results: list[StepResult] = []
        self.seconds = 0.0

    def on_step(self, step: int, result: StepResult) -> None:
        if step == self._first:
            synchronise()
            self._started = time.perf_counter()
        elif step > self._first:
            self.results.append(result)
        if step == self._last:
            synchronise()
            self.seconds = time.perf_counter() - self._started
            raise Enough


class Counted:
    """A training loader that remembers how many positions, padding included, its batches have had."""

    num_streams = 1

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.positions: list[int] = []

    def next_step(self) -> list[Batch]:
        batches: list[Batch] = self._loader.next_step()
        self.positions.append(sum(batch.input_ids.numel() + batch.labels.numel() for batch in batches))
        return batches

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._loader.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._loader.load_state_dict(state)


class RandomBatches:
    """One row of random ids, again and again: one example of the given lengths in each batch."""

    num_streams = 1

    def __init__(self, vocab_size: int, source_length: int, target_length: int) -> None:
        random = torch.Generator().manual_seed(0)

        def ids(length: int) -> Tensor:
            return torch.randint(3, vocab_size, (1, length), generator=random)

        self._batch = Batch(
            input_ids=ids(source_length),
            segment_ids=torch.ones(1, source_length, dtype=torch.int64),
            decoder_input_ids=ids(target_length),
            decoder_segment_ids=torch.ones(1, target_length, dtype=torch.int64),
            labels=ids(target_length),
        )

    def next_step(self) -> list[Batch]:
        return [self._batch]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def measure(
    model: EncoderDecoder, loader: Any, *, device: str, precision: str, warmup_steps: int, measured_steps: int
) -> dict[str, float]:
    """Run `fit` for some steps, and stop it before it writes the model.

    Returns:
        tokens_per_s, real tokens, positions with padding, seconds and loss of the measured steps.
    """
    meter, counted = Meter(warmup_steps, measured_steps), Counted(loader)
    with tempfile.TemporaryDirectory() as folder:
        chosen = settings(device, precision, warmup_steps, measured_steps)
        with suppress(Enough):
            fit(model, counted, None, chosen, Path(folder) / "run", [meter])
    real_tokens = sum(result.real_tokens for result in meter.results)
    positions = sum(counted.positions[warmup_steps : warmup_steps + measured_steps])
    return {
        "tokens_per_s": real_tokens / meter.seconds,
        "real_tokens": real_tokens,
        "positions": positions,
        "seconds": meter.seconds,
        "steps": measured_steps,
        "last_loss": meter.results[-1].loss,
    }


def pool_loader(model: EncoderDecoder, data: DataConfig) -> Any:
    """The training loader of a run on this data."""
    return build_loaders(data, model)[0]


def pool_loss(model: EncoderDecoder, data: DataConfig) -> dict[str, float]:
    """Mean loss in float32 over all pairs of a pool, packed, and the counts of their tokens."""
    loader = pool_loader(model, data)
    counts = {"real_tokens": 0}

    def counted() -> Iterator[Batch]:
        for batch in loader.one_pass():
            counts["real_tokens"] += batch.num_real_tokens
            yield batch

    found = evaluate(LossModule(model), counted())
    return {"loss": found.loss, "scored_tokens": found.scored_tokens, **counts}


def synchronise() -> None:
    """Wait for the GPU, where there is one in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
