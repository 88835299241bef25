"""What was done to a model: where it comes from, and every phase since. Stored as history.json beside its weights.

Nothing here names a folder of the machine it was made on: of paths only the last part is kept (`public_name`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from twofold.config.base import Config
from twofold.config.recipe import PATH_KEYS

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
_TEXTS = ("prompt_template", "completion_template", "template", "pattern")
_ABSOLUTE = re.compile(r"(/|~|\\\\|[A-Za-z]:[\\/])")


class Donor(Config):
    """A model whose weights went into this one."""

    name: str
    """Hub name, or the last part of its path."""

    role: Literal["encoder", "decoder", "both"]

    license: str | None = None
    """As the hub names it; None where the donor does not say."""

    is_on_hub: bool = False
    """Whether `name` is one of the Hugging Face hub."""


class Origin(Config):
    """What a model was before anything was trained."""

    kind: Literal["adapted", "checkpoint"]
    """Made of decoder-only donors by `twofold adapt`; or a checkpoint of an encoder-decoder that has no history."""

    donors: tuple[Donor, ...]

    start: str | None = None
    """Of an adapted pair, see `twofold.adapt.plan`."""

    cross_attention: str | None = None
    """How it began, in words."""

    encoder_layers: tuple[int, ...] | None = None
    """Layers of the donor that were kept. None: all."""

    decoder_layers: tuple[int, ...] | None = None
    seed: int | None = None
    """Of random parameters."""

    fitted_tokens: int | None = None
    """Of the text that projections were fitted on."""

    versions: dict[str, str] = Field(default_factory=dict)


class SourceUse(Config):
    """What a run read of one source."""

    name: str
    """Hub name, or the last part of its path."""

    is_on_hub: bool = False
    records: int | None = None
    """Documents, examples or pairs that are there; None where the run does not say."""

    tokens: int | None = None
    """Of all of them, once."""

    weight: float | None = None
    """Of a mixture, as it was asked for."""

    tokens_drawn: int | None = None
    """That were given out in the whole run."""


class Reading(Config):
    """What a loader says of itself."""

    sources: tuple[SourceUse, ...]
    examples_drawn: int | None = None
    """That were given out so far; None where the loader does not say."""


class Training(Config):
    """A run of `twofold train`."""

    kind: Literal["training"] = "training"
    stage: str
    settings: dict[str, Any]
    """The whole recipe, defaults included, without folders."""

    data: tuple[SourceUse, ...] = ()
    held_out: tuple[SourceUse, ...] = ()
    examples_drawn: int | None = None
    step: int
    """Steps done; fewer than the recipe's in a checkpoint on the way."""

    tokens: int
    """Real tokens trained on, both sides."""

    num_parameters: int
    num_trainable: int
    first_loss: float | None = None
    """Of the first step."""

    late_loss: float | None = None
    """Mean over the last tenth of the steps."""

    reports: dict[str, dict[str, float]] = Field(default_factory=dict)
    """What the objective said last, by `train`, `held_out` and `held_out_average`; loss included."""

    first_held_out_loss: float | None = None
    """Before the first step."""

    weights: Literal["last", "moving average"] = "last"
    device: str
    versions: dict[str, str]


class Averaged(Config):
    """One of the models that were averaged."""

    name: str
    weight: float
    step: int | None = None
    """Where it is one of several checkpoints of the last phase."""

    origin: Origin | None = None
    """Where it is another than that of the first."""

    phases: tuple[Phase, ...] = ()
    """What was done to it alone."""


class Averaging(Config):
    """The mean of several models, tensor by tensor."""

    kind: Literal["averaging"] = "averaging"
    models: tuple[Averaged, ...]
    versions: dict[str, str]


Phase = Annotated[Training | Averaging, Field(discriminator="kind")]


class History(Config):
    """Where a model comes from, and what was done to it since, in order."""

    format: Literal[1] = 1
    origin: Origin | None
    """None: a model that was made in memory."""

    phases: tuple[Phase, ...] = ()

    def then(self, phase: Training | Averaging) -> History:
        """The same with one phase more."""
        return self.model_copy(update={"phases": (*self.phases, phase)})


def source_use(path: str, format: str | None, **counts: Any) -> SourceUse:
    """What is said of a source.

    Args:
        path: as the recipe has it.
        format: of the recipe; only "hf" may be a name on the hub.
        counts: the other fields.
    """
    is_on_hub = format == "hf" and is_hub_name(path)
    name = path if is_on_hub else _last_part(path)
    return SourceUse(name=name, is_on_hub=is_on_hub, **counts)


def public_name(path: str) -> str:
    """A hub name as it is; of anything else the last part, without what follows a question mark."""
    return path if is_hub_name(path) else _last_part(path)


def _last_part(path: str) -> str:
    parts = re.split(r"[\\/]+", urlsplit(path).path if "://" in path else path)
    return next((part for part in reversed(parts) if part not in ("", "~", ".", "..")), path)


def is_hub_name(path: str) -> bool:
    """Whether a name is `org/name`, and nothing on this machine."""
    return _HUB_NAME.fullmatch(path) is not None and not Path(path).exists()


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without the folders it was run in: `output` and `cache` are left out, other paths cut."""
    kept = {key: value for key, value in settings.items() if key not in ("output", "cache")}
    return {key: _public(key, value) for key, value in kept.items()}


def _public(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return public_settings(value)
    if isinstance(value, (list, tuple)):
        return [_public(key, item) for item in value]
    if isinstance(value, str) and (key in PATH_KEYS or (key not in _TEXTS and _ABSOLUTE.match(value))):
        return public_name(value)
    return value


Averaged.model_rebuild()
