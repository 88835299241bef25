"""Averages of weights: of checkpoints, once, and over the steps of a run, as it goes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from twofold.checkpoint import (
    Checkpoint,
    SafetensorsWriter,
    TensorSource,
    copy_tokenizer,
    new_folder,
    resolve,
)
from twofold.checkpoint.card import read_history, versions, write_card
from twofold.checkpoint.load import read_config
from twofold.config.history import Averaged, Averaging, History, Training

_CONFIG_FILES = ("config.json", "generation_config.json")


class AverageWeights:
    """A moving average of parameters: after each step average = decay * average + (1 - decay) * parameter.

    It begins as the weights before the first step, so that a short run's average is still near them: 1 / (1 - decay)
    steps count. Sharded parameters have sharded averages, and each rank updates its own part.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        """Args:
        parameters: by name, float32; shared ones once.
        decay: at least 0 and below 1.
        """
        self._parameters = dict(parameters)
        self._decay = decay
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}
        """The averages by parameter name, to be saved and restored in place."""

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        torch._foreach_lerp_(
            [_local(tensor) for tensor in self.tensors.values()],
            [_local(self._parameters[name]) for name in self.tensors],
            1.0 - self._decay,
        )

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Parameters and averages change places inside of the block, one tensor at a time."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.tensors.items():
            own, other = _local(self._parameters[name]), _local(average)
            kept = own.clone()
            own.copy_(other)
            other.copy_(kept)


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def average_checkpoints(
    checkpoints: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    overwrite: bool = False,
    watch: Callable[[Iterable[str], int], Iterable[str]] = lambda names, total: names,
) -> None:
    """Write the mean of checkpoints of one model, tensor by tensor.

    T5Gemma 2 is the mean of its last 5 checkpoints, 10k steps apart (arXiv 2512.14856). Sums are float32, and two
    tensors exist at a time. Config and tokenizer are those of the first checkpoint, as are names and dtypes, so
    the result loads wherever that loads.

    Args:
        checkpoints: at least one; twofold, T5Gemma or T5Gemma 2, folders or hub names.
        out: a folder that does not exist yet, unless `overwrite`.
        weights: of each checkpoint, above 0; they need not sum to 1. None: equal.
        watch: wraps the tensors' names, given their number, for a progress bar.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: a checkpoint is not there.
        ValueError: no checkpoint, weights that do not fit, or checkpoints of different models; says which. Nothing is
            left behind.
    """
    if not checkpoints:
        raise ValueError("give at least one checkpoint to average")
    shares = [1.0] * len(checkpoints) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(checkpoints) or not all(isfinite(share) and share > 0 for share in shares):
        raise ValueError(
            f"weights must be {len(checkpoints)} numbers above 0, one for each checkpoint, got {list(weights or ())}"
        )
    found = [resolve(checkpoint) for checkpoint in checkpoints]
    _check_configs(found)
    with new_folder(out, overwrite=overwrite) as folder, ExitStack() as stack:
        sources = [stack.enter_context(checkpoint.tensors()) for checkpoint in found]
        _check_tensors(sources)
        first = sources[0]
        names = first.names()
        with SafetensorsWriter(folder, [(n, first.shape(n), first.dtype(n)) for n in names]) as writer:
            for name in watch(names, len(names)):
                writer.write(name, _mean(name, sources, shares).to(first.dtype(name)))
        for file in _CONFIG_FILES:
            if (found[0].folder / file).is_file():
                shutil.copyfile(found[0].folder / file, folder / file)
        copy_tokenizer(found[0], folder)
        _write_card(folder, found, shares)


def _write_card(folder: Path, checkpoints: Sequence[Checkpoint], shares: Sequence[float]) -> None:
    config, family = read_config(checkpoints[0])
    architecture = (checkpoints[0].config.get("architectures") or ["EncoderDecoder"])[0]
    write_card(
        folder,
        averaged_history(list(zip(_names(checkpoints), shares, map(read_history, checkpoints), strict=True))),
        config,
        architecture="EncoderDecoder" if family is not None else architecture,
        format="twofold" if family is None else str(checkpoints[0].config["model_type"]),
    )


def _names(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Folder names, with the folder above where they are not distinct."""
    names = [checkpoint.name for checkpoint in checkpoints]
    if len(set(names)) == len(names):
        return names
    above = [checkpoint.folder.resolve().parent for checkpoint in checkpoints]
    return [
        name if parent == Path.home() else f"{parent.name}/{name}"
        for parent, name in zip(above, names, strict=True)
    ]


def averaged_history(parts: Sequence[tuple[str, float, History]]) -> History:
    """What was done to the mean of models: what they have in common, then the averaging with what they have not.

    Checkpoints of one run have their last phase in common, and the later one's figures tell it.

    Args:
        parts: name, weight and history of each model.
    """
    histories = [history for _, _, history in parts]
    all_phases = [history.phases for history in histories]
    n_common = 0
    while all(
        len(phases) > n_common and phases[n_common] == all_phases[0][n_common] for phases in all_phases
    ):
        n_common += 1
    common, rests = all_phases[0][:n_common], [phases[n_common:] for phases in all_phases]
    steps: list[int | None] = [None] * len(parts)
    runs = [rest[0] for rest in rests if len(rest) == 1 and isinstance(rest[0], Training)]
    if len(runs) == len(parts) and all(run.settings == runs[0].settings for run in runs):
        common = (*common, max(runs, key=lambda run: run.step))
        steps, rests = [run.step for run in runs], [()] * len(parts)
    origin = histories[0].origin
    models = tuple(
        Averaged(
            name=name,
            weight=weight,
            step=step,
            origin=None if history.origin == origin else history.origin,
            phases=rest,
        )
        for (name, weight, history), step, rest in zip(parts, steps, rests, strict=True)
    )
    return History(origin=origin, phases=(*common, Averaging(models=models, versions=versions())))


def _mean(name: str, sources: Sequence[TensorSource], shares: Sequence[float]) -> Tensor:
    total = torch.zeros(sources[0].shape(name), dtype=torch.float32)
    for source, share in zip(sources, shares, strict=True):
        total.add_(source.get(name).float(), alpha=share)
    return total.div_(sum(shares))


def _check_configs(checkpoints: Sequence[Checkpoint]) -> None:
    first = read_config(checkpoints[0])[0].model_dump()
    kind = checkpoints[0].config.get("model_type")
    for other in checkpoints[1:]:
        config = read_config(other)[0].model_dump()
        differing = [key for key in first if config[key] != first[key]]
        if other.config.get("model_type") != kind:
            differing = ["model_type"]
        if differing:
            raise ValueError(
                f"{checkpoints[0].folder} and {other.folder} are of different models: their configs differ in "
                f"{', '.join(differing)}; average checkpoints of one run"
            )


def _check_tensors(sources: Sequence[TensorSource]) -> None:
    first = sources[0]
    names = set(first.names())
    for other in sources[1:]:
        if alone := sorted(names ^ set(other.names())):
            raise ValueError(
                f"{first.description} and {other.description} do not have the same tensors: {len(alone)} are in one of "
                f"them only, the first is {alone[0]}"
            )
        for name in first.names():
            if other.shape(name) != first.shape(name):
                raise ValueError(
                    f"{name} has shape {list(first.shape(name))} in {first.description}, "
                    f"{list(other.shape(name))} in {other.description}; average checkpoints of one run"
                )
