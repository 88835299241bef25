"""Training checkpoints: everything a run needs to go on as if it had never stopped, and no pickle.

```
output/checkpoints/step-000100/
    config.json, tokenizer files, shard-*.safetensors  what twofold.load reads
    history.json, README.md                            what was done so far
    optimizer/shard-*.safetensors                      <parameter>.exp_avg, .exp_avg_sq
    average/shard-*.safetensors                        the moving average of the weights, where a run keeps one
    trainer.json                                       step, loader, losses, settings
```

Of a model with an adapter only what trains is in the shards; the rest is where the run began, and `twofold.load` does
not read such a checkpoint.

Tensors are PyTorch's distributed checkpoints in safetensors form: each rank writes the rows it holds into a file of its
own, and any number of ranks reads what it needs of them, one process included.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from twofold.checkpoint.card import write_card
from twofold.checkpoint.save import CheckpointWriter
from twofold.checkpoint.shards import ShardsSource
from twofold.checkpoint.tensors import TensorSource, read_json
from twofold.models import EncoderModel
from twofold.train.adapters import has_adapter, plain_parameters
from twofold.train.parallel import on_host
from twofold.train.world import World

_FORMAT = 2
_MOMENTS = ("exp_avg", "exp_avg_sq")
_FILE_BYTES = 2**30
"""Of one file of one rank, about. safetensors makes a file in memory before it writes it."""


class CheckpointError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


@dataclass
class TrainerState:
    """Where a run stands, JSON-able."""

    step: int
    """Steps done."""

    settings: dict[str, Any]
    """What the run was started with; see `changed_settings`."""

    loader: dict[str, Any] = field(default_factory=dict)
    """`state_dict` of the training loader."""

    losses: list[float] = field(default_factory=list)
    """Of every step, in nats per scored token."""

    held_out: list[tuple[int, float]] = field(default_factory=list)
    """(steps done, held-out loss) of every evaluation."""

    tokens: int = 0
    """Real tokens trained on, both sides."""

    first_masks: dict[str, Any] | None = None
    """Masks of the encoder before the first step, see `train.opening.Masks`; None where nothing is opened."""

    best: dict[str, Any] | None = None
    """The best evaluation, see `train.stopping.Best`; None where the run does not look for one."""
    reports: dict[str, dict[str, float]] = field(default_factory=dict)
    """What the objective said last, loss included, by `train`, `held_out` and `held_out_average`."""

    parameter_steps: dict[str, int] = field(default_factory=dict)
    """Updates of every parameter that has had one; they differ where phases train different ones."""


class CheckpointSaver:
    """Writes checkpoints in the background while training goes on; one at a time.

    A checkpoint appears under its name when all ranks have written theirs; before that its folder is hidden. If one
    fails, its folder is removed.
    """

    def __init__(self, output: Path, world: World, *, keep: int) -> None:
        """
        Args:
            keep: newest checkpoints that stay; older ones are removed, after a new one is complete.
        """
        self._output = output
        self._world = world
        self._keep = keep
        self._thread: threading.Thread | None = None
        self._target: Path | None = None
        self._error: BaseException | None = None

    def start(
        self,
        model: EncoderModel,
        optimizer: Optimizer,
        parameters: Mapping[str, nn.Parameter],
        state: TrainerState,
        averages: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Take a copy of everything in host memory, and begin to write it. The earlier one must have been awaited.

        Args:
            parameters: those of the optimizer, by name.
            state: with the whole loader state.
            averages: see `AverageWeights.tensors`.

        Returns:
            The folder the checkpoint will have.
        """
        assert self._thread is None
        target = _folder_of(self._output) / f"step-{state.step:06d}"
        partial = target.with_name(f".{target.name}.partial")
        state.parameter_steps = _parameter_steps(optimizer, parameters)
        self._world.from_main(lambda: _begin(partial, model, state))
        kept = parameters_kept(model, parameters)
        weights = {name: on_host(p, self._world) for name, p in kept.items()}
        moments = {name: on_host(t, self._world) for name, t in _moments(optimizer, parameters).items()}
        parts = {"": weights, "optimizer": moments}
        if averages is not None:
            parts["average"] = {name: on_host(t, self._world) for name, t in averages.items()}
        self._target, self._error = target, None
        # A daemon: where another rank is lost, nobody waits for what can no longer be complete.
        self._thread = threading.Thread(
            target=self._write, args=(partial, target, parts), name="checkpoint", daemon=True
        )
        self._thread.start()
        return target

    @property
    def is_writing(self) -> bool:
        """This rank is not done with what was started."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """This rank cannot complete what was started, and that has not been raised yet."""
        return not self.is_writing and self._error is not None

    def wait(self) -> Path | None:
        """Until what is pending is complete; on all ranks.

        Returns:
            Its folder; None where nothing is pending.

        Raises:
            CheckpointError: it could not be written; on every rank.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        reasons = self._world.gather(None if error is None else _reason(error))
        for rank, reason in enumerate(reasons):
            if reason is not None:
                before = latest_checkpoint(self._output)
                raise CheckpointError(
                    f"{self._target} could not be written: {reason} (rank {rank}). "
                    + ("There is no earlier checkpoint" if before is None else f"{before} is complete")
                    + "; make room or choose another output, and go on with --resume"
                )
        return self._target

    def abandon(self) -> None:
        """After an error: let this rank end what it is writing, unless others are needed that do not answer."""
        if self._thread is not None:
            self._thread.join(timeout=None if self._world.size == 1 else _PATIENCE_S)
            self._thread = None

    def _write(self, partial: Path, target: Path, parts: dict[str, dict[str, Tensor]]) -> None:
        try:
            for name, tensors in parts.items():
                if tensors:
                    _write_shards(partial / name, tensors, self._world)
            if self._world.is_main:  # it ends its part last: the writer has gathered the others' results
                _sync_folder(partial)
                if target.exists():
                    shutil.rmtree(target)
                partial.rename(target)
                _sync_folder(target.parent)
                _remove_old(self._output, self._keep)
        except BaseException as error:  # raised again by wait()
            self._error = error
            if self._world.is_main:
                shutil.rmtree(partial, ignore_errors=True)


_PATIENCE_S = 5.0


def parameters_kept(model: EncoderModel, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """What a run has to remember of its weights: all of them, or with an adapter those that train.

    Args:
        parameters: those of the optimizer, by name.
    """
    return dict(parameters) if has_adapter(model) else dict(model.named_parameters())


def _begin(partial: Path, model: EncoderModel, state: TrainerState) -> None:
    """All that is not sharded."""
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        (partial / "optimizer").mkdir(parents=True)
        if model.history is not None:
            write_card(partial, model.history, model.config, architecture=type(model).__name__)
        if not has_adapter(model):
            config = model.config.model_dump(mode="json") | {"architectures": [type(model).__name__]}
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(partial)
        with (partial / "trainer.json").open("w", encoding="utf-8") as file:
            json.dump({"format": _FORMAT, **asdict(state)}, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{partial} could not be written: {error}; earlier checkpoints are complete"
        ) from error


def _write_shards(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    files: dict[str, int] = {}
    in_file, number = 0, 1
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if in_file and in_file + size > _FILE_BYTES * world.size:
            in_file, number = 0, number + 1
        files[name], in_file = number, in_file + size
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    _allow_one_process()
    save(tensors, storage_writer=writer, process_group=world.writer_group, no_dist=world.size == 1)


def _read_shards(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Fill the tensors, or of sharded ones this rank's part, in place."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    _allow_one_process()
    load(tensors, storage_reader=reader, process_group=world.host_group, no_dist=world.size == 1)


def _allow_one_process() -> None:
    """One process is meant: PyTorch need not warn of it. (`catch_warnings` is not for threads.)"""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _reason(error: BaseException) -> str:
    """What went wrong on which rank, from under the wrapping of distributed checkpoints."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (inner, _) = next(iter(failures.items()))
        return f"{type(inner).__name__} on rank {rank}: {inner}"
    return f"{type(error).__name__}: {error}"


def _sync_folder(folder: Path) -> None:
    """Its entries, on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_model(model: EncoderModel, path: Path, world: World) -> None:
    """The model as a folder that `twofold.load` reads, or the loader of its class; an adapter is added to its weights.
    Sharded tensors are gathered one by one.

    All ranks call it, rank 0 writes. What is at `path` is replaced once the new one is complete.
    """
    parameters = plain_parameters(model)
    tensors = ((name, plain.tensor()) for name, plain in parameters.items())
    if not world.is_main:
        for _ in tensors:
            pass
        return
    with CheckpointWriter(path, overwrite=True) as writer:
        writer.write_config(model.config, type(model).__name__)
        writer.write_card(model.history, model.config, type(model).__name__)
        planned = [(name, tuple(p.parameter.shape), p.parameter.dtype) for name, p in parameters.items()]
        writer.write_tensors(planned, tensors)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(writer.folder)


def restore_checkpoint(
    checkpoint: Path,
    model: EncoderModel,
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    state: TrainerState,
    world: World,
    averages: Mapping[str, Tensor] | None = None,
) -> None:
    """Put weights, optimizer state and averages back, in place; on each rank its part of them.

    Raises:
        ValueError: the checkpoint is of another model, or of other trained parameters.
    """
    weights = {name: p.detach() for name, p in parameters_kept(model, parameters).items()}
    moments: dict[str, Tensor] = {}
    for name, steps in state.parameter_steps.items():
        if name not in parameters:
            _refuse_differences(checkpoint, set(state.parameter_steps), set(parameters))
        parameter = parameters[name]
        made = {moment: torch.zeros_like(parameter.detach()) for moment in _MOMENTS}
        moments |= {f"{name}.{moment}": tensor for moment, tensor in made.items()}
        device = parameter.device
        optimizer.state[parameter] = {"step": torch.tensor(float(steps), device=device), **made}
    parts = ((checkpoint, weights), (checkpoint / "optimizer", moments), (checkpoint / "average", averages))
    for folder, wanted in parts:
        if wanted:
            with ShardsSource(folder) as source:
                _check_fit(checkpoint, source, wanted)
            _read_shards(folder, dict(wanted), world)


def _check_fit(checkpoint: Path, source: TensorSource, wanted: Mapping[str, Tensor]) -> None:
    _refuse_differences(checkpoint, set(source.names()), set(wanted))
    for name, tensor in wanted.items():
        if source.shape(name) != tuple(tensor.shape):
            raise ValueError(
                f"{checkpoint}: {name} has shape {list(source.shape(name))}, this model's has "
                f"{list(tensor.shape)}; resume with the model the run began with"
            )


def read_state(checkpoint: Path) -> TrainerState:
    """trainer.json of a checkpoint.

    Raises:
        ValueError: written by another version of twofold.
    """
    content = read_json(checkpoint / "trainer.json")
    if content.pop("format", None) != _FORMAT:
        raise ValueError(
            f"{checkpoint}/trainer.json has another format than {_FORMAT}; resume with the twofold that "
            "wrote it"
        )
    state = TrainerState(**content)
    state.held_out = [(step, loss) for step, loss in state.held_out]
    return state


def latest_checkpoint(output: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None. Half-written ones have another name."""
    return max(_checkpoints(Path(output)), key=_step_of, default=None)


def last_checkpoints(output: Path, count: int) -> list[Path]:
    """The newest complete checkpoints of a run, oldest first.

    Raises:
        FileNotFoundError: there are fewer.
    """
    found = sorted(_checkpoints(output), key=_step_of)[-count:]
    if len(found) < count:
        raise FileNotFoundError(
            f"{output} has {len(found)} complete checkpoints, {count} were to be averaged"
        )
    return found


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any], *, free: frozenset[str]) -> list[str]:
    """What differs, as "optimizer.learning_rate: 0.001 -> 0.002".

    Args:
        old: JSON-able, nested.
        free: top-level keys that may differ.
    """
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: {before.get(key, 'not set')} -> {after.get(key, 'not set')}"
        for key in {**before, **after}
        if key.partition(".")[0] not in free
        and (key not in before or key not in after or before[key] != after[key])
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, (Mapping, list, tuple)) or not value:
        return {prefix.removesuffix("."): list(value) if isinstance(value, tuple) else value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    return {key: leaf for name, part in items for key, leaf in _flat(part, f"{prefix}{name}.").items()}


def _folder_of(output: Path) -> Path:
    return output / "checkpoints"


def _checkpoints(output: Path) -> list[Path]:
    folder = _folder_of(output)
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _remove_old(output: Path, keep: int) -> None:
    for old in sorted(_checkpoints(output), key=_step_of)[:-keep]:
        # Renamed first, so that a removal that is cut short leaves nothing that looks complete.
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))
    for leftover in _folder_of(output).glob(".step-*"):
        shutil.rmtree(leftover)


def _moments(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """By parameter name; parameters that have not trained yet have none."""
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in parameters.items()
        if optimizer.state.get(parameter)
        for moment in _MOMENTS
    }


def _parameter_steps(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    trained = {name: optimizer.state[p]["step"] for name, p in parameters.items() if optimizer.state.get(p)}
    if not trained:
        return {}
    steps = torch.stack(list(trained.values())).tolist()  # one wait for the device
    return {name: int(count) for name, count in zip(trained, steps, strict=True)}


def _refuse_differences(checkpoint: Path, there: set[str], wanted: set[str]) -> None:
    if differing := sorted(there ^ wanted):
        raise ValueError(
            f"{checkpoint} does not fit this model: {len(differing)} tensors are on one side only, the first "
            f"is {differing[0]}; resume with the model the run began with"
        )
