"""The training loop: steps, evaluations, checkpoints, in a form that stops and goes on without a trace."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from twofold.config.history import History
from twofold.config.recipe import Run, TrainSettings
from twofold.data import Batch
from twofold.models import EncoderModel
from twofold.train.adapters import add_adapter, has_adapter, save_adapter
from twofold.train.averaging import AverageWeights, average_checkpoints
from twofold.train.blocks import checkpoint_activations, compile_blocks, restore_blocks
from twofold.train.callbacks import Callback, RunStart, TrainResult
from twofold.train.checkpointing import (
    CheckpointSaver,
    TrainerState,
    changed_settings,
    last_checkpoints,
    latest_checkpoint,
    parameters_kept,
    read_state,
    restore_checkpoint,
    save_model,
)
from twofold.train.evaluate import Evaluation, evaluate
from twofold.train.opening import Masks, Opening
from twofold.train.optimizer import cross_attention_names, new_optimizer, set_phase, trainable_parameters
from twofold.train.parallel import shard
from twofold.train.phase import history_before, training_phase
from twofold.train.samples import Sampler
from twofold.train.schedule import learning_rate_factor
from twofold.train.signals import StopRequest, stop_on_signals
from twofold.train.step import LossModule, Objective, Precision, train_step
from twofold.train.stopping import Best, check_stopping, judge, metric_of
from twofold.train.trackers import LossPlot, MetricsFile, SamplesFile, TensorBoardScalars
from twofold.train.world import OtherRankError, World, is_lost_rank, start_world

FREE_TO_CHANGE = frozenset(
    {
        "steps",
        "evaluate_every",
        "save_every",
        "log_every",
        "samples",
        "keep_checkpoints",
        "average_last",
        "output",
        "tensorboard",
        "activation_checkpointing",
        "compile_blocks",
        "data_parallel_replicas",
        "reduce_every_batch",
        "collective_timeout_s",
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
        """JSON-able, with the states of its own streams by number under "streams"."""
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
    model: EncoderModel,
    train_loader: TrainLoader,
    held_out_loader: HeldOutLoader | None,
    settings: TrainSettings,
    output: str | Path,
    callbacks: Sequence[Callback] = (),
    *,
    resume: bool = False,
    world: World | None = None,
    objective: Callable[[Any, Precision], Objective[Any]] = LossModule,
) -> TrainResult:
    """Train a model that is in memory.

    Writes into `output`: metrics.jsonl, loss.png, tensorboard/, checkpoints/, and at the end model/, with model-ema/,
    model-average/, model-best/ and samples.jsonl where the settings ask for them; with an adapter also adapter/ and
    adapter-ema/. The first SIGTERM or SIGINT, on any rank, lets the current step end, saves a checkpoint and returns.

    Args:
        model: float32; trained in place, on the device of the settings, and left there in eval mode.
            Parameters without `requires_grad` stay as they are. With several ranks rank 0's weights count, the
            others' model may be on the meta device, and all are left sharded: `model_path` holds the whole one.
        train_loader: at its beginning, with this rank's streams (`World.streams`).
        held_out_loader: the same on every rank. None: nothing is evaluated.
        settings: how.
        output: a folder that does not exist or is empty, unless `resume`. Every rank sees the same folder.
        callbacks: watchers, called on the rank they are given to; checkpoints are announced on rank 0.
        resume: go on from the newest checkpoint in `output`, as the run that never stopped: bit for bit on
            the CPU with the same number of ranks. Where `output` does not exist, the run begins. With an adapter,
            `model` must be the one the run began with: checkpoints do not hold it.
        world: the processes of the run, where the caller has started it. None: `start_world`.
        objective: makes what a step minimises, of the model and the settings' precision. Default: the likelihood of
            the labels; `functools.partial(LossModule, teacher=...)`: what a teacher says. Other models than an
            `EncoderDecoder` need one of their own.

    Raises:
        FileExistsError: there is something in `output` already.
        FileNotFoundError: `resume`, but `output` has no checkpoint.
        ValueError: settings that the model, the device or the number of ranks does not allow, or, with `resume`,
            other settings than those of the checkpoint (`FREE_TO_CHANGE` may differ). Nothing has been written.
        NonFiniteError: a step's loss or gradient is not finite; see `train_step`.
        CheckpointError: a checkpoint could not be written.
        OtherRankError: another rank failed.
    """
    output = Path(output)
    with (
        start_world(settings) if world is None else nullcontext(world) as world,
        torch.random.fork_rng([world.device] if world.device.type == "cuda" else []),
        ExitStack() as cleanup,
    ):
        checkpoint = world.from_main(lambda: find_start(output, resume=resume))
        state = new_state(settings, checkpoint)
        before = history_before(model, checkpoint)
        if settings.adapter is not None:
            add_adapter(model, settings.adapter, seed=settings.seed, base=_base_of(settings))
        module = objective(model, settings.precision)
        trainer = Trainer(
            module, train_loader, held_out_loader, settings, output, state, callbacks, world, before
        )
        cleanup.callback(model.eval)
        cleanup.callback(restore_blocks, model)
        cleanup.callback(set_phase, trainer.parameters, set(trainer.parameters))
        for callback in trainer.callbacks:
            cleanup.callback(callback.close)
        if checkpoint is not None:
            averages = None if trainer.average is None else trainer.average.tensors
            restore_checkpoint(
                checkpoint, model, trainer.optimizer, trainer.parameters, state, world, averages
            )
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


def _base_of(settings: TrainSettings) -> str | None:
    """The model's checkpoint, where a recipe names one."""
    path = settings.model.path if isinstance(settings, Run) else None
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


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
        module: Objective[Any],
        train_loader: TrainLoader,
        held_out_loader: HeldOutLoader | None,
        settings: TrainSettings,
        output: Path,
        state: TrainerState,
        callbacks: Sequence[Callback],
        world: World,
        before: History,
    ) -> None:
        """`before`: what was done to the model before this run, for its card. The others are as for `fit`."""
        if train_loader.num_streams != settings.accumulate_batches:
            raise ValueError(
                f"the loader gives {train_loader.num_streams} batches a step, accumulate_batches is "
                f"{settings.accumulate_batches}; make the loader with num_streams=accumulate_batches"
            )
        world.check_batches(settings.accumulate_batches)
        model = module.model
        trainable_parameters(model)  # before the model is touched
        if settings.early_stopping is not None:
            told = ["loss", *module.reported(dict.fromkeys(module.metric_names, 0.0))]
            check_stopping(settings.early_stopping, told, has_held_out=held_out_loader is not None)
        self._sampler: Sampler | None = None
        if settings.samples is not None:
            held_out = () if held_out_loader is None else held_out_loader.one_pass()
            self._sampler = Sampler(model, held_out, settings.samples, world)
        self._world = world
        self.module = module
        self.model = model if world.size > 1 else model.to(world.device)
        checkpoint_activations(model, settings.activation_checkpointing)
        if settings.compile_blocks:
            compile_blocks(model)
        if world.size > 1:
            shard(self.module, model, world, precision=settings.precision)
        self.parameters = trainable_parameters(model)
        self._everything = set(self.parameters)
        self._cross_attention: set[str] = set()
        if settings.cross_attention_warmup_steps:
            self._cross_attention = cross_attention_names(model, self.parameters)
        self.optimizer = new_optimizer(model, self.parameters, settings.optimizer)
        self._opening: Opening | None = None
        if settings.opening is not None:
            # A checkpoint's config has the masks of its step, not those the run began with.
            first = Masks.of(model) if state.first_masks is None else Masks(**state.first_masks)
            state.first_masks = asdict(first)
            self._opening = Opening(settings.opening, first, settings.seed)
        self.average: AverageWeights | None = None
        if settings.ema_decay is not None:
            self.average = AverageWeights(parameters_kept(model, self.parameters), settings.ema_decay)
        self._train_loader = train_loader
        self._held_out_loader = held_out_loader
        self._settings = settings
        self._output = output
        self._state = state
        self._before = before
        self._saver = CheckpointSaver(output, world, keep=settings.keep_checkpoints)
        self.callbacks: list[Callback] = []
        if world.is_main:
            self.callbacks += [
                MetricsFile(output / "metrics.jsonl", settings.log_every),
                LossPlot(output / "loss.png"),
            ]
            if settings.samples is not None:
                self.callbacks.append(SamplesFile(output / "samples.jsonl"))
            if settings.tensorboard:
                self.callbacks.append(TensorBoardScalars(output / "tensorboard", settings.log_every))
        self.callbacks += callbacks

    def run(self, stop: StopRequest, checkpoint: Path | None) -> TrainResult:
        """All steps that are left.

        Args:
            stop: looked at between steps; asked for on one rank, it stops all.
            checkpoint: the one that was restored.

        Raises:
            OtherRankError: another rank failed. An error of this rank is raised as it is, with a note of where.
        """
        try:
            return self._run(stop, checkpoint)
        except BaseException as error:
            self._saver.abandon()
            if self._world.size == 1 or isinstance(error, OtherRankError):
                raise
            place = f"rank {self._world.rank}, after step {self._state.step}"
            if is_lost_rank(error):
                raise OtherRankError(
                    f"{place}: stopped, because another rank failed or does not answer"
                ) from None
            error.add_note(place)
            raise

    def _run(self, stop: StopRequest, checkpoint: Path | None) -> TrainResult:
        started = time.perf_counter()
        if self._world.is_main:
            self._output.mkdir(parents=True, exist_ok=True)
        saved_step = None if checkpoint is None else self._state.step
        self._set_masks()
        self._announce()
        while True:
            is_last = self._state.step == self._settings.steps or self._is_out_of_patience
            is_stopping, has_failed, is_writing = self._world.any(
                stop.is_made, self._saver.has_failed, self._saver.is_writing
            )
            if has_failed or not is_writing:
                self._await_save()
            if not is_stopping and self._is_evaluation_due(is_last):
                self._evaluate()
                is_last = is_last or self._is_out_of_patience
            is_save_due = is_last or is_stopping or self._is_due(self._settings.save_every)
            if is_save_due and saved_step != self._state.step:
                checkpoint, saved_step = self._save(), self._state.step
            if is_last or is_stopping:
                break
            self._step()
        self._await_save()
        assert checkpoint is not None
        return self._finish(
            checkpoint, time.perf_counter() - started, is_finished=is_last and not is_stopping
        )

    def _step(self) -> None:
        settings, step, started = self._settings, self._state.step + 1, time.perf_counter()
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
            seed=settings.seed,
            world=self._world,
            reduce_every_batch=settings.reduce_every_batch,
            opening=self._opening,
        )
        if self.average is not None:
            self.average.update()
        # With what came before the update: waiting for data, or writing it.
        result = replace(result, seconds=time.perf_counter() - started)
        self._state.step = step
        self._set_masks()
        self._state.losses.append(result.loss)
        self._state.reports["train"] = {"loss": result.loss, **result.metrics}
        self._state.tokens += result.real_tokens
        for callback in self.callbacks:
            callback.on_step(step, result)

    def _set_masks(self) -> None:
        """What evaluations and checkpoints see after the steps so far."""
        if self._opening is not None:
            self._opening.after(self._state.step).apply(self.model)

    def _evaluate(self) -> None:
        assert self._held_out_loader is not None
        evaluation: Evaluation = evaluate(self.module, self._held_out_loader.one_pass(), self._world)
        self._state.held_out.append((self._state.step, evaluation.loss))
        self._state.reports["held_out"] = {"loss": evaluation.loss, **evaluation.metrics}
        for callback in self.callbacks:
            callback.on_evaluation(self._state.step, evaluation)
        self._judge(evaluation)
        if self.average is not None:
            with self.average.swapped():
                evaluation = evaluate(self.module, self._held_out_loader.one_pass(), self._world)
            self._state.reports["held_out_average"] = {"loss": evaluation.loss, **evaluation.metrics}
            for callback in self.callbacks:
                callback.on_average_evaluation(self._state.step, evaluation)
        if self._sampler is not None:
            samples = self._sampler.answer()
            for callback in self.callbacks if self._world.is_main else ():
                callback.on_samples(self._state.step, samples)

    def _judge(self, evaluation: Evaluation) -> None:
        """Keep the weights where no evaluation was better."""
        config, step = self._settings.early_stopping, self._state.step
        if config is None:
            return
        best = judge(self._best, config, step, metric_of(evaluation, config.metric))
        self._state.best = asdict(best)
        if best.step == step:
            self._write("-best")

    @property
    def _best(self) -> Best | None:
        return None if self._state.best is None else Best(**self._state.best)

    @property
    def _is_out_of_patience(self) -> bool:
        config, best = self._settings.early_stopping, self._best
        return config is not None and best is not None and best.num_since >= config.patience

    def _save(self) -> Path:
        """Begin a checkpoint; it is complete after `_await_save`."""
        self._await_save()
        averages = None if self.average is None else self.average.tensors
        self._write_history("last")
        return self._saver.start(self.model, self.optimizer, self.parameters, self._state, averages)

    def _await_save(self) -> None:
        path = self._saver.wait()
        if path is not None and self._world.is_main:
            for callback in self.callbacks:
                callback.on_checkpoint(int(path.name.removeprefix("step-")), path)

    def _finish(self, checkpoint: Path, seconds: float, *, is_finished: bool) -> TrainResult:
        model_path = None
        if is_finished:
            model_path = self._write("")
            if self._best is not None:
                model_path = model_path.with_name(f"{model_path.name}-best")
            self._save_averages()
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
            best_step=None if self._best is None else self._best.step,
        )
        for callback in self.callbacks:
            callback.on_end(result)
        return result

    def _write(self, suffix: str) -> Path:
        """The weights of now as adapter<suffix>/ and model<suffix>/; older ones are this run's own, from before `steps`
        grew.

        Returns:
            The model's folder, or the adapter's where it is not merged.
        """
        path = self._output / f"model{suffix}"
        self._write_history("moving average" if suffix == "-ema" else "last")
        if has_adapter(self.model):
            adapter_path = self._output / f"adapter{suffix}"
            save_adapter(self.model, adapter_path, self._world)
            if self._settings.adapter is not None and not self._settings.adapter.merge:
                return adapter_path
        save_model(self.model, path, self._world)
        return path

    def _save_averages(self) -> None:
        """The moving average, and the mean of the last checkpoints, as models beside the last weights."""
        if self.average is not None:
            with self.average.swapped():
                self._write("-ema")
            self._write_history("last")
        n_last = self._settings.average_last
        if n_last is not None:
            # The others wait, so that the run is over when it returns anywhere.
            self._world.from_main(
                lambda: average_checkpoints(
                    last_checkpoints(self._output, n_last), self._output / "model-average", overwrite=True
                )
            )

    def _write_history(self, weights: Literal["last", "moving average"]) -> None:
        """What was done so far, into the state and, on rank 0, which alone writes, into the model. On all ranks."""
        parts = self._world.gather(self._train_loader.state_dict())
        streams = {name: stream for part in parts for name, stream in part["streams"].items()}
        self._state.loader = {**parts[0], "streams": streams}
        if self._world.is_main:
            phase = training_phase(
                self._state,
                loader=self._train_loader,
                held_out_loader=self._held_out_loader,
                num_parameters=sum(p.numel() for p in self.model.parameters()),
                num_trainable=sum(p.numel() for p in self.parameters.values()),
                device=self._describe_devices(),
                weights=weights,
            )
            self.model.history = self._before.then(phase)

    def _announce(self) -> None:
        run = RunStart(
            steps=self._settings.steps,
            first_step=self._state.step + 1,
            num_parameters=sum(p.numel() for p in self.model.parameters()),
            num_trainable=sum(p.numel() for p in self.parameters.values()),
            device=self._describe_devices(),
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

    def _describe_devices(self) -> str:
        one = self._world.device.type
        return one if self._world.size == 1 else f"{self._world.size} x {one}"
