"""How an encoder is opened in training: from the masks a pair starts with to masks that look ahead."""

from typing import Literal, Self

from pydantic import Field, model_validator

from twofold.config.base import Config


class OpeningConfig(Config):
    """A schedule; `train.opening` has its functions. Before the first step the masks are those of the model, from step
    `steps` on every layer has `mask`, without a limit."""

    kind: Literal["layers", "future_share", "batches"]
    """`layers`: one after another, in `order`. `future_share`: all at once, with a share of attention for keys after
    the query that grows in a line to the whole, from that which the model comes with where it is limited, else from
    nothing. `batches`: all at once, in a growing share of the batches, drawn from the seed of the run."""

    steps: int = Field(ge=1)
    """The step that is the first with an open encoder."""

    mask: Literal["sink", "bidirectional"] = "sink"
    """What all layers end with."""

    order: tuple[int, ...] | None = None
    """`layers` only: encoder layers in the order in which they open, each once; those that are open already may be
    among them. null: from the last layer to the first. A profile's order stands in adaptation.json."""

    @model_validator(mode="after")
    def _fields_belong_to_the_kind(self) -> Self:
        if self.order is not None and self.kind != "layers":
            raise ValueError(f"order is for kind 'layers', got kind {self.kind!r}; leave it out")
        if self.order is not None and len(set(self.order)) < len(self.order):
            raise ValueError(f"order names a layer twice: {list(self.order)}")
        return self
