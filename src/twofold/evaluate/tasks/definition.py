"""What a task over local files is: where its examples are, and whose wording and scoring it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from twofold.evaluate.tasks.lines import Doc, Docs, Fields, Row, json_lines


@dataclass(frozen=True, slots=True)
class Split:
    """Examples in files below the data folder."""

    file: str | tuple[str, ...]
    fields: Fields
    make: Callable[[Doc], Doc] = dict
    """Raises ValueError for an example that cannot be read."""
    rows: Callable[..., Iterator[Row]] = json_lines
    """Takes the files."""

    @property
    def files(self) -> tuple[str, ...]:
        return (self.file,) if isinstance(self.file, str) else self.file

    def docs(self, data: Path) -> Docs:
        """Its examples; nothing is read yet."""
        files = [data / name for name in self.files]
        return Docs(name=str(files[0]), rows=partial(self.rows, *files), fields=self.fields, make=self.make)


@dataclass(frozen=True, kw_only=True, slots=True)
class Local:
    """One task over local files."""

    test: Split
    shots: Split | None = None
    """What few-shot examples are drawn from; None: the other examples of `test`."""
    metric: str
    """The one that stands for the task, as the harness writes it: with its filter where it has one."""
    scale: float = 1.0
    """The metric's best value; 1 also for a perplexity and for bits, where less is better."""
    folder: str | None = None
    """Of the harness's task file, below `lm_eval/tasks`; None: `config` is the whole definition."""
    base: str | None = None
    """The name there; default: the task's own."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What is set in place of the task file's."""
    shots_by: str | None = None
    """Few-shot examples share this field with the question."""

    @property
    def files(self) -> tuple[str, ...]:
        return self.test.files + (self.shots.files if self.shots is not None else ())


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalGroup:
    """Several local tasks with one score: the mean of `metric` over all their examples."""

    members: tuple[str, ...]
    metric: str
    scale: float = 1.0


def written(
    test: Split,
    shots: Split | None,
    score: Callable[[Doc, Sequence[Any]], dict[str, Any]],
    metrics: Mapping[str, Any],
    *,
    max_new_tokens: int,
    scale: float,
) -> Local:
    """A task of our own, answered in one line; docs have "prompt" and "targets", the first for few-shot examples.

    Args:
        metrics: names and how values of examples become one; the first stands for the task.
    """
    config = {
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "targets",
        "process_results": score,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": max_new_tokens, "do_sample": False},
        "metric_list": [metric(name, how) for name, how in metrics.items()],
    }
    return Local(test=test, shots=shots, metric=next(iter(metrics)), scale=scale, config=config)


def metric(name: str, how: Any, *, higher_is_better: bool = True) -> dict[str, Any]:
    """An entry of the harness's `metric_list`."""
    return {"metric": name, "aggregation": how, "higher_is_better": higher_is_better}


def gold_bits(test: Split) -> Local:
    """A task of our own: bits per byte of the one right answer; docs have "prompt" and "target"."""
    config = {
        "output_type": "loglikelihood",
        "doc_to_text": "prompt",
        "doc_to_target": "target",
        "process_results": _bits,
        "metric_list": [metric("bits_per_byte", "bits_per_byte", higher_is_better=False)],
        "num_fewshot": 0,
    }
    return Local(test=test, metric="bits_per_byte", config=config)


def _bits(doc: Doc, results: Sequence[Any]) -> dict[str, Any]:
    ((logprob, _),) = results
    return {"bits_per_byte": (logprob, len(doc["target"].encode()))}
