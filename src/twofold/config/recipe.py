"""A recipe: one whole run, from the donors to the last step. YAML files and dotted overrides become one."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from twofold.config.adapter import AdapterConfig
from twofold.config.base import Config
from twofold.config.data import DataConfig
from twofold.config.distillation import DistillationConfig
from twofold.config.model import EncoderMask
from twofold.config.opening import OpeningConfig
from twofold.config.watching import EarlyStoppingConfig, SamplesConfig


class AdaptConfig(Config):
    """A model made from donors at the start of the run: the keyword arguments of `twofold.adapt`."""

    encoder: str
    decoder: str | None = None
    start: Literal["published", "scaled_copy", "random", "lossless", "stitched"] | None = None
    encoder_mask: EncoderMask | Literal["auto"] | tuple[EncoderMask, ...] | None = None
    future_share: float = 1.0
    encoder_layers: tuple[int, ...] | None = None
    decoder_layers: tuple[int, ...] | None = None
    decoder_depth: int | None = None
    layout: Literal["separate", "merged"] | None = None
    reads: Literal["final", "aligned"] | None = None
    cross_rope: bool | None = None
    decoder_positions: Literal["restart", "continue"] | None = None
    decoder_start: Literal["bos", "last_source_token"] | None = None
    aligned_layers: tuple[int, ...] | None = None
    tie_stacks: bool = False
    output_scale: float = 0.1
    seed: int = 0
    """Of random parameters."""


class ModelConfig(Config):
    """What is trained: a checkpoint, or a new pair."""

    path: str | None = None
    """A twofold, T5Gemma or T5Gemma 2 checkpoint: folder or hub name."""

    adapt: AdaptConfig | None = None
    """Donors to make a pair of."""

    skip_vision: bool = False
    """T5Gemma 2 checkpoints: leave the vision tower out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.path is None) == (self.adapt is None):
            given = "neither" if self.path is None else "both"
            raise ValueError(
                f"model takes exactly one of path (a checkpoint) and adapt (donors), got {given}"
            )
        if self.adapt is not None and self.skip_vision:
            raise ValueError(
                "skip_vision is for a checkpoint at model.path; remove it from a model with adapt"
            )
        return self


class OptimizerConfig(Config):
    """AdamW (arXiv 1711.05101)."""

    learning_rate: float = Field(gt=0)
    """The highest of the schedule."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)

    weight_decay: float = Field(default=0.0, ge=0)
    """Of matrices (projections, an LM head of its own); embeddings, norms and biases are never decayed."""

    @field_validator("betas")
    @classmethod
    def _betas_are_shares(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {betas}")
        return betas


class ScheduleConfig(Config):
    """The learning rate over the run: up in a line, then down to `final_share` of its height."""

    warmup_steps: int = Field(default=0, ge=0)
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    final_share: float = Field(default=0.1, ge=0, le=1)
    """Learning rate of the last step over the highest; no effect with decay 'constant'."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.decay == "constant" and self.final_share != 0.1:
            warnings.warn(f"final_share={self.final_share} has no effect: decay is 'constant'", stacklevel=2)
        return self


class TrainSettings(Config):
    """How a model is trained, whatever the model and the data are."""

    steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""

    accumulate_batches: int = Field(default=1, ge=1)
    """Batches per step, over all devices together."""

    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()

    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradients whose global L2 norm is above this are scaled down to it. null: never."""

    cross_attention_warmup_steps: int = Field(default=0, ge=0)
    """First steps in which only cross-attention and its norms train (arXiv 2504.06225 section 3.2: 1000 for
    pairs of unequal width). Only for layout 'separate'; part of `steps`, with one schedule over both
    phases."""

    opening: OpeningConfig | None = None
    """How the encoder goes from the masks the model comes with to open ones. null: masks stay as they are."""

    adapter: AdapterConfig | None = None
    """Train a low-rank adapter instead of the model. null: everything trains."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` computes under autocast; weights, gradients and optimizer stay in float32."""

    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What of the forward pass is computed again in the backward pass, to save memory. `selective`: all but matrix
    products and attention, which costs little time; `full`: whole blocks, which costs a third more."""

    compile_blocks: bool = False
    """Compile every block with `torch.compile`; worth its minutes on a GPU."""

    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations, beside those before the first and after the last step."""

    early_stopping: EarlyStoppingConfig | None = None
    """End before `steps` where evaluations no longer improve. null: never."""

    samples: SamplesConfig | None = None
    """Show what the model answers, at every evaluation. null: nothing is shown."""

    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints, beside the one after the last step."""

    log_every: int = Field(default=1, ge=1)
    """Steps between lines of metrics.jsonl."""

    keep_checkpoints: int = Field(default=2, ge=1)
    """Older ones are removed once a new one is complete."""

    average_last: int | None = Field(default=None, ge=2)
    """Write the mean of the last so many checkpoints as model-average/ at the end of the run (T5Gemma 2: 5). One that a
    stop made counts like any other."""

    ema_decay: float | None = Field(default=None, ge=0, lt=1)
    """Keep a moving average of the weights: share of the old average in each step. It is evaluated beside the weights,
    and written as model-ema/ at the end."""

    seed: int = Field(default=0, ge=0)
    """Of dropout; the data has a seed of its own."""

    tensorboard: bool = True
    """Write scalars for TensorBoard beside metrics.jsonl."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a CUDA device where there is one."""

    data_parallel_replicas: int = Field(default=1, ge=1)
    """Groups of processes that hold the whole model each, sharded inside of the group: for several nodes with a slow
    network between them, their number. Every process of the run is in one group; 1: one group of all."""

    reduce_every_batch: bool = False
    """Add gradients up over the processes after every batch, not once a step: more traffic, but no process holds the
    gradients of the whole model, 4 bytes a parameter. No effect with one process or one batch for each."""

    collective_timeout_s: int = Field(default=600, ge=1)
    """Seconds after which a process that the others wait for counts as lost."""

    @field_validator("precision", mode="before")
    @classmethod
    def _no_float16(cls, value: object) -> object:
        if value in ("float16", "fp16", "half"):
            raise ValueError(
                f"precision {value!r} is not offered: activations of Gemma and T5 models overflow float16 "
                "(NaN or empty output, huggingface/transformers#36822); use 'bfloat16' or 'float32'"
            )
        return value

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        for name, value in (
            ("schedule.warmup_steps", self.schedule.warmup_steps),
            ("cross_attention_warmup_steps", self.cross_attention_warmup_steps),
            ("opening.steps", self.opening.steps if self.opening else 0),
        ):
            if value > self.steps:
                raise ValueError(f"{name} ({value}) must not be more than steps ({self.steps})")
        return self

    @model_validator(mode="after")
    def _checkpoints_suffice(self) -> Self:
        if self.average_last is None:
            return self
        if self.keep_checkpoints < self.average_last:
            raise ValueError(
                f"average_last={self.average_last} needs as many checkpoints at the end, but keep_checkpoints is "
                f"{self.keep_checkpoints}; raise it"
            )
        num_saved = 1 if self.save_every is None else -(-self.steps // self.save_every)
        if num_saved < self.average_last:
            raise ValueError(
                f"average_last={self.average_last} needs as many checkpoints, but {self.steps} steps with "
                f"save_every={self.save_every} give {num_saved}; lower save_every"
            )
        return self

    @model_validator(mode="after")
    def _evaluations_come(self) -> Self:
        if self.early_stopping is not None and self.evaluate_every is None:
            raise ValueError("early_stopping looks at evaluations during the run; set evaluate_every")
        return self

    @model_validator(mode="after")
    def _adapter_fits(self) -> Self:
        if self.adapter is None:
            return self
        if self.average_last is not None:
            raise ValueError(
                f"average_last={self.average_last} averages whole checkpoints, and those of a run with an adapter hold "
                "the adapter alone; use ema_decay instead"
            )
        if self.opening is not None and not self.adapter.merge:
            raise ValueError(
                "opening changes the masks of the model, which an adapter does not carry; set adapter.merge=true"
            )
        return self


class Run(TrainSettings):
    """What every stage of `twofold train` has that updates a model; each adds its data and settings."""

    stage: str

    model: ModelConfig

    output: str
    """Folder of the run; must not exist yet, unless the run is resumed."""

    @field_validator("output")
    @classmethod
    def _output_is_named(cls, output: str) -> str:
        if not output:
            raise ValueError("output must name a folder, got an empty string")
        return output

    def describe_step(self) -> str:
        """What one step takes, in a few words."""
        raise NotImplementedError


class HasHeldOut(Protocol):
    """Data of any stage."""

    @property
    def has_held_out(self) -> bool:
        """Something is kept for evaluation."""
        ...


def warn_without_held_out(evaluate_every: int | None, data: HasHeldOut) -> None:
    """Evaluations need something to evaluate on."""
    if evaluate_every is not None and not data.has_held_out:
        warnings.warn(
            f"evaluate_every={evaluate_every} has no effect: nothing is held out; set data.held_out or "
            "data.held_out_fraction",
            stacklevel=3,
        )


class Recipe(Run):
    """Pre-training, or tuning on given answers."""

    stage: Literal["pretrain", "sft"]
    """`pretrain`: running text, split or masked by the objective. `sft`: pairs or conversations."""

    data: DataConfig

    distillation: DistillationConfig | None = None
    """Who teaches. null: the data alone."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        objective = self.data.objective.name
        if (self.stage == "sft") != (objective == "supervised"):
            allowed = "'supervised'" if self.stage == "sft" else "'prefix_lm', 'span_corruption' or 'ul2'"
            raise ValueError(f"stage {self.stage!r} needs data.objective.name {allowed}, got {objective!r}")
        warn_without_held_out(self.evaluate_every, self.data)
        return self

    @property
    def positions_per_step(self) -> int:
        """Token positions of one step at most, both sides, padding included."""
        rows = self.data.rows_per_batch * self.accumulate_batches
        return rows * (self.data.source_length + self.data.target_length)

    def describe_step(self) -> str:
        """See `Run`."""
        return f"{self.positions_per_step:,} positions"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file. In `path`, `output`, `encoder`, `decoder`, `cache`, `teacher` and `targets`, `${NAME}` stands
            for an environment variable. Relative paths start from the working directory.
        overrides: `key=value` with a dotted key (`optimizer.learning_rate=1e-4`, `data.sources.0.path=a.txt`) and a
            YAML value; later ones win.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, a key twice, an unknown or missing key, a wrong value, a variable that is not set; names
            the file and the key.
    """
    content = read_content(path, overrides)
    if content.get("stage") == "distill-targets":
        raise ValueError(
            f"{path}: stage 'distill-targets' stores predictions and trains nothing; start it with `twofold train`, or "
            "read it as a twofold.config.targets.TargetsRecipe"
        )
    return _checked(Recipe, path, content)


Kind = TypeVar("Kind", bound=Config)


def read_recipe(kind: type[Kind], path: str | Path, overrides: Sequence[str] = ()) -> Kind:
    """`load_recipe` for another kind of run."""
    return _checked(kind, path, read_content(path, overrides))


def _checked(kind: type[Kind], path: str | Path, content: Mapping[str, Any]) -> Kind:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg'].removeprefix('Value error, ')}"
            + ("" if e["type"] in ("missing", "value_error") else f", got {e['input']!r}")
            for e in error.errors()
        ]
        raise ValueError(f"{path}: " + "; ".join(problems)) from error


def read_content(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a recipe's file says, with overrides and environment variables put in; not checked yet.

    Raises:
        FileNotFoundError, ValueError: see `load_recipe`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}; give the path of a YAML file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(content).__name__}")
    for override in overrides:
        _apply(content, override)
    expanded: dict[str, Any] = _expanded(content, path, "")
    return expanded


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=True)
        if len(mapping) < len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise yaml.constructor.ConstructorError(
                None, None, f"key {twice} is given twice", node.start_mark
            )
        return mapping


def _apply(content: dict[str, Any], override: str) -> None:
    """Set one dotted key, in place; mappings on the way are made where they are missing."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"an override looks like key=value (such as steps=100), got {override!r}")
    try:
        value = yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"the value of override {override!r} is not valid YAML: {error}") from error
    *parents, last = key.split(".")
    at: Any = content
    for name in parents:
        if isinstance(at, dict):
            if at.get(name) is None:
                at[name] = {}
            at = at[name]
        else:
            at = _item(at, name, override)
    if isinstance(at, dict):
        at[last] = value
    else:
        _item(at, last, override)
        at[int(last)] = value


def _item(at: Any, name: str, override: str) -> Any:
    if isinstance(at, list) and name.isdigit() and int(name) < len(at):
        return at[int(name)]
    held = f"a list of {len(at)}, so it takes an index below that" if isinstance(at, list) else f"{at!r}"
    raise ValueError(f"override {override!r}: there is no key {name!r}; the recipe has {held} there")


PATH_KEYS = ("path", "completion_path", "output", "encoder", "decoder", "cache", "teacher", "targets")
"""Settings that name files, folders or repositories."""


def _expanded(value: Any, file: Path, key: str) -> Any:
    """The same with environment variables put into paths."""
    if isinstance(value, Mapping):
        return {name: _expanded(v, file, f"{key}.{name}".lstrip(".")) for name, v in value.items()}
    if isinstance(value, list):
        return [_expanded(v, file, f"{key}.{i}") for i, v in enumerate(value)]
    if not isinstance(value, str) or key.rpartition(".")[2] not in PATH_KEYS:
        return value

    def variable(match: re.Match[str]) -> str:
        name = match[1]
        if name not in os.environ:
            raise ValueError(
                f"{file}: {key} is {value!r}, but the environment variable {name} is not set; set it, or "
                f"override {key}=..."
            )
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", variable, value)
