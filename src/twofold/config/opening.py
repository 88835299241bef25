"""How an encoder is opened in training: from the masks a pair starts with to masks that look ahead."""

from typing import Literal, Self

from pydantic import Field, model_validator

from twofold.config.base import Config


class OpeningConfig(Config):
    """A schedule; `train.opening` has its functions. Before the first step the masks are those of the model, from step
    `steps` on every layer has `mask`, with the whole weight."""

    kind: Literal["layers", "future_weight", "batches"]
    """`layers`: one after another, in `order`. `future_weight`: all at once, with a weight on keys after the query that
    grows from `lowest_weight` to 1 by equal factors. `batches`: all at once, in a growing share of the batches, drawn
    from the seed of the run."""

    steps: int = Field(ge=1)
    """The step that is the first with an open encoder."""

    mask: Literal["sink", "bidirectional"] = "sink"
    """What all layers end with."""

    order: tuple[int, ...] | None = None
    """`layers` only: encoder layers in the order in which they open, each once; those that are open already may be
    among them. null: from the last layer to the first. A profile's order stands in adaptation.json."""

    lowest_weight: float | None = Field(default=None, gt=0, lt=1)
    """`future_weight` only. null: the weight the model comes with, or 0.001 where that is 1."""

    @model_validator(mode="after")
    def _fields_belong_to_the_kind(self) -> Self:
        if self.order is not None and self.kind != "layers":
            raise ValueError(f"order is for kind 'layers', got kind {self.kind!r}; leave it out")
        if self.lowest_weight is not None and self.kind != "future_weight":
            raise ValueError(
                f"lowest_weight is for kind 'future_weight', got kind {self.kind!r}; leave it out"
            )
        if self.order is not None and len(set(self.order)) < len(self.order):
            raise ValueError(f"order names a layer twice: {list(self.order)}")
        return self
