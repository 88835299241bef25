"""What stages that keep their records in memory say of them: where they are, how long, which are held out."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from twofold.config.base import Config


class RecordSource(Config):
    """Records with columns, from files or a `datasets` dataset."""

    path: str
    """File, folder, glob, folder of `Dataset.save_to_disk`, or (with format="hf") a name on the hub."""

    format: Literal["auto", "jsonl", "parquet", "hf"] = "auto"
    """`auto` goes by the file name; `.gz` is unpacked. `jsonl` also reads a file that is one JSON array."""

    split: str = "train"
    """Split of a `datasets` dataset."""

    @model_validator(mode="after")
    def _has_a_path(self) -> Self:
        if not self.path:
            raise ValueError("path must name a file, folder, glob or dataset, got an empty string")
        return self


class RecordData(Config):
    """Everything between the files and batches."""

    items: ClassVar[str]
    """What is made of a record, in the plural."""

    sources: tuple[RecordSource, ...]
    held_out: tuple[RecordSource, ...] = ()
    """Sources for evaluation only; what has a prompt that occurs there is dropped from `sources`."""

    held_out_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the prompts of `sources` that is kept for evaluation, instead of `held_out`. All records of one prompt
    are on the same side."""

    source_length: int = Field(ge=1)
    """Most tokens of a prompt, everything included."""

    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """Share of a source's records that may be unusable (not readable, or without what is needed); they are skipped and
    reported."""

    shuffle: bool = True
    """Another order in each epoch."""

    seed: int = Field(default=0, ge=0)
    """Of order and held-out prompts."""

    @model_validator(mode="after")
    def _has_sources_and_one_way_to_hold_out(self) -> Self:
        if not self.sources:
            raise ValueError("sources must name at least one source, got none")
        if self.held_out and self.held_out_fraction:
            raise ValueError(
                f"held-out {self.items} come from held_out ({len(self.held_out)} sources) or from held_out_fraction "
                f"({self.held_out_fraction}), not from both; remove one"
            )
        return self

    @property
    def has_held_out(self) -> bool:
        return bool(self.held_out or self.held_out_fraction)
