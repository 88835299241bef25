"""Multiple choice by likelihood: which answer a pair takes to be the most likely to follow, nothing trained.

Questions are worded as in lm-evaluation-harness (zero-shot). The context is read by the encoder, once, and the choices
are continuations for the decoder; as everywhere, the pair's convention says what becomes of the last token in between.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twofold.data import Convention, collate
from twofold.data.convention import IGNORE_INDEX, Example, make_example
from twofold.data.tokenize import encode
from twofold.models import EncoderDecoder
from twofold.objectives.pair import Pair


@dataclass(frozen=True)
class Question:
    """A context, what may follow, and what does."""

    context: str
    choices: tuple[str, ...]
    """Without the space before them."""
    answer: int


@dataclass(frozen=True)
class Task:
    """Where questions come from, and how one record of the file becomes one."""

    file: str
    """JSON lines, under $TWOFOLD_DATA/benchmarks."""
    question: Callable[[Mapping[str, Any]], Question]
    is_per_character: bool = False
    """Log-likelihoods are divided by the length of the choice, for choices of unequal length."""


def _arc(record: Mapping[str, Any]) -> Question:
    # The file holds "Question: ...\n A. ...\n B. ...\nAnswer:", of which the harness shows the question alone.
    question, *choices = record["query"].removesuffix("\nAnswer:").split("\n ")
    return Question(f"{question}\nAnswer:", tuple(c.split(". ", 1)[1] for c in choices), record["gold"])


def _piqa(record: Mapping[str, Any]) -> Question:
    return Question(f"Question: {record['goal']}\nAnswer:", (record["sol1"], record["sol2"]), record["label"])


def _hellaswag(record: Mapping[str, Any]) -> Question:
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return Question(_plain(context), tuple(map(_plain, record["endings"])), int(record["label"]))


def _plain(text: str) -> str:
    """WikiHow's markup out of HellaSwag, as the harness has it (`hellaswag/utils.py`)."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _boolq(record: Mapping[str, Any]) -> Question:
    context = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
    return Question(context, ("no", "yes"), int(record["answer"]))


TASKS = {
    "arc_easy": Task("arc_easy-test.jsonl.gz", _arc),
    "piqa": Task("piqa-validation.jsonl.gz", _piqa),
    "hellaswag": Task("hellaswag-validation.jsonl.gz", _hellaswag, is_per_character=True),
    "boolq": Task("boolq-validation.jsonl.gz", _boolq),
}


def questions(task: Task, data: Path, count: int) -> list[Question]:
    """The first of a task's file; `data` is $TWOFOLD_DATA."""
    with gzip.open(data / "benchmarks" / task.file, "rt", encoding="utf-8") as lines:
        return [task.question(json.loads(line)) for line, _ in zip(lines, range(count), strict=False)]


def log_likelihoods(model: EncoderDecoder, question: Question) -> Tensor:
    """Of each choice after the context, see `score`."""
    convention = Convention.of(model.config)
    context = encode(model.tokenizer, question.context)
    examples = []
    for choice in question.choices:
        # Cut from the whole, as a tokenizer may write a word after a space in another way than alone.
        whole = encode(model.tokenizer, f"{question.context} {choice}")
        examples.append(make_example(Pair(context, whole[len(context) :]), convention, ends=False))
    return score(model, examples)


@torch.no_grad()
def score(model: EncoderDecoder, examples: Sequence[Example]) -> Tensor:
    """Log-likelihoods of several targets after one source, nats summed over each; float64 [examples] on the CPU.

    Args:
        model: in eval mode.
        examples: of the same source, which the encoder reads once.
    """
    convention, device = Convention.of(model.config), next(model.parameters()).device
    batch = collate([[example] for example in examples], convention.pad_token_id).to(device)
    read = model.encode(batch.input_ids[:1], segment_ids=batch.segment_ids[:1])
    logits_BTV = model(
        decoder_input_ids=batch.decoder_input_ids,
        decoder_segment_ids=batch.decoder_segment_ids,
        encoder_output=read.select(torch.zeros(len(examples), dtype=torch.int64, device=device)),
    ).logits
    is_scored = batch.labels != IGNORE_INDEX
    chosen = logits_BTV.log_softmax(-1).gather(2, batch.labels.clamp(min=0)[:, :, None])[:, :, 0]
    return torch.where(is_scored, chosen, 0.0).double().sum(dim=1).cpu()


def pick(task: Task, question: Question, likelihoods: Tensor) -> int:
    """The choice that a model gives."""
    if not task.is_per_character:
        return int(likelihoods.argmax())
    lengths = torch.tensor([len(choice) for choice in question.choices])
    return int((likelihoods / lengths).argmax())
