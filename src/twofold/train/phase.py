"""What a run tells the card of its model, see `twofold.config.history`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from twofold.checkpoint.card import stored_history, versions
from twofold.config.history import History, Reading, Training, public_settings, source_use
from twofold.models import EncoderModel
from twofold.train.checkpointing import TrainerState


@runtime_checkable
class TellsReading(Protocol):
    """A loader that knows what it reads."""

    def reading(self, state: Mapping[str, Any] | None = None) -> Reading:
        """What is there, and what was drawn of it.

        Args:
            state: of the loader, with all streams. None: nothing is said of what was drawn.
        """
        ...


def history_before(model: EncoderModel, checkpoint: Path | None) -> History:
    """What was done to a model before a run.

    Args:
        checkpoint: of this run, where it is resumed; its last phase is the run itself.
    """
    stored = None if checkpoint is None else stored_history(checkpoint)
    if stored is not None:
        return stored.model_copy(update={"phases": stored.phases[:-1]})
    return History(origin=None) if model.history is None else model.history


def training_phase(
    state: TrainerState,
    *,
    loader: object,
    held_out_loader: object,
    num_parameters: int,
    num_trainable: int,
    device: str,
    weights: Literal["last", "moving average"] = "last",
) -> Training:
    """The phase of a run as far as it is.

    Args:
        state: with the loader's whole state.
        loader: named as in the recipe where it is no `TellsReading`, as is `held_out_loader`.
        device: in words.
        weights: which of the run's the card is for.
    """
    data = state.settings.get("data", {})
    reading = _reading(loader, data.get("sources", ()), state.loader)
    held_out = _reading(held_out_loader, data.get("held_out", ()), None)
    reports = {
        name: report
        for name, report in state.reports.items()
        if weights == "moving average" or name != "held_out_average"
    }
    late = state.losses[-max(len(state.losses) // 10, 1) :]
    return Training(
        stage=state.settings.get("stage", "fit"),
        settings=public_settings(state.settings),
        data=reading.sources,
        held_out=held_out.sources,
        examples_drawn=reading.examples_drawn,
        step=state.step,
        tokens=state.tokens,
        num_parameters=num_parameters,
        num_trainable=num_trainable,
        first_loss=state.losses[0] if state.losses else None,
        late_loss=sum(late) / len(late) if late else None,
        first_held_out_loss=state.held_out[0][1] if state.held_out else None,
        reports=reports,
        weights=weights,
        device=device,
        versions=versions(),
    )


def _reading(loader: object, named: Sequence[Mapping[str, Any]], state: Mapping[str, Any] | None) -> Reading:
    if isinstance(loader, TellsReading):
        return loader.reading(state)
    sources = [source_use(source["path"], source.get("format")) for source in named if "path" in source]
    return Reading(sources=tuple(sources))
