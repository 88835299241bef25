"""SuperGLUE's tasks recast as classification: what the model reads, and what the labels are.

A row has the fields of the hub's `super_glue`, wherever it comes from. COPA asks which of two alternatives is right: a
text for each, one logit a text, the larger wins. The others read one text and have a logit for each label; WSC and
MultiRC say yes or no to a pronoun with a noun, and to a question with one of its answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Text:
    """What the model reads: the three parts in a row. Of one that is too long, the end of `body` is cut off."""

    head: str
    body: str
    tail: str

    def __str__(self) -> str:
        return self.head + self.body + self.tail


@dataclass(frozen=True, slots=True)
class Example:
    """A row as the model gets it."""

    texts: tuple[Text, ...]
    """One, or one for each alternative."""
    label: int
    """Index into `Task.labels`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task of SuperGLUE."""

    name: str
    """Of the hub's configuration."""
    labels: tuple[str, ...]
    """In the order of the logits, which is that of the hub's label numbers."""
    fields: Mapping[str, type]
    """What a row needs beside its `label`."""
    read: Callable[[Row], tuple[Text, ...]]
    """The texts of a row."""
    is_choice: bool = False
    """Every label is a text of its own, with one logit each."""

    @property
    def num_logits(self) -> int:
        """Of one text."""
        return 1 if self.is_choice else len(self.labels)

    def example(self, row: Row, where: str) -> Example:
        """A row as an example.

        Args:
            where: of the row, for messages.

        Raises:
            ValueError: a field is missing or of another type, or the label is none.
        """
        for name, kind in {**self.fields, "label": int}.items():
            if not isinstance(row.get(name), kind):
                found = type(row[name]).__name__ if name in row else "nothing"
                raise ValueError(f"{where}: {self.name} needs {name!r} of type {kind.__name__}, got {found}")
        if not 0 <= row["label"] < len(self.labels):
            raise ValueError(
                f"{where}: {self.name} has the labels 0 to {len(self.labels) - 1} ({', '.join(self.labels)}), "
                f"got {row['label']}"
            )
        try:
            return Example(self.read(row), int(row["label"]))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _boolq(row: Row) -> tuple[Text, ...]:
    return (Text("boolq passage: ", row["passage"], f" question: {row['question'].rstrip('?')}?"),)


def _cb(row: Row) -> tuple[Text, ...]:
    return (Text("cb premise: ", row["premise"], f" hypothesis: {row['hypothesis']}"),)


_COPA_QUESTIONS = {"cause": "What was the cause?", "effect": "What happened as a result?"}


def _copa(row: Row) -> tuple[Text, ...]:
    question = _COPA_QUESTIONS.get(row["question"])
    if question is None:
        raise ValueError(f"copa asks for a cause or an effect, got {row['question']!r}")
    choices = (row["choice1"], row["choice2"])
    return tuple(
        Text("copa premise: ", row["premise"], f" question: {question} answer: {c}") for c in choices
    )


def _multirc(row: Row) -> tuple[Text, ...]:
    tail = f" question: {row['question']} answer: {row['answer']}"
    return (Text("multirc paragraph: ", row["paragraph"], tail),)


def _rte(row: Row) -> tuple[Text, ...]:
    return (Text("rte premise: ", row["premise"], f" hypothesis: {row['hypothesis']}"),)


def _wic(row: Row) -> tuple[Text, ...]:
    head = f"wic word: {row['word']} sentence1: "
    return (Text(head, row["sentence1"], f" sentence2: {row['sentence2']}"),)


def _wsc(row: Row) -> tuple[Text, ...]:
    words, first = row["text"].split(), row["span2_index"]
    last = first + len(row["span2_text"].split()) - 1
    if not 0 <= first <= last < len(words):
        raise ValueError(
            f"span2_index {first} with {row['span2_text']!r} lies outside of the text's {len(words)} words"
        )
    # A text may have the same pronoun more than once, so the one that is meant is marked.
    words[first], words[last] = (
        f"*{words[first]}",
        (f"*{words[last]}" if first == last else words[last]) + "*",
    )
    return (Text("wsc text: ", " ".join(words), f" pronoun: {row['span2_text']} noun: {row['span1_text']}"),)


TASKS = {
    task.name: task
    for task in (
        Task(
            name="boolq",
            labels=("no", "yes"),
            fields={"passage": str, "question": str},
            read=_boolq,
        ),
        Task(
            name="cb",
            labels=("entailment", "contradiction", "neutral"),
            fields={"premise": str, "hypothesis": str},
            read=_cb,
        ),
        Task(
            name="copa",
            labels=("choice1", "choice2"),
            fields={"premise": str, "question": str, "choice1": str, "choice2": str},
            read=_copa,
            is_choice=True,
        ),
        Task(
            name="multirc",
            labels=("no", "yes"),
            fields={"paragraph": str, "question": str, "answer": str},
            read=_multirc,
        ),
        Task(
            name="rte",
            labels=("entailment", "not_entailment"),
            fields={"premise": str, "hypothesis": str},
            read=_rte,
        ),
        Task(
            name="wic",
            labels=("no", "yes"),
            fields={"word": str, "sentence1": str, "sentence2": str},
            read=_wic,
        ),
        Task(
            name="wsc",
            labels=("no", "yes"),
            fields={"text": str, "span1_text": str, "span2_text": str, "span2_index": int},
            read=_wsc,
        ),
    )
}
"""The seven of the paper's mean."""
