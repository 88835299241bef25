"""Opening an encoder over a run: pure functions of the step, exact at both ends.

What a batch sees depends on the step and its stream alone, so a resumed run, or one on another number of ranks, opens
as the one that never stopped. Masks are data (`models.masks`), so every attention backend takes them, packed or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from twofold.config import EncoderMask
from twofold.config.opening import OpeningConfig
from twofold.models import EncoderModel


def num_open(step: int, steps: int, num_layers: int) -> int:
    """Layers that are open in a step: none in step 0, all from step `steps` on, the first as soon as possible."""
    return min(-(-step * num_layers // steps), num_layers)


def future_share(step: int, steps: int, first: float) -> float:
    """Share of attention that keys after the query get at most: `first` in step 0, then in a line, from step `steps` on
    1."""
    return first + (1.0 - first) * min(max(step, 0) / steps, 1.0)


def open_share(step: int, steps: int) -> float:
    """Share of batches with an open encoder: 0 in step 0, then in a line, 1 from step `steps` on."""
    return min(max(step, 0) / steps, 1.0)


@dataclass(frozen=True)
class Masks:
    """What encoder layers see."""

    masks: Sequence[EncoderMask]
    """One per layer."""
    future_share: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", tuple(self.masks))  # from JSON they come as a list

    @classmethod
    def of(cls, model: EncoderModel) -> Masks:
        """Those of a model now."""
        return cls(model.config.encoder_mask, model.config.encoder_future_share)

    def apply(self, model: EncoderModel) -> None:
        """Give the model these masks; its config follows, so that what is saved says what is computed."""
        if Masks.of(model) != self:
            model.set_encoder_mask(self.masks, future_share=self.future_share)


class Opening:
    """The masks of each step and batch of a run."""

    def __init__(self, settings: OpeningConfig, first: Masks, seed: int) -> None:
        """
        Args:
            first: of the model before the first step.
            seed: of the run, for kind `batches`.

        Raises:
            ValueError: `order` is not made of the encoder's layers, or leaves out one that is not open yet.
        """
        self._settings, self._seed = settings, seed
        self._start = first
        n_layers = len(first.masks)
        self._order = tuple(reversed(range(n_layers))) if settings.order is None else settings.order
        self._first_share = first.future_share if first.future_share < 1 else 0.0
        self._end = Masks((settings.mask,) * n_layers)
        strangers = [i for i in self._order if not 0 <= i < n_layers]
        missing = [i for i in range(n_layers) if i not in self._order and first.masks[i] != settings.mask]
        if strangers or missing:
            raise ValueError(
                f"opening.order must name every encoder layer from 0 to {n_layers - 1} that is not "
                f"{settings.mask!r} yet; unknown: {strangers}, missing: {missing}"
            )

    def of_batch(self, step: int, stream: int) -> Masks:
        """For one batch of training step `step`, which counts from 1."""
        settings = self._settings
        if settings.kind != "batches":
            return self.after(step)
        draw = np.random.default_rng((self._seed, step, stream)).random()
        return self._end if draw < open_share(step, settings.steps) else self._start

    def after(self, step: int) -> Masks:
        """Of evaluations and checkpoints after `step` steps: those of that step, and for `batches` the open ones."""
        settings, n_layers = self._settings, len(self._end.masks)
        if step <= 0:
            return self._start
        if step >= settings.steps or settings.kind == "batches":
            return self._end
        if settings.kind == "future_share":
            return Masks(self._end.masks, future_share(step, settings.steps, self._first_share))
        opened = set(self._order[: num_open(step, settings.steps, len(self._order))])
        masks = (settings.mask if i in opened else self._start.masks[i] for i in range(n_layers))
        return Masks(tuple(masks), self._start.future_share)
