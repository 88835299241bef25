"""What the model said before the first step, to which preference tuning holds it.

P: pairs. R = 2 P: replies. N: scored labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from twofold.models import EncoderDecoder
from twofold.posttrain.pairs import PairLoader
from twofold.posttrain.preferences import PairBatch, reply_logprobs
from twofold.train.adapters import adapter_off
from twofold.train.callbacks import Callback, RunStart
from twofold.train.step import Precision, scored_positions
from twofold.train.world import World

FILE = "reference.safetensors"
"""In a run's folder."""


class ReferenceModel:
    """A frozen model in the loop; a plain object, so that no module registers, trains or saves it."""

    def __init__(self, model: EncoderDecoder, precision: Precision, device: torch.device) -> None:
        self._model = model.to(device).eval().requires_grad_(False)
        self._precision = precision

    @torch.no_grad()
    def __call__(self, batch: PairBatch, scored: Tensor) -> Tensor:
        """See `preferences.Reference`."""
        return reply_logprobs(self._model, batch, scored, self._precision)


class AdapterOff:
    """The model that trains, without its adapter: the one from before the first step, at no memory."""

    def __init__(self, model: EncoderDecoder, precision: Precision) -> None:
        self._model, self._precision = model, precision

    @torch.no_grad()
    def __call__(self, batch: PairBatch, scored: Tensor) -> Tensor:
        """See `preferences.Reference`."""
        with adapter_off(self._model):
            return reply_logprobs(self._model, batch, scored, self._precision)


@torch.no_grad()
def compute_reference(
    model: EncoderDecoder,
    loader: PairLoader,
    precision: Precision,
    world: World,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Log-probabilities of chosen and rejected of all pairs of a loader, float32 [P, 2] on the CPU; on every rank the
    same.

    Args:
        model: on the device of the rank, in eval mode; whole on every rank. Rank r computes batches r, r + size, ...
        progress: told how many pairs are done, and of how many.
    """
    found_P2 = torch.zeros(len(loader.pairs), 2)
    done = 0
    own = zip(loader.numbers_by_length(), loader.one_pass(), strict=True)
    for n, (numbers, batch) in enumerate(own):
        done += len(numbers)
        if n % world.size != world.rank:
            continue
        assert isinstance(batch, PairBatch)
        scored = scored_positions(batch).to(world.device)
        sums_R = reply_logprobs(model, batch.to(world.device), scored, precision)
        found_P2[numbers] = sums_R.view(-1, 2).cpu()
        if progress is not None:
            progress(done, len(loader.pairs))
    return world.sum_(found_P2)


class ReferenceFile(Callback):
    """Writes what was computed into the run's folder, when that is there."""

    def __init__(self, tensors: Sequence[Tensor], data: str) -> None:
        """
        Args:
            tensors: [P, 2] of the training pairs, and of those held out.
            data: see `read_reference`.
        """
        self._tensors = tensors
        self._data = data

    def on_start(self, run: RunStart) -> None:
        path = run.output / FILE
        partial = path.with_suffix(".partial")
        named = dict(zip(("train", "held_out"), self._tensors, strict=False))
        partial.write_bytes(save(named, metadata={"data": self._data}))
        partial.replace(path)


def read_reference(output: Path, data: str) -> list[Tensor] | None:
    """What `ReferenceFile` wrote; None where there is no such file.

    Args:
        data: names the pairs and how they were computed.

    Raises:
        ValueError: the file is of other pairs.
    """
    path = output / FILE
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        if file.metadata().get("data") != data:
            raise ValueError(
                f"{path} holds log-probabilities of other pairs or of another precision; resume with the data of the "
                "run, or start a new run in another output"
            )
        return [file.get_tensor(name) for name in ("train", "held_out") if name in file.keys()]  # noqa: SIM118
