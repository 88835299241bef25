"""A model card as Markdown, with the front matter that the Hugging Face hub reads, from the history of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from twofold.config import EncoderDecoderConfig
from twofold.config.history import Averaged, Averaging, Donor, History, Origin, SourceUse, Training
from twofold.models.counts import parameter_counts

_STARTS = {
    "published": "both sides copied, every encoder layer open at once (arXiv 2504.06225)",
    "scaled_copy": "both sides copied, the output of cross-attention scaled down",
    "random": "both sides copied, cross-attention at random",
    "lossless": "with a causal encoder the pair computes exactly what its donor does",
    "stitched": "what the decoder reads of the source is fitted in closed form on text",
}
_STAGES = {
    "pretrain": "Training on running text",
    "sft": "Tuning on given answers (SFT)",
    "dpo": "Tuning on preferences",
    "reward": "Training of a reward model",
    "grpo": "Reinforcement learning",
    "gkd": "Distillation on its own samples",
    "fit": "Training",
}
_LIBRARIES = {"twofold": "twofold", "adapter": "peft"}
_ENGINE = """import twofold

engine = twofold.Engine(twofold.load("FOLDER"))
print(engine.generate(["..."], max_new_tokens=128)[0].text)"""
_REWARD = """from twofold.posttrain.reward import load_reward_model

print(load_reward_model("FOLDER").score(["a question"], ["an answer"]))"""
_MERGED = """twofold merge BASE FOLDER -o merged"""
_PEFT = """import twofold
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM

model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained("BASE"), "FOLDER")"""
_TRANSFORMERS = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

model = AutoModelForSeq2SeqLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""


def render_card(
    history: History,
    config: EncoderDecoderConfig,
    *,
    architecture: str = "EncoderDecoder",
    format: str = "twofold",
) -> str:
    """The card. Arguments as for `twofold.checkpoint.card.write_card`."""
    is_pair = architecture == "EncoderDecoder"
    sections = [
        f"# {_title(history, is_pair)}",
        _shape(config, is_pair),
        "## Where it comes from",
        *_origin(history.origin),
    ]
    if history.phases:
        sections += ["## What was done", *_phases(history.phases)]
    else:
        sections.append("Nothing has been trained yet.")
    sections += ["## How to use it", *_usage(architecture, format), "## Licence", _licence(history)]
    return f"---\n{_front_matter(history, is_pair, format)}---\n\n" + "\n\n".join(sections) + "\n"


def _title(history: History, is_pair: bool) -> str:
    names = [donor.name.rpartition("/")[2] for donor in _donors(history)]
    kind = "encoder-decoder" if is_pair else "reward model"
    return f"{' and '.join(dict.fromkeys(names))}: {kind}" if names else kind.capitalize()


def _shape(config: EncoderDecoderConfig, is_pair: bool) -> str:
    encoder, decoder = config.encoder, config.decoder
    text = f"{encoder.num_hidden_layers} encoder layers of width {encoder.hidden_size}"
    masks = Counter(config.encoder_mask)
    open_layers = ", ".join(f"{count} {mask}" for mask, count in sorted(masks.items()))
    masks_text = f"Masks of the encoder: {open_layers}"
    if config.encoder_future_share < 1:
        masks_text += f"; later tokens get a share of attention of at most {config.encoder_future_share:g}"
    if not is_pair:
        return (
            f"An encoder with a head that gives a prompt and its reply one number: {text}. {masks_text}. "
            "Rewards are for comparison: sigmoid(a - b) is how likely reply a is preferred to b."
        )
    first = "BOS" if config.decoder_start == "bos" else "the last source token"
    return (
        f"{parameter_counts(config)['total']:,} parameters: {text}, {decoder.num_hidden_layers} decoder layers of "
        f"width {decoder.hidden_size}, {decoder.vocab_size:,} tokens. {masks_text}. The "
        f"decoder reads the source in the layout `{config.layout}` (`{config.reads}`), and its first input is {first}."
    )


def _origin(origin: Origin | None) -> Iterator[str]:
    if origin is None:
        yield "A model that was made in memory; nothing is known of it."
        return
    if origin.kind == "checkpoint":
        yield f"The encoder-decoder {_linked(origin.donors[0])}, as it was found."
        return
    roles = {"both": "encoder and decoder", "encoder": "encoder", "decoder": "decoder"}
    named = ", ".join(f"{_linked(donor)} ({roles[donor.role]})" for donor in origin.donors)
    yield f"Made of {named} with `twofold adapt`."
    lines = [f"Start: `{origin.start}`: {_STARTS.get(origin.start or '', 'not known here')}."]
    lines += [f"Cross-attention: {origin.cross_attention}."] if origin.cross_attention else []
    for side, layers in (("encoder", origin.encoder_layers), ("decoder", origin.decoder_layers)):
        if layers is not None:
            lines.append(
                f"Layers of the donor in the {side}: {', '.join(map(str, layers))} ({len(layers)} in all)."
            )
    if origin.fitted_tokens is not None:
        lines.append(f"Fitted on {origin.fitted_tokens:,} tokens.")
    yield "\n".join(f"- {line}" for line in lines)
    if origin.versions:
        yield _versions(origin.versions)


def _linked(donor: Donor) -> str:
    return f"[{donor.name}](https://huggingface.co/{donor.name})" if donor.is_on_hub else _quoted(donor.name)


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "'") + "`"


def _phases(phases: Sequence[Training | Averaging], level: int = 3) -> Iterator[str]:
    for number, phase in enumerate(phases, start=1):
        heading = f"{'#' * level} {number}. "
        if isinstance(phase, Averaging):
            yield f"{heading}Mean of {len(phase.models)} models"
            yield from _averaging(phase, level)
        else:
            yield heading + _STAGES.get(phase.stage, f"Stage {phase.stage}")
            yield from _training(phase)


def _averaging(phase: Averaging, level: int) -> Iterator[str]:
    total = sum(model.weight for model in phase.models)

    def line(model: Averaged) -> str:
        step = "" if model.step is None else f", after step {model.step:,}"
        return f"- {_quoted(model.name)}: {model.weight / total:.1%}{step}"

    yield "Averaged tensor by tensor, in float32:"
    yield "\n".join(map(line, phase.models))
    for model in phase.models:
        if model.origin is not None or model.phases:
            yield f"{'#' * (level + 1)} {_quoted(model.name)}"
            if model.origin is not None:
                yield from _origin(model.origin)
            yield from _phases(model.phases, level + 2)
    yield _versions(phase.versions)


def _training(phase: Training) -> Iterator[str]:
    steps = phase.settings.get("steps", phase.step)
    done = f"{phase.step:,}" if phase.step == steps else f"{phase.step:,} of {steps:,}"
    optimizer = phase.settings.get("optimizer", {})
    schedule = phase.settings.get("schedule", {})
    rows = {
        "stage": f"`{phase.stage}`" + _variant(phase.settings),
        "steps": done,
        "tokens, both sides": f"{phase.tokens:,}",
        "examples": None if phase.examples_drawn is None else f"{phase.examples_drawn:,}",
        "learning rate": f"{optimizer.get('learning_rate', float('nan')):.3g} at most, "
        f"{schedule.get('warmup_steps', 0)} steps of warm-up, then {schedule.get('decay', 'cosine')}",
        "trained parameters": f"{phase.num_trainable:,} of {phase.num_parameters:,}",
        "computed in": f"{phase.settings.get('precision', 'float32')} on {phase.device}",
        "weights": "moving average over the steps" if phase.weights == "moving average" else None,
    }
    yield _table(("", ""), [(name, value) for name, value in rows.items() if value is not None])
    if phase.data:
        yield "Data:"
        yield _data_table(phase.data)
    if phase.held_out:
        yield f"Held out: {'; '.join(_source(source) for source in phase.held_out)}."
    yield _results(phase)
    first = {key: phase.settings[key] for key in ("stage", "model", "data") if key in phase.settings}
    chosen = _without_nulls(first | phase.settings)
    recipe = yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True).strip()
    yield f"<details><summary>The recipe, defaults included</summary>\n\n```yaml\n{recipe}\n```\n\n</details>"
    yield _versions(phase.versions)


def _without_nulls(value: Any) -> Any:
    """What is set to nothing, and empty lists, only make a recipe longer."""
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None and v not in ([], {}, ())}
    return [_without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


def _variant(settings: dict[str, Any]) -> str:
    """What the stage minimises, where it has several."""
    objective = settings.get("data", {}).get("objective", {}).get("name")
    kind = settings.get("preference", {}).get("kind")
    variant = objective or kind
    return "" if variant in (None, settings.get("stage")) else f", `{variant}`"


def _data_table(sources: Sequence[SourceUse]) -> str:
    drawn = sum(source.tokens_drawn or 0 for source in sources)
    columns = ["source", "examples there", "tokens there"]
    is_mixture = len(sources) > 1 and drawn > 0
    if is_mixture:
        columns += ["weight", "share of the tokens trained on"]
    rows = []
    for source in sources:
        row = [_source_name(source), _number(source.records), _number(source.tokens)]
        if is_mixture:
            weight = "" if source.weight is None else f"{source.weight:g}"
            row += [weight, f"{(source.tokens_drawn or 0) / drawn:.1%}"]
        rows.append(tuple(row))
    return _table(tuple(columns), rows)


def _source(source: SourceUse) -> str:
    counted = "" if source.records is None else f" ({source.records:,} examples)"
    return _source_name(source) + counted


def _source_name(source: SourceUse) -> str:
    if source.is_on_hub:
        return f"[{source.name}](https://huggingface.co/datasets/{source.name})"
    return _quoted(source.name)


def _results(phase: Training) -> str:
    reports = phase.reports
    names = list(dict.fromkeys(name for report in reports.values() for name in report))
    labels = {
        "train": "last step",
        "held_out": "held out",
        "held_out_average": "held out, moving average of the weights",
    }
    rows: list[tuple[str, ...]] = []
    if phase.first_loss is not None:
        rows.append(("first step", f"{phase.first_loss:.4g}", *[""] * (len(names) - 1)))
    if phase.late_loss is not None and phase.step >= 10:
        rows.append(("mean of the last tenth", f"{phase.late_loss:.4g}", *[""] * (len(names) - 1)))
    if phase.first_held_out_loss is not None:
        rows.append(("held out, before", f"{phase.first_held_out_loss:.4g}", *[""] * (len(names) - 1)))
    for key, label in labels.items():
        if key in reports:
            report = reports[key]
            rows.append((label, *(f"{report[name]:.4g}" if name in report else "" for name in names)))
    return _table(("result", *(name.replace("_", " ") for name in names)), rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _number(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


def _versions(found: dict[str, str]) -> str:
    return "Versions: " + ", ".join(f"{name} {number}" for name, number in found.items()) + "."


def _usage(architecture: str, format: str) -> Iterator[str]:
    if architecture != "EncoderDecoder":
        yield f"```python\n{_REWARD}\n```"
        return
    if format == "adapter":
        yield "An adapter alone: it is added to the model that it was trained on, BASE."
        yield f"```bash\n{_MERGED}\n```"
        yield "With PEFT:"
        yield f"```python\n{_PEFT}\n```"
        return
    yield f"```python\n{_ENGINE}\n```"
    if format == "twofold":
        yield "With transformers, once twofold is imported:"
        yield f"```python\nimport twofold\n{_TRANSFORMERS}\n```"
    else:
        yield "With transformers alone:"
        yield f"```python\n{_TRANSFORMERS}\n```"


def _licence(history: History) -> str:
    donors = _donors(history)
    if not donors:
        return "Not known."
    stated = [f"{_linked(donor)}: {donor.license or 'not stated in its files'}" for donor in donors]
    text = "Of what it was made from: " + "; ".join(dict.fromkeys(stated)) + "."
    if history.phases:
        text += " Licences of the data are not recorded here; look at them before you hand the model on."
    return text


def _donors(history: History) -> list[Donor]:
    origins = [history.origin]
    for phase in history.phases:
        if isinstance(phase, Averaging):
            origins += [model.origin for model in phase.models]
    return [donor for origin in origins if origin is not None for donor in origin.donors]


def _all_trainings(phases: Sequence[Training | Averaging]) -> Iterator[Training]:
    for phase in phases:
        if isinstance(phase, Training):
            yield phase
        else:
            for model in phase.models:
                yield from _all_trainings(model.phases)


def _front_matter(history: History, is_pair: bool, format: str) -> str:
    from huggingface_hub import ModelCardData

    trainings = list(_all_trainings(history.phases))
    hub_sources = [s.name for phase in trainings for s in phase.data if s.is_on_hub]
    donors = _donors(history)
    licences = {donor.license for donor in donors}
    licence = None if not licences or None in licences else licences.pop() if len(licences) == 1 else "other"
    stages = dict.fromkeys(phase.stage for phase in trainings)
    data = ModelCardData(
        library_name=_LIBRARIES.get(format, "transformers"),
        pipeline_tag="text-generation" if is_pair else "text-classification",
        base_model=list(dict.fromkeys(donor.name for donor in donors if donor.is_on_hub)) or None,
        license=licence,
        datasets=list(dict.fromkeys(hub_sources)) or None,
        tags=["twofold", "encoder-decoder" if is_pair else "reward-model", *stages],
    )
    text: str = data.to_yaml()
    return text if text.endswith("\n") else text + "\n"
