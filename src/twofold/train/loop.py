"""The training loop: steps, evaluations, checkpoints, in a form that stops and goes on without a trace."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch

from twofold.checkpoint.save import save
from twofold.config.recipe import TrainSettings
from twofold.data import Batch
from twofold.models import EncoderDecoder
from twofold.train.blocks import checkpoint_activations, compile_blocks, restore_blocks
from twofold.train.callbacks import Callback, RunStart, TrainResult
from twofold.train.checkpointing import (
    TrainerState,
    changed_settings,
    latest_checkpoint,
    read_state,
    restore_checkpoint,
    save_checkpoint,
)
from twofold.train.evaluate import Evaluation, evaluate
from twofold.train.optimizer import cross_attention_names, new_optimizer, set_phase, trainable_parameters
from twofold.train.schedule import learning_rate_factor
from twofold.train.signals import StopRequest, stop_on_signals
from twofold.train.step import LossModule, TeacherOf, train_step
from twofold.train.trackers import LossPlot, MetricsFile, TensorBoardScalars

FREE_TO_CHANGE = frozenset(
    {
        "steps",
        "evaluate_every",
        "save_every",
        "log_every",
        "keep_checkpoints",
        "output",
        "tensorboard",
        "activation_checkpointing",
        "compile_blocks",
    }
)
"""Settings that a resumed run may change."""


class TrainLoader(Protocol):
    """Batches without end, with a state; `twofold.data.Loader` is one."""

    num_streams: int
    """Batches of one step, over all ranks."""

    def next_step(self) -> list[Batch]:
        """The batches of the next step that are this process's own."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        ...


class HeldOutLoader(Protocol):
    """The same batches each time; `twofold.data.Loader` is one."""

    def one_pass(self) -> Iterable[Batch]:
        """All of them, once."""
        ...


def fit(
    model: EncoderDecoder,
    train_loader: TrainLoader,
    held_out_loader: HeldOutLoader | None,
    settings: TrainSettings,
    output: str | Path,
    callbacks: Sequence[Callback] = (),
    *,
    resume: bool = False,
    teacher: TeacherOf | None = None,
    teacher_share: float = 1.0,
) -> TrainResult:
    """Train a model that is in memory.

    Writes into `output`: metrics.jsonl, loss.png, tensorboard/, checkpoints/, and at the end model/. The
    first SIGTERM or SIGINT lets the current step end, saves a checkpoint and returns.

    Args:
        model: float32; trained in place, on the device of the settings, and left there in eval mode.
            Parameters without `requires_grad` stay as they are.
        train_loader: at its beginning.
        held_out_loader: None: nothing is evaluated.
        settings: how.
        output: a folder that does not exist or is empty, unless `resume`.
        callbacks: watchers.
        resume: go on from the newest checkpoint in `output`, as the run that never stopped: bit for bit on
            the CPU. Where `output` does not exist, the run begins.
        teacher: see `LossModule`.
        teacher_share: see `chunked_loss`.

    Raises:
        FileExistsError: there is something in `output` already.
        FileNotFoundError: `resume`, but `output` has no checkpoint.
        ValueError: settings that the model or the device does not allow, or, with `resume`, other settings
            than those of the checkpoint (`FREE_TO_CHANGE` may differ). Nothing has been written.
        NonFiniteError: a step's loss or gradient is not finite; see `train_step`.
    """
    output = Path(output)
    checkpoint = find_start(output, resume=resume)
    state = new_state(settings, checkpoint)
    trainer = Trainer(
        model, train_loader, held_out_loader, settings, output, state, callbacks, teacher, teacher_share
    )
    devices = [torch.cuda.current_device()] if trainer.device.type == "cuda" else []
    with torch.random.fork_rng(devices), ExitStack() as cleanup:
        cleanup.callback(model.eval)
        cleanup.callback(restore_blocks, model)
        cleanup.callback(set_phase, trainer.parameters, set(trainer.parameters))
        for callback in trainer.callbacks:
            cleanup.callback(callback.close)
        torch.manual_seed(settings.seed)
        if checkpoint is not None:
            restore_checkpoint(checkpoint, model, trainer.optimizer, trainer.parameters)
            train_loader.load_state_dict(state.loader)
        return trainer.run(cleanup.enter_context(stop_on_signals()), checkpoint)


def find_start(output: Path, *, resume: bool) -> Path | None:
    """The checkpoint a run goes on from, or None for one that begins.

    Raises:
        FileExistsError, FileNotFoundError: see `fit`.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not resume:
        raise FileExistsError(
            f"{output} exists and is not empty; resume the run in it (--resume), give another output, or "
            "remove it"
        )
    checkpoint = latest_checkpoint(output)
    if checkpoint is None:
        raise FileNotFoundError(
            f"{output} has no complete checkpoint to resume from; remove it, or give another output, and "
            "start anew"
        )
    return checkpoint


def new_state(settings: TrainSettings, checkpoint: Path | None) -> TrainerState:
    """The state at a run's beginning, or that of a checkpoint after a check that the settings are the same.

    Raises:
        ValueError: settings have changed (lists what), or the checkpoint is beyond the last step.
    """
    current = settings.model_dump(mode="json")
    if checkpoint is None:
        return TrainerState(step=0, settings=current)
    state = read_state(checkpoint)
    if changes := changed_settings(state.settings, current, free=FREE_TO_CHANGE):
        raise ValueError(
            f"the run in {checkpoint.parent.parent} was started with other settings: {'; '.join(changes)}. "
            f"Resume with the old ones (only {', '.join(sorted(FREE_TO_CHANGE))} may change), or start a new "
            "run in another output"
        )
    if state.step > settings.steps:
        raise ValueError(
            f"checkpoint {checkpoint} has done {state.step} steps, more than steps={settings.steps}; raise "
            "steps"
        )
    state.settings = current
    return state


class Trainer:
    """The parts of a run, and the loop over its steps. Made by `fit`, which also restores checkpoints."""

    def __init__(
        self,
        model: EncoderDecoder,
        train_loader: TrainLoader,
        held_out_loader: HeldOutLoader | None,
        settings: TrainSettings,
        output: Path,
        state: TrainerState,
        callbacks: Sequence[Callback],
        teacher: TeacherOf | None,
        teacher_share: float,
    ) -> None:
        if train_loader.num_streams != settings.accumulate_batches:
            raise ValueError(
                f"the loader gives {train_loader.num_streams} batches a step, accumulate_batches is "
                f"{settings.accumulate_batches}; make the loader with num_streams=accumulate_batches"
            )
        self.device = device_of(settings)
        self.model = model.to(self.device)
        checkpoint_activations(model, settings.activation_checkpointing)
        if settings.compile_blocks:
            compile_blocks(model)
        self.module = LossModule(self.model, settings.precision, teacher=teacher, teacher_share=teacher_share)
        self.parameters = trainable_parameters(model)
        self._everything = set(self.parameters)
        self._cross_attention: set[str] = set()
        if settings.cross_attention_warmup_steps:
            self._cross_attention = cross_attention_names(model, self.parameters)
        self.optimizer = new_optimizer(model, self.parameters, settings.optimizer)
        self._train_loader = train_loader
        self._held_out_loader = held_out_loader
        self._settings = settings
        self._output = output
        self._state = state
        self.callbacks = [
            MetricsFile(output / "metrics.jsonl", settings.log_every),
            LossPlot(output / "loss.png"),
        ]
        if settings.tensorboard:
            self.callbacks.append(TensorBoardScalars(output / "tensorboard", settings.log_every))
        self.callbacks += callbacks

    def run(self, stop: StopRequest, checkpoint: Path | None) -> TrainResult:
        """All steps that are left.

        Args:
            stop: looked at between steps.
            checkpoint: the one that was restored.
        """
        started = time.perf_counter()
        self._output.mkdir(parents=True, exist_ok=True)
        saved_step = None if checkpoint is None else self._state.step
        self._announce()
        while True:
            is_last = self._state.step == self._settings.steps
            if not stop.is_made and self._is_evaluation_due(is_last):
                self._evaluate()
            is_save_due = is_last or stop.is_made or self._is_due(self._settings.save_every)
            if is_save_due and saved_step != self._state.step:
                checkpoint, saved_step = self._save(), self._state.step
            if is_last or stop.is_made:
                break
            self._step()
        assert checkpoint is not None
        return self._finish(
            checkpoint, time.perf_counter() - started, is_finished=is_last and not stop.is_made
        )

    def _step(self) -> None:
        settings, step = self._settings, self._state.step + 1
        is_warmup = step <= settings.cross_attention_warmup_steps
        set_phase(self.parameters, self._cross_attention if is_warmup else self._everything)
        self.module.train()
        batches = self._train_loader.next_step()
        factor = learning_rate_factor(step, settings.schedule, settings.steps)
        result = train_step(
            self.module,
            self.optimizer,
            batches,
            step=step,
            learning_rate=settings.optimizer.learning_rate * factor,
            max_grad_norm=settings.max_grad_norm,
        )
        self._state.step = step
        self._state.losses.append(result.loss)
        self._state.tokens += result.real_tokens
        for callback in self.callbacks:
            callback.on_step(step, result)

    def _evaluate(self) -> None:
        assert self._held_out_loader is not None
        evaluation: Evaluation = evaluate(self.module, self._held_out_loader.one_pass())
        self._state.held_out.append((self._state.step, evaluation.loss))
        for callback in self.callbacks:
            callback.on_evaluation(self._state.step, evaluation)

    def _save(self) -> Path:
        self._state.loader = self._train_loader.state_dict()
        path = save_checkpoint(
            self._output,
            self.model,
            self.optimizer,
            self.parameters,
            self._state,
            keep=self._settings.keep_checkpoints,
        )
        for callback in self.callbacks:
            callback.on_checkpoint(self._state.step, path)
        return path

    def _finish(self, checkpoint: Path, seconds: float, *, is_finished: bool) -> TrainResult:
        model_path = None
        if is_finished:
            model_path = self._output / "model"
            save(
                self.model, model_path, overwrite=True
            )  # an older one is this run's own, from before `steps` grew
        result = TrainResult(
            output=self._output,
            step=self._state.step,
            is_finished=is_finished,
            losses=list(self._state.losses),
            held_out=list(self._state.held_out),
            tokens=self._state.tokens,
            seconds=seconds,
            model_path=model_path,
            checkpoint=checkpoint,
        )
        for callback in self.callbacks:
            callback.on_end(result)
        return result

    def _announce(self) -> None:
        run = RunStart(
            steps=self._settings.steps,
            first_step=self._state.step + 1,
            num_parameters=sum(p.numel() for p in self.model.parameters()),
            num_trainable=sum(p.numel() for p in self.parameters.values()),
            device=str(self.device),
            output=self._output,
        )
        for callback in self.callbacks:
            callback.on_start(run)

    def _is_due(self, every: int | None) -> bool:
        step = self._state.step
        return every is not None and step > 0 and step % every == 0

    def _is_evaluation_due(self, is_last: bool) -> bool:
        """Before the first step, after the last, and at the interval; once each, also where a stop came
        between."""
        done = bool(self._state.held_out) and self._state.held_out[-1][0] == self._state.step
        is_due = is_last or self._state.step == 0 or self._is_due(self._settings.evaluate_every)
        return self._held_out_loader is not None and is_due and not done


def device_of(settings: TrainSettings) -> torch.device:
    """The device a run uses.

    Raises:
        ValueError: CUDA is asked for and not there.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but PyTorch finds no CUDA device; set device to 'cpu' or 'auto'")
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(settings.device)
