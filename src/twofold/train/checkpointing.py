"""Training checkpoints: everything a run needs to go on as if it had never stopped, and no pickle.

```
output/checkpoints/step-000100/
    config.json, model.safetensors, tokenizer files    what twofold.load reads
    optimizer/model.safetensors                        <parameter>.exp_avg, .exp_avg_sq, .step
    rng.safetensors                                    states of torch's generators
    trainer.json                                       step, loader, losses, settings
```
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from twofold.checkpoint import SafetensorsSource, SafetensorsWriter, new_folder
from twofold.checkpoint.save import save
from twofold.checkpoint.tensors import read_json
from twofold.models import EncoderDecoder

_FORMAT = 1
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


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


def save_checkpoint(
    output: Path,
    model: EncoderDecoder,
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    state: TrainerState,
    *,
    keep: int,
) -> Path:
    """Write the checkpoint of a step; it appears under its name when it is complete.

    Args:
        parameters: those of the optimizer, by name.
        keep: newest checkpoints that stay; older ones are removed, after the new one is complete.

    Returns:
        Its folder.
    """
    target = _folder_of(output) / f"step-{state.step:06d}"
    with new_folder(target) as folder:
        save(model, folder)  # first: it wants an empty folder
        (folder / "optimizer").mkdir()
        moments = _optimizer_tensors(optimizer, parameters)
        plan = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in moments.items()]
        with SafetensorsWriter(folder / "optimizer", plan) as writer:
            for name, tensor in moments.items():
                writer.write(name, tensor)
        save_file(_rng_state(), folder / "rng.safetensors")
        with (folder / "trainer.json").open("w", encoding="utf-8") as file:
            json.dump({"format": _FORMAT, **asdict(state)}, file)
            file.flush()
            os.fsync(file.fileno())
    _remove_old(output, keep)
    return target


def restore_checkpoint(
    checkpoint: Path, model: EncoderDecoder, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Put weights, optimizer state and random generators back, in place.

    Raises:
        ValueError: the checkpoint is of another model, or of other trained parameters.
    """
    with SafetensorsSource(checkpoint) as source, torch.no_grad():
        own = dict(model.named_parameters())
        _refuse_differences(checkpoint, set(source.names()), set(own))
        for name, parameter in own.items():
            if source.shape(name) != tuple(parameter.shape):
                raise ValueError(
                    f"{checkpoint}: {name} has shape {list(source.shape(name))}, this model's has "
                    f"{list(parameter.shape)}; resume with the model the run began with"
                )
            parameter.copy_(source.get(name))
    with SafetensorsSource(checkpoint / "optimizer") as source:
        in_file = set(source.names())
        names = [name for name in parameters if f"{name}.step" in in_file]
        _refuse_differences(
            checkpoint, in_file, {f"{name}.{moment}" for name in names for moment in _MOMENTS}
        )
        for name in names:
            parameter = parameters[name]
            optimizer.state[parameter] = {
                m: source.get(f"{name}.{m}").clone().to(parameter.device) for m in _MOMENTS
            }
    _set_rng_state(load_file(checkpoint / "rng.safetensors"))


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


def _optimizer_tensors(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Moments by parameter name; parameters that have not trained yet have none."""
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in parameters.items()
        if optimizer.state.get(parameter)
        for moment in _MOMENTS
    }


def _rng_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _refuse_differences(checkpoint: Path, there: set[str], wanted: set[str]) -> None:
    if differing := sorted(there ^ wanted):
        raise ValueError(
            f"{checkpoint} does not fit this model: {len(differing)} tensors are on one side only, the first "
            f"is {differing[0]}; resume with the model the run began with"
        )
