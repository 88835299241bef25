"""From a recipe and a device count to what the run will take, and what to change where it does not fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from twofold.adapt.plan import Choices, plan_adaptation
from twofold.checkpoint import Checkpoint, resolve
from twofold.checkpoint.load import read_config
from twofold.config import EncoderDecoderConfig
from twofold.config.distillation import DistillationConfig
from twofold.config.preferences import PreferenceRecipe, RewardRecipe
from twofold.config.recipe import ModelConfig, Recipe, Run
from twofold.models.counts import parameter_counts
from twofold.models.families import donor_family
from twofold.models.flops import Flops, Row, Trained, encoder_flops, training_flops
from twofold.train.plan.devices import Device
from twofold.train.plan.load import Planned, load_of, notes_on, planned
from twofold.train.plan.memory import (
    Memory,
    Setup,
    Weight,
    gets_gradient,
    peak_memory,
    setup_weights,
    weights_of,
)
from twofold.train.plan.teacher import Teacher, plan_teacher
from twofold.train.run import check_lengths

USABLE_SHARE = 0.92
"""Of a device's memory: the rest goes to the driver's context, communication buffers and the allocator's gaps."""

DEFAULT_EFFICIENCY = 0.5
"""Of the peak rate of matrix products that the useful FLOPs of a step reach."""

UPDATE_BYTES = 28
"""Memory traffic of AdamW per parameter: weight, gradient and two moments read, three of them written, 4 bytes each."""


@dataclass(frozen=True)
class Phase:
    """A part of the run in which the same parameters train."""

    name: str
    steps: int
    trained: Trained
    num_trainable: int
    memory: Memory
    flops_per_step: Flops
    """Of all devices together."""
    compute_s: float | None
    """Of one step on one device; None where its rates are not known."""
    update_s: float | None
    communication_s: float | None

    @property
    def step_s(self) -> float | None:
        """Communication runs beside computation; the update comes after both."""
        if self.compute_s is None or self.update_s is None or self.communication_s is None:
            return None
        return max(self.compute_s, self.communication_s) + self.update_s


@dataclass(frozen=True)
class Change:
    """One thing that makes a run need less."""

    what: str
    """As the recipe would say it, or in words."""
    saves_bytes: int
    """Per device, at the peak."""
    fits: bool


@dataclass(frozen=True)
class RunPlan:
    """What a run will take."""

    config: EncoderDecoderConfig
    parameters: dict[str, int]
    device: Device
    num_devices: int
    phases: tuple[Phase, ...]
    row: Row
    tokens_per_step: int
    """Real tokens on both sides, as far as lengths were given; else positions."""
    largest_rows_per_batch: int
    """That fits, of what `rows_key` counts; 0: not even one does."""
    changes: tuple[Change, ...]
    """Empty where the run fits."""
    problems: tuple[str, ...]
    """Of the run, worth a look before it starts."""
    price_per_hour: float | None
    teacher: Teacher | None = None
    """In the loop."""
    rows_key: str = "data.rows_per_batch"
    """What the recipe calls the size of a batch."""
    notes: tuple[str, ...] = ()
    """What is not in the figures."""

    @property
    def peak(self) -> Memory:
        """Of the phase that needs most."""
        return max((phase.memory for phase in self.phases), key=lambda memory: memory.total)

    @property
    def usable_bytes(self) -> int:
        return int(USABLE_SHARE * self.device.memory_bytes)

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.usable_bytes

    @property
    def total_s(self) -> float | None:
        times = [phase.step_s for phase in self.phases]
        if any(seconds is None for seconds in times):
            return None
        return sum(p.steps * (p.step_s or 0.0) for p in self.phases)

    @property
    def cost(self) -> float | None:
        """Of all devices, in the currency of the price."""
        if self.price_per_hour is None or self.total_s is None:
            return None
        return self.total_s / 3600 * self.price_per_hour * self.num_devices

    def as_json(self) -> dict[str, Any]:
        """Everything, flat where a script wants it; bytes, seconds and FLOPs without prefixes."""
        steps = sum(phase.steps for phase in self.phases)
        return {
            "device": self.device.name,
            "num_devices": self.num_devices,
            "parameters": self.parameters,
            "teacher": None if self.teacher is None else asdict(self.teacher),
            "fits": self.fits,
            "peak_bytes": self.peak.total,
            "usable_bytes": self.usable_bytes,
            "largest_rows_per_batch": self.largest_rows_per_batch,
            "rows_key": self.rows_key,
            "steps": steps,
            "tokens_per_step": self.tokens_per_step,
            "tokens": steps * self.tokens_per_step,
            "flops": sum(phase.steps * phase.flops_per_step.total for phase in self.phases),
            "seconds": self.total_s,
            "cost": self.cost,
            "phases": [
                {
                    "name": phase.name,
                    "steps": phase.steps,
                    "trainable": phase.num_trainable,
                    "flops_per_step": {k: asdict(v) for k, v in phase.flops_per_step.parts().items()},
                    "flops_per_token": phase.flops_per_step.total / self.tokens_per_step,
                    "forward_flops_per_token": phase.flops_per_step.forward / self.tokens_per_step,
                    "peak_bytes": phase.memory.total,
                    "bytes": phase.memory.parts(),
                    "peak_when": phase.memory.when,
                    "activations": phase.memory.kept.by_kind(),
                    "step_s": phase.step_s,
                    "compute_s": phase.compute_s,
                    "update_s": phase.update_s,
                    "communication_s": phase.communication_s,
                }
                for phase in self.phases
            ],
            "changes": [asdict(change) for change in self.changes],
            "problems": list(self.problems),
            "notes": list(self.notes),
        }


def plan_run(
    recipe: Run,
    device: Device,
    num_devices: int = 1,
    *,
    efficiency: float = DEFAULT_EFFICIENCY,
    example_lengths: tuple[int, int] | None = None,
    price_per_hour: float | None = None,
) -> RunPlan:
    """Plan a run from its recipe alone: configurations are read, weights and data are not.

    Args:
        efficiency: share of the device's peak that useful FLOPs reach, above 0 and at most 1.
        example_lengths: mean (source, target) tokens of an example, for packed rows, or of a prompt and a reply.
            Without them a row is one example that fills it, the most it can cost.
        price_per_hour: of one device.

    Raises:
        ValueError: a value out of range, or a recipe whose parts do not go together.
        FileNotFoundError: no configuration where the recipe says.
    """
    if num_devices < 1:
        raise ValueError(f"the number of devices must be at least 1, got {num_devices}")
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency must be above 0 and at most 1, got {efficiency}")
    if price_per_hour is not None and price_per_hour < 0:
        raise ValueError(f"price_per_hour must be 0 or more, got {price_per_hour}")
    if recipe.adapter is not None:
        raise ValueError(
            "runs with an adapter are not planned yet; plan with adapter=null, an upper bound of memory and time"
        )
    recipe = planned(recipe)
    config = read_model_config(recipe.model)
    is_reward = isinstance(recipe, RewardRecipe)
    lengths = recipe.data.source_length, recipe.data.target_length
    check_lengths(*((sum(lengths), 0) if is_reward else lengths), config)
    if recipe.cross_attention_warmup_steps and config.layout == "merged":
        raise ValueError(
            "cross_attention_warmup_steps trains cross-attention alone, but layout 'merged' has no cross-attention "
            "parameters; set cross_attention_warmup_steps=0"
        )
    teacher = None  # in the loop; stored targets cost nothing worth counting
    distillation = _distillation(recipe)
    if distillation is not None and distillation.teacher is not None:
        teacher = _header(distillation.teacher)
    draft = _Draft(recipe, config, device, num_devices, efficiency, example_lengths, teacher)
    largest = draft.largest_rows()
    return RunPlan(
        config=config,
        parameters=encoder_parts(config) if is_reward else parts_of(config),
        device=device,
        num_devices=num_devices,
        phases=draft.phases,
        row=draft.load.row,
        tokens_per_step=draft.tokens_per_step,
        largest_rows_per_batch=largest,
        changes=() if draft.fits else tuple(_changes(draft, largest)),
        problems=tuple(_problems(draft)),
        price_per_hour=price_per_hour,
        teacher=draft.teacher,
        rows_key=draft.load.rows_key,
        notes=notes_on(recipe),
    )


def _distillation(recipe: Planned) -> DistillationConfig | None:
    return recipe.distillation if isinstance(recipe, Recipe) else None


def read_model_config(model: ModelConfig) -> EncoderDecoderConfig:
    """The pair a recipe trains, from config.json files or GGUF headers; of a hub name only config.json is fetched."""
    if model.path is not None:
        return read_config(_header(model.path))[0]
    assert model.adapt is not None
    settings = model.adapt.model_dump(exclude={"encoder", "decoder", "seed"})
    donors = [_header(name) for name in (model.adapt.encoder, model.adapt.decoder) if name is not None]
    configs = [donor_family(donor.config).read_config(donor.config) for donor in donors]
    # Whether the tokenizer adds BOS changes a token of each source, and no size.
    return plan_adaptation(configs[0], configs[1] if len(configs) > 1 else None, Choices(**settings)).config


def _header(name: str) -> Checkpoint:
    path = Path(name).expanduser()
    if path.exists() or name.count("/") != 1 or path.suffix == ".gguf":
        return resolve(name)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return resolve(Path(hf_hub_download(name, "config.json")).parent)
    except (HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{name} is no local folder and the hub does not give its config.json ({type(error).__name__}: {error}); "
            "a folder with that one file is enough to plan with"
        ) from error


def parts_of(config: EncoderDecoderConfig) -> dict[str, int]:
    """Parameters by part; a head of its own is taken out of the embeddings, a tied one is 0."""
    counts = parameter_counts(config)
    untied = config.tie_word_embeddings == "none"
    head = config.decoder.vocab_size * config.decoder.hidden_size if untied else 0
    total = counts.pop("total")
    return {**counts, "embeddings": counts["embeddings"] - head, "head": head, "total": total}


def encoder_parts(config: EncoderDecoderConfig) -> dict[str, int]:
    """`parts_of` a reward model: the encoder with its embeddings."""
    weights = [w for w in weights_of(config.model_dump_json()) if w.name.startswith("model.encoder.")]
    tables = sum(w.size for w in weights if w.is_table)
    total = sum(w.size for w in weights)
    rest = dict.fromkeys(("decoder", "cross_attention", "head"), 0)
    return {"embeddings": tables, "encoder": total - tables, **rest, "total": total}


class _Draft:
    """One variant of a run: what is asked for, or what it would be with something changed."""

    def __init__(
        self,
        recipe: Planned,
        config: EncoderDecoderConfig,
        device: Device,
        num_devices: int,
        efficiency: float,
        example_lengths: tuple[int, int] | None,
        teacher_checkpoint: Checkpoint | None,
        frozen_encoder: bool = False,
    ) -> None:
        self.teacher_checkpoint = teacher_checkpoint
        self.recipe, self.config, self.device = recipe, config, device
        self.num_devices, self.efficiency = num_devices, efficiency
        self.example_lengths, self.frozen_encoder = example_lengths, frozen_encoder
        self.shards = max(num_devices // recipe.data_parallel_replicas, 1)
        self.load = load_of(recipe, config, example_lengths)

    def changed(self, **changes: Any) -> _Draft:
        """The same with fields of the recipe (dotted with __), `num_devices` or `frozen_encoder` changed."""
        num_devices = changes.pop("num_devices", self.num_devices)
        frozen = changes.pop("frozen_encoder", self.frozen_encoder)
        data = {k.removeprefix("data__"): v for k, v in changes.items() if k.startswith("data__")}
        rest = {k: v for k, v in changes.items() if not k.startswith("data__")}
        recipe = self.recipe.model_copy(update={"data": self.recipe.data.model_copy(update=data), **rest})
        lengths = self.example_lengths
        if lengths is not None:
            lengths = min(lengths[0], recipe.data.source_length), min(lengths[1], recipe.data.target_length)
        settings = (num_devices, self.efficiency, lengths, self.teacher_checkpoint, frozen)
        return _Draft(recipe, self.config, self.device, *settings)

    def with_precomputed_reference(self) -> _Draft:
        """The same without a second model in the loop."""
        assert isinstance(self.recipe, PreferenceRecipe)
        preference = self.recipe.preference.model_copy(update={"reference": "precomputed"})
        return self.changed(preference=preference)

    @property
    def checkpointing(self) -> Any:
        return self.recipe.activation_checkpointing

    @property
    def tokens_per_step(self) -> int:
        return self.load.rows * self.recipe.accumulate_batches * self.load.tokens_per_row

    @property
    def setup(self) -> Setup:
        rows, row = self.load.rows, self.load.row
        return Setup(
            rows=rows,
            source_length=row.source_positions,
            target_length=row.target_positions,
            scored=rows * row.scored,
            precision=self.recipe.precision,
            checkpointing=self.checkpointing,
            shards=self.shards,
            accumulates=self.recipe.accumulate_batches > self.num_devices,
            is_cpu=self.device.is_cpu,
            has_ema=self.recipe.ema_decay is not None,
            teacher=self.teacher,
            matched_layers=self._matched_layers,
            answers=row.answers,
            reference_parameters=parts_of(self.config)["total"] if self._has_reference_model else 0,
            is_encoder_only=self._is_encoder_only,
        )

    @property
    def _is_encoder_only(self) -> bool:
        return isinstance(self.recipe, RewardRecipe)

    @property
    def _has_reference_model(self) -> bool:
        if not isinstance(self.recipe, PreferenceRecipe):
            return False
        return self.recipe.preference.kind != "orpo" and self.recipe.preference.reference == "model"

    @property
    def _matched_layers(self) -> int:
        distillation = _distillation(self.recipe)
        if distillation is None or distillation.hidden_states is None:
            return 0
        layers = distillation.hidden_states.layers
        return self.config.decoder.num_hidden_layers if layers is None else len(layers)

    @cached_property
    def teacher(self) -> Teacher | None:
        return (
            None if self.teacher_checkpoint is None else plan_teacher(self.teacher_checkpoint, self.load.row)
        )

    @cached_property
    def peak(self) -> int:
        return max(peak_memory(self.config, self.setup, trained).total for _, _, trained in self._periods())

    @property
    def fits(self) -> bool:
        return self.peak <= int(USABLE_SHARE * self.device.memory_bytes)

    def largest_rows(self) -> int:
        """The most rows of a batch that fit, by bisection; 0 if not even one does."""
        low, high = 0, 1
        while high <= 2**20 and self.with_rows(high).fits:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.with_rows(middle).fits else (low, middle)
        return low

    def with_rows(self, rows: int, **changes: Any) -> _Draft:
        """The same with another size of batches, as `load.rows_key` counts it; `changes` as for `changed`."""
        return self.changed(**{self.load.rows_key.replace(".", "__"): rows, **changes})

    def _periods(self) -> list[tuple[str, int, Trained]]:
        warmup, steps = self.recipe.cross_attention_warmup_steps, self.recipe.steps
        everything: Trained = "all_but_encoder" if self.frozen_encoder else "everything"
        periods: list[tuple[str, int, Trained]] = []
        if warmup:
            periods.append(("cross-attention alone", warmup, "cross_attention"))
        if steps > warmup:
            periods.append(("everything", steps - warmup, everything))
        return periods

    @property
    def phases(self) -> tuple[Phase, ...]:
        return tuple(self._phase(*period) for period in self._periods())

    def _phase(self, name: str, steps: int, trained: Trained) -> Phase:
        weights = setup_weights(self.config, self.setup)
        if self._is_encoder_only:
            learned = sum(w.size for w in weights)
            one = encoder_flops(self.config, self.load.row, checkpointing=self.checkpointing)
        else:
            learned = sum(w.size for w in weights if gets_gradient(self.config, w.name, trained))
            one = training_flops(
                self.config, self.load.row, trained=trained, checkpointing=self.checkpointing
            )
        flops = one.times(self.load.rows * self.recipe.accumulate_batches)
        compute, update, communication = self._seconds(flops, weights, learned)
        memory = peak_memory(self.config, self.setup, trained)
        return Phase(name, steps, trained, learned, memory, flops, compute, update, communication)

    def _seconds(
        self, flops: Flops, weights: Iterable[Weight], learned: int
    ) -> tuple[float | None, float | None, float | None]:
        """Computation, update and communication of one step on one device."""
        device = self.device
        is_float32 = self.recipe.precision == "float32"
        rate = device.float32_flops_per_s if is_float32 else device.bfloat16_flops_per_s
        if rate is None or device.memory_bytes_per_s is None:
            return None, None, None
        rows = self.load.rows * self.recipe.accumulate_batches
        taught = 0 if self.teacher is None else self.teacher.flops_per_row * rows
        if self._has_reference_model:
            taught += training_flops(self.config, self.load.row).forward * rows
        compute = (flops.total + taught) / self.num_devices / (rate * self.efficiency)
        update = UPDATE_BYTES * learned / self.shards / device.memory_bytes_per_s
        if self.num_devices == 1 or device.link_bytes_per_s is None:
            return compute, update, 0.0
        total = sum(w.size for w in weights)
        batches = -(-self.recipe.accumulate_batches // self.num_devices)
        number = 4 if is_float32 else 2
        share = (self.shards - 1) / self.shards
        # For each micro-batch: weights gathered forward and backward, gradients in float32 summed and scattered.
        moved = batches * share * (2 * number * total + 4 * learned)
        if (
            self.num_devices > self.shards
        ):  # copies of the weights: their shares of the gradient are summed, once
            moved += 2 * 4 * learned / self.shards
        return compute, update, moved / device.link_bytes_per_s


def _changes(draft: _Draft, largest_rows: int) -> list[Change]:
    """What makes the run smaller, most comfortable first."""
    data, batches = draft.recipe.data, draft.recipe.accumulate_batches
    found: list[Change] = []

    def add(what: str, other: _Draft) -> None:
        if other.peak < draft.peak:
            found.append(Change(what, draft.peak - other.peak, other.fits))

    key, size = draft.load.rows_key, draft.load.rows // draft.load.rows_of_key
    divisors = [rows for rows in range(1, size) if size % rows == 0]
    if divisors:
        fitting = [rows for rows in divisors if rows <= largest_rows]
        rows = max(fitting, default=1)
        more = batches * size // rows
        add(
            f"{key}={rows} accumulate_batches={more} (the same tokens a step)",
            draft.with_rows(rows, accumulate_batches=more),
        )
    if draft.setup.reference_parameters:
        add("preference.reference=precomputed", draft.with_precomputed_reference())
    for kind in ("selective", "full"):
        if draft.checkpointing == "none" or (draft.checkpointing, kind) == ("selective", "full"):
            add(f"activation_checkpointing={kind}", draft.changed(activation_checkpointing=kind))
    counts = (
        [n for n in range(draft.num_devices + 1, batches + 1) if batches % n == 0]
        if not draft.device.is_cpu
        else []
    )
    if counts:
        number = next((n for n in counts if draft.changed(num_devices=n).fits), counts[-1])
        add(f"--gpus {number}", draft.changed(num_devices=number))
    if draft.recipe.precision == "float32":
        add("precision=bfloat16", draft.changed(precision="bfloat16"))
    source, target = data.source_length // 2, data.target_length // 2
    if source and target:
        add(
            f"data.source_length={source} data.target_length={target} (shorter rows)",
            draft.changed(data__source_length=source, data__target_length=target),
        )
    if not draft.config.tie_stacks and isinstance(draft.recipe, Recipe):
        add(
            "a frozen encoder: model.encoder.requires_grad_(False) before twofold.train.fit",
            draft.changed(frozen_encoder=True),
        )
    if draft.checkpointing != "full":
        add(
            f"{key}=1 activation_checkpointing=full, the least without more devices",
            draft.with_rows(1, activation_checkpointing="full"),
        )
    return found


def _problems(draft: _Draft) -> list[str]:
    recipe, config = draft.recipe, draft.config
    found = []
    if recipe.accumulate_batches % draft.num_devices:
        found.append(
            f"accumulate_batches={recipe.accumulate_batches} cannot be dealt evenly to {draft.num_devices} devices; "
            "make it a multiple of their number"
        )
    replicas = recipe.data_parallel_replicas
    if draft.num_devices % replicas:
        found.append(f"data_parallel_replicas={replicas} does not divide {draft.num_devices} devices")
    widths = config.encoder.hidden_size, config.decoder.hidden_size
    is_random = recipe.model.adapt is not None and (
        recipe.model.adapt.start == "random" or widths[0] != widths[1]
    )
    if is_random and config.layout == "separate" and not recipe.cross_attention_warmup_steps:
        found.append(
            "cross-attention starts at random and nothing trains it alone first; consider "
            "cross_attention_warmup_steps=1000"
        )
    if recipe.precision == "float32" and not draft.device.is_cpu:
        found.append(
            "precision float32 leaves the tensor cores unused (rates of plain float32 are taken); precision=bfloat16 "
            "computes in bfloat16 and keeps float32 weights"
        )
    for side, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        if stack.attention_dropout and stack.attn_logit_softcapping:
            found.append(
                f"{side}: attention dropout with a soft-cap runs the eager attention, whose T x S weights are not "
                "in these bytes"
            )
    if isinstance(recipe, Recipe) and recipe.data.objective.name in ("span_corruption", "ul2"):
        found.append(
            "sentinels that the tokenizer lacks are added to the vocabulary, and are not counted here"
        )
    return found
