"""The same fine-tuning for several starts: three groups of tasks, prompts and answers of their own training sets.

The donor as it is, one stack of weights under a causal mask, is the arm to compare with ("control").
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.study.likelihood import score
from twofold.config.data import DataConfig, ObjectiveConfig, SourceConfig
from twofold.config.recipe import TrainSettings
from twofold.data import Convention
from twofold.data.chat import record_to_example
from twofold.models import EncoderDecoder
from twofold.models.flops import decoder_only_flops, forward_flops
from twofold.train import Callback, fit
from twofold.train.run import build_loaders
from twofold.train.step import StepResult

SOURCE_LENGTH, TARGET_LENGTH = 512, 256
"""Tokens of a row, in which several examples are packed; a step is one row."""

LONGEST_PROMPT = 700
"""Characters; longer ones are left out, so that a run takes minutes on one core."""

Record = dict[str, str]
"""prompt, completion."""


@dataclass(frozen=True)
class Group:
    """One kind of task."""

    records: Callable[[Path, Literal["train", "held_out"]], Iterator[Record]]
    """Of $TWOFOLD_DATA; training and held-out records are of the authors' own splits."""
    answers: tuple[str, ...] = ()
    """All completions there are, where there are few: then accuracy is measured too."""


def _lines(file: Path) -> Iterator[Any]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _scitldr(data: Path, part: Literal["train", "held_out"]) -> Iterator[Record]:
    split = {"train": "train", "held_out": "dev"}[part]
    for record in _lines(data / f"summarization/scitldr-a-{split}.jsonl.gz"):
        text = " ".join(record["source"])
        yield {"prompt": f"Summarize in one sentence:\n\n{text}", "completion": record["target"][0]}


def _boolq(data: Path, part: Literal["train", "held_out"]) -> Iterator[Record]:
    if part == "train":
        for record in _lines(data / "benchmarks/boolq-train.jsonl.gz"):
            prompt = record["query"].removesuffix("\nAnswer:")
            yield {"prompt": prompt, "completion": record["choices"][record["gold"]]}
        return
    for record in _lines(data / "benchmarks/boolq-validation.jsonl.gz"):
        prompt = f"{record['passage']}\nQuestion: {record['question']}?"
        yield {"prompt": prompt, "completion": "yes" if record["answer"] else "no"}


def _multi30k(data: Path, part: Literal["train", "held_out"]) -> Iterator[Record]:
    folder, split = data / "translation/multi30k", {"train": "train", "held_out": "val"}[part]
    with (
        gzip.open(folder / f"{split}.fr.gz", "rt", encoding="utf-8") as french,
        gzip.open(folder / f"{split}.en.gz", "rt", encoding="utf-8") as english,
    ):
        for fr, en in zip(french, english, strict=True):
            yield {"prompt": f"Translate into English: {fr.strip()}", "completion": en.strip()}


GROUPS = {
    "summaries": Group(_scitldr),
    "questions": Group(_boolq, answers=("yes", "no")),
    "translation": Group(_multi30k),
}
"""SciTLDR; BoolQ; Multi30k from French, which SmolLM2 reads a little."""


def held_out(group: Group, data: Path, count: int) -> list[Record]:
    """The first `count` held-out records that are short enough."""
    short = (r for r in group.records(data, "held_out") if len(r["prompt"]) <= LONGEST_PROMPT)
    return [record for record, _ in zip(short, range(count), strict=False)]


def measure(model: EncoderDecoder, group: Group, records: Sequence[Record]) -> dict[str, list[float]]:
    """For each record: `loss`, nats per target token; `correct`, 0 or 1, where all answers are known; and `flops`
    of reading it and writing the answer once, with `donor_flops` for the decoder-only model."""
    convention, config = Convention.of(model.config), model.config
    names = ["loss", "flops", "donor_flops", *(["correct"] if group.answers else [])]
    found: dict[str, list[float]] = {name: [] for name in names}
    for record in records:
        completions = [record["completion"], *(a for a in group.answers if a != record["completion"])]
        examples = [
            record_to_example({**record, "completion": completion}, model.tokenizer, convention)
            for completion in completions
        ]
        right, scores = examples[0], score(model, examples)
        lengths = len(right.source), right.decoder_length
        found["loss"].append(-scores[0].item() / len(right.target))
        found["flops"].append(forward_flops(config, *lengths))
        found["donor_flops"].append(decoder_only_flops(config.encoder, *lengths))
        if group.answers:
            found["correct"].append(float(scores.argmax() == 0))
    return found


class Tokens(Callback):
    """Counts what a run reads and how long it takes."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0

    def on_step(self, step: int, result: StepResult) -> None:
        self.tokens += result.real_tokens
        self.seconds += result.seconds


def tune(model: EncoderDecoder, group: Group, data: Path, settings: TrainSettings) -> Tokens:
    """Train on a group's records, in place."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.jsonl"
        with file.open("w", encoding="utf-8") as lines:
            for record in group.records(data, "train"):
                if len(record["prompt"]) <= LONGEST_PROMPT:
                    lines.write(json.dumps(record) + "\n")
        source = SourceConfig(path=str(file), prompt_field="prompt", completion_field="completion")
        config = DataConfig(
            sources=(source,),
            objective=ObjectiveConfig(name="supervised"),
            source_length=SOURCE_LENGTH,
            target_length=TARGET_LENGTH,
            rows_per_batch=1,
            max_length_action="skip",
            seed=settings.seed,
        )
        loader, _ = build_loaders(config, model)
        watch = Tokens()
        fit(model, loader, None, settings, Path(folder) / "run", [watch])
    return watch
