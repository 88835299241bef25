"""What a run reads: sources, objective, lengths, batches."""

import warnings
from typing import Literal, Self

from pydantic import Field, model_validator

from twofold.config.base import Config
from twofold.config.template import template_columns


def _warn_without_effect(config: Config, fields: tuple[str, ...], because: str) -> None:
    """Warn of fields that differ from their defaults though nothing reads them."""
    for name in fields:
        value = getattr(config, name)
        if value != type(config).model_fields[name].default:
            warnings.warn(f"{name}={value!r} has no effect: {because}", stacklevel=3)


class SourceConfig(Config):
    """One corpus: files, a folder, or a `datasets` dataset."""

    path: str
    """File, folder, glob, folder of `Dataset.save_to_disk`, or (with format="hf") a name on the hub."""

    format: Literal["auto", "text", "jsonl", "parquet", "hf"] = "auto"
    """`auto` goes by the file name; `.gz` is unpacked. `jsonl` also reads a file that is one JSON array."""

    text_field: str = "text"
    """Column of the text, where no other field is set."""

    prompt_field: str | None = None
    """Column of the prompt of a supervised pair; goes with a completion."""

    completion_field: str | None = None
    """Column of the answer of a supervised pair; goes with a prompt."""

    prompt_template: str | None = None
    """The prompt as text with columns in braces, in place of `prompt_field`: `Translate to German: {en}`. A list of
    texts is joined with spaces, `{summaries[0]}` takes one of it; `{{` is a brace. White space at both ends is cut."""

    completion_template: str | None = None
    """The answer likewise, in place of `completion_field`."""

    completion_path: str | None = None
    """A second text file, whose lines are the answers to the lines of `path`, as parallel corpora are kept. The columns
    are `prompt` and `completion`."""

    messages_field: str | None = None
    """Column of a conversation: a list of {"role", "content"} that ends with the assistant's reply."""

    split: str = "train"
    """Split of a `datasets` dataset."""

    document: Literal["file", "line", "paragraph"] = "file"
    """What counts as one document in a text file; paragraphs are separated by blank lines."""

    weight: float | None = Field(default=None, gt=0)
    """Share of the training tokens, relative to the other sources; all sources have one or none has."""

    epochs: float | None = Field(default=None, gt=0)
    """At most so many passes in training; 0.5 is the first half of the source. None: no limit."""

    max_documents: int | None = Field(default=None, ge=1)
    """Read only so many documents, from the beginning."""

    max_tokens: int | None = Field(default=None, ge=1)
    """Read documents from the beginning as long as they have no more tokens than this together."""

    @property
    def is_supervised(self) -> bool:
        """Whether the records are pairs or conversations, not running text."""
        sides = (self.prompt_field, self.prompt_template, self.messages_field, self.completion_path)
        return any(side is not None for side in sides)

    @property
    def templates(self) -> tuple[str, str]:
        """Of prompt and completion, for supervised pairs that are no conversations."""
        prompt = (
            f"{{{self.prompt_field or 'prompt'}}}" if self.prompt_template is None else self.prompt_template
        )
        if self.completion_template is not None:
            return prompt, self.completion_template
        return prompt, f"{{{self.completion_field or 'completion'}}}"

    def _check_sides(self) -> None:
        sides = {}
        for side in ("prompt", "completion"):
            field, template = getattr(self, f"{side}_field"), getattr(self, f"{side}_template")
            if field is not None and template is not None:
                raise ValueError(
                    f"{side}_field ({field!r}) and {side}_template ({template!r}) are two ways to say one thing; "
                    "remove one"
                )
            if template is not None:
                template_columns(template)
            sides[side] = field if template is None else template
        prompt, completion = sides.values()
        if self.completion_path is None and (prompt is None) != (completion is None):
            raise ValueError(
                f"prompt_field and completion_field go together (or their templates), got {prompt!r} and "
                f"{completion!r}; set both or neither"
            )
        if (prompt or completion or self.completion_path) and self.messages_field is not None:
            raise ValueError(
                f"a source has either prompt_field ({prompt!r}) and completion_field or "
                f"messages_field ({self.messages_field!r}), not both; remove one"
            )

    def _check_parallel(self) -> None:
        if self.completion_path is None:
            return
        if self.format not in ("auto", "text"):
            raise ValueError(f"completion_path is for text files, got format {self.format!r}; remove one")
        columns = {column for template in self.templates for column in template_columns(template)}
        if not columns <= {"prompt", "completion"}:
            raise ValueError(
                f"two parallel files have the columns prompt and completion, got {', '.join(sorted(columns))}"
            )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.path:
            raise ValueError("path must name a file, folder, glob or dataset, got an empty string")
        self._check_sides()
        self._check_parallel()
        if self.format == "text" and self.is_supervised and self.completion_path is None:
            raise ValueError(
                f"format 'text' has no columns, but prompt_field or messages_field is set for {self.path!r}; "
                "use jsonl, parquet or hf"
            )
        if self.is_supervised:
            _warn_without_effect(self, ("text_field",), "the source has prompt_field or messages_field")
        if self.format in ("jsonl", "parquet", "hf"):
            _warn_without_effect(self, ("document",), f"in format {self.format!r} each row is one document")
        if self.completion_path is not None:
            _warn_without_effect(self, ("document",), "each line of parallel files is one document")
        if self.format in ("text", "jsonl", "parquet"):
            _warn_without_effect(self, ("split",), f"format {self.format!r} has no splits")
        return self


class Denoiser(Config):
    """One denoising task of a UL2 mixture."""

    kind: Literal["span", "suffix"]
    """`span`: random spans behind sentinels (R, X). `suffix`: the end of the sequence, no sentinel (S)."""

    noise_density: float
    """Share of the tokens that becomes the target, between 0 and 1."""

    mean_span_length: float | None = None
    """Tokens; required for `span`, not allowed for `suffix`."""

    split: Literal["fixed", "uniform"] = "fixed"
    """Of `suffix`: cut at `noise_density`, or draw the cut uniformly (mean share 0.5)."""

    mode_token: str | None = None
    """Text put in front of the source, such as "[S]"."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_noise(self.noise_density, self.mean_span_length)
        if self.kind == "span" and self.mean_span_length is None:
            raise ValueError("a span denoiser needs mean_span_length (tokens)")
        if self.kind == "span" and self.split != "fixed":
            raise ValueError(
                f"split is for suffix denoisers, got split={self.split!r} with kind 'span'; remove it"
            )
        if self.kind == "suffix" and self.mean_span_length is not None:
            raise ValueError(
                f"a suffix denoiser has no mean_span_length (got {self.mean_span_length}); noise_density "
                "says how much of the sequence it predicts"
            )
        if self.split == "uniform" and self.noise_density != 0.5:
            raise ValueError(
                "split 'uniform' predicts half of the tokens on average, got noise_density "
                f"{self.noise_density}; set it to 0.5 or use split 'fixed'"
            )
        return self


def _check_noise(noise_density: float, mean_span_length: float | None) -> None:
    if not 0 < noise_density < 1:
        raise ValueError(f"noise_density must lie between 0 and 1, got {noise_density}")
    if mean_span_length is not None and mean_span_length < 1:
        raise ValueError(f"mean_span_length must be at least 1 token, got {mean_span_length}")


class ObjectiveConfig(Config):
    """What source and target are made of."""

    name: Literal["prefix_lm", "span_corruption", "ul2", "supervised"] = "prefix_lm"
    """`supervised` takes pairs or conversations as they are; the others make pairs out of running text."""

    split: Literal["half", "uniform"] = "half"
    """Of `prefix_lm`: two equal halves as in T5Gemma, or a drawn cut."""

    noise_density: float = 0.15
    """Of `span_corruption`: share of the tokens that becomes the target."""

    mean_span_length: float = 3.0
    """Of `span_corruption`, in tokens."""

    preset: Literal["ul2", "t5gemma2", "ul2r"] | None = None
    """Of `ul2`: a published mixture."""

    denoisers: tuple[tuple[Denoiser, float], ...] = ()
    """Of `ul2`: denoisers with their weights, instead of a preset."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_noise(self.noise_density, self.mean_span_length)
        if self.name == "ul2" and (self.preset is None) == (not self.denoisers):
            raise ValueError(
                "objective 'ul2' takes either preset ('ul2', 't5gemma2', 'ul2r') or denoisers, got "
                f"preset={self.preset!r} and {len(self.denoisers)} denoisers; set one of them"
            )
        if any(weight <= 0 for _, weight in self.denoisers):
            raise ValueError(
                f"weights of denoisers must be above 0, got {[weight for _, weight in self.denoisers]}"
            )
        readers = {
            "prefix_lm": ("split",),
            "span_corruption": ("noise_density", "mean_span_length"),
            "ul2": ("preset", "denoisers"),
        }
        for reader, fields in readers.items():
            if reader != self.name:
                _warn_without_effect(
                    self, fields, f"it is for objective {reader!r}, this one is {self.name!r}"
                )
        return self


class DataConfig(Config):
    """Everything between the files and the batches."""

    sources: tuple[SourceConfig, ...]
    """Without weights one corpus, every document once per epoch; with weights a mixture."""

    held_out: tuple[SourceConfig, ...] = ()
    """Sources for evaluation only; their documents are dropped from `sources` where they occur there."""

    held_out_fraction: float = 0.0
    """Share of the documents of `sources` that is kept for evaluation, instead of `held_out`. A document's
    text decides, so copies of one are on the same side."""

    held_out_ngram: int | None = Field(default=None, ge=1)
    """Drop training documents that share n-grams of so many tokens with held-out ones (13 is common)."""

    held_out_ngram_share: float = Field(default=0.5, gt=0, le=1)
    """Share of a document's n-grams that must be held out for it to be dropped."""

    cache: str | None = None
    """Folder of tokenised sources. None: $TWOFOLD_CACHE, or ~/.cache/twofold/tokens."""

    tokenize_workers: int | None = Field(default=None, ge=1)
    """Processes that tokenise. None: one per core."""

    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """Share of a source's records that may be unreadable; they are skipped and reported."""

    objective: ObjectiveConfig = ObjectiveConfig()

    source_length: int
    """Tokens of one row of the encoder, everything included."""

    target_length: int
    """Tokens of one row of the decoder, everything included."""

    max_text_length: int | None = Field(default=None, ge=2)
    """Most tokens of running text that become one example. None: as many as fit a row. Rows several times as long pack
    fuller on both sides where the objective's sides are unequal (UL2)."""

    rows_per_batch: int
    """Rows of one batch; with packing a row holds several examples."""

    packing: bool = True
    """Put several examples in a row. Off: one example per row."""

    pad_multiple: int = Field(default=64, ge=1)
    """A batch is as long as its longest row, rounded up to a multiple of this, at most the row's length. That
    length or more: all batches have one shape."""

    shuffle: bool = True
    """Another order of the examples in each epoch."""

    seed: int = 0
    """Of order, splits and noise; 0 or more."""

    max_length_action: Literal["error", "truncate", "skip"] = "error"
    """What happens to a supervised pair that is longer than a row."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.sources:
            raise ValueError("sources must name at least one source, got none")
        for name in ("source_length", "target_length", "rows_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(
                f"held_out_fraction must be at least 0 and below 1, got {self.held_out_fraction}"
            )
        if self.held_out and self.held_out_fraction:
            raise ValueError(
                f"held-out documents come from held_out ({len(self.held_out)} sources) or from "
                f"held_out_fraction ({self.held_out_fraction}), not from both; remove one"
            )
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError(
                f"either all sources have a weight or none has, got {[s.weight for s in self.sources]}; give "
                "the others one too"
            )
        for source in self.held_out:
            _warn_without_effect(source, ("weight", "epochs"), "held-out sources are read once each time")
        if self.held_out_ngram is not None and not self.has_held_out:
            warnings.warn(
                f"held_out_ngram={self.held_out_ngram} has no effect: nothing is held out", stacklevel=2
            )
        if self.held_out_ngram is None:
            _warn_without_effect(self, ("held_out_ngram_share",), "held_out_ngram is not set")
        supervised = self.objective.name == "supervised"
        for source in (*self.sources, *self.held_out):
            if supervised and not source.is_supervised:
                raise ValueError(
                    f"objective 'supervised' needs pairs, but source {source.path!r} has only text; set "
                    "prompt_field and completion_field (or templates), or messages_field"
                )
            if not supervised and source.is_supervised:
                raise ValueError(
                    f"objective {self.objective.name!r} needs running text, but source {source.path!r} has "
                    "pairs; use objective 'supervised', or text_field instead of the other fields"
                )
        if not supervised:
            _warn_without_effect(self, ("max_length_action",), "running text is cut into chunks that fit")
        else:
            _warn_without_effect(self, ("max_text_length",), "pairs are taken as they are")
        return self

    @property
    def has_held_out(self) -> bool:
        """Something is kept for evaluation."""
        return bool(self.held_out or self.held_out_fraction)
