"""Rows of SuperGLUE: from local files, in the formats they are commonly kept in, or from the hub.

| task | files, each also as .gz |
|---|---|
| any | `super_glue-TASK-train.jsonl`, `super_glue-TASK-validation.jsonl`, with the hub's fields |
| boolq | `boolq-train.jsonl` (requests with `query`, `choices`, `gold`), `boolq-validation.jsonl` (`passage`, `question`, `answer`); each may be of either kind |
| rte | `rte/train.tsv`, `rte/dev.tsv`, of GLUE |
| wic | `wic/train.data.txt` with `wic/train.gold.txt`, and the same for dev |

`winograd_wsc.jsonl`, which goes around beside these, is WSC273: another set than SuperGLUE's WSC, without training split.
It is not read.
"""  # noqa: E501

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from twofold.evaluate.superglue.tasks import TASKS, Example, Row

Split = Literal["train", "validation"]
Located = tuple[str, Row]
"""Where a row stands, and the row with the hub's fields."""

HUB = "aps/super_glue"


class Missing(Exception):
    """A task's data is not to be had."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """A task's examples."""

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    origin: str
    """The folder, or the hub's data set."""
    n_shared: int
    """Training examples left out because the dev set has them."""


class Source:
    """Where examples come from.

    Args:
        data: folder with files as above, or with a folder `benchmarks` that has them. A task that it does not have
            whole, both splits, is taken from the hub. None: all are.

    Raises:
        FileNotFoundError: no such folder.
    """

    def __init__(self, data: Path | None) -> None:
        if data is not None and not data.is_dir():
            raise FileNotFoundError(f"there is no folder {data}; give the one with the task files, or none")
        nested = data / "benchmarks" if data is not None else None
        self._folder = nested if nested is not None and nested.is_dir() else data
        self._unreachable: str | None = None

    def splits(self, name: str) -> Splits:
        """Training and dev examples; what stands in both is left out of training.

        Raises:
            Missing: there are no files, and the hub cannot be asked; says why.
            ValueError: a row that cannot be used; names the file and the line.
        """
        absent = []
        if self._folder is not None:
            files = {split: _files(self._folder, name, split) for split in ("train", "validation")}
            absent = [split for split, (found, _) in files.items() if not found]
            if not absent:
                rows = {split: reader(found) for split, (found, reader) in files.items()}
                return _split(name, rows["train"], rows["validation"], origin=str(self._folder))
        try:
            train, dev = self._of_hub(name, "train"), self._of_hub(name, "validation")
        except Missing as error:
            if self._folder is None:
                raise
            lacking = " and ".join(absent)
            raise Missing(f"{self._folder} has no {lacking} split of {name}, and {error}") from error
        return _split(name, train, dev, origin=HUB)

    def _of_hub(self, name: str, split: Split) -> list[Located]:
        if self._unreachable is not None:
            raise Missing(self._unreachable)
        try:
            import datasets
        except ImportError as error:
            if self._folder is not None:
                raise Missing('the hub needs the datasets package: pip install "twofold[eval]"') from error
            raise ImportError(
                'reading SuperGLUE from the hub needs the datasets package: pip install "twofold[eval]"; or give a '
                "folder with its files"
            ) from error
        try:
            rows = datasets.load_dataset(HUB, name, split=split)
        except ConnectionError as error:
            self._unreachable = f"the hub cannot be reached ({error})"
            raise Missing(self._unreachable) from error
        return [(f"{HUB}, {name}, {split}, row {number}", row) for number, row in enumerate(rows)]


def _split(name: str, train: Iterable[Located], dev: Iterable[Located], *, origin: str) -> Splits:
    """Rows to examples.

    Raises:
        ValueError: a row that cannot be used, an empty split, or a label that no training example has.
    """
    task = TASKS[name]
    held_out = tuple(task.example(row, where) for where, row in dev)
    seen = {example.texts for example in held_out}
    found = [task.example(row, where) for where, row in train]
    kept = tuple(example for example in found if example.texts not in seen)
    if not kept or not held_out:
        raise ValueError(
            f"{origin}: {name} has {len(kept)} training and {len(held_out)} dev examples; give both some"
        )
    return Splits(train=kept, dev=held_out, origin=origin, n_shared=len(found) - len(kept))


Reader = Callable[[tuple[Path, ...]], Iterator[Located]]


def _files(folder: Path, name: str, split: Split) -> tuple[tuple[Path, ...], Reader]:
    """The files of a split with what reads them; no files: there are none."""
    short = "train" if split == "train" else "dev"
    candidates: list[tuple[tuple[str, ...], Reader]] = [
        ((f"super_glue-{name}-{split}.jsonl",), _read_hub_rows)
    ]
    match name:
        case "boolq":
            candidates.append(((f"boolq-{split}.jsonl",), _read_boolq))
        case "rte":
            candidates.append(((f"rte/{short}.tsv",), _read_rte))
        case "wic":
            candidates.append(((f"wic/{short}.data.txt", f"wic/{short}.gold.txt"), _read_wic))
    for names, reader in candidates:
        found = tuple(path for one in names if (path := _plain_or_packed(folder / one)) is not None)
        if len(found) == len(names):
            return found, reader
    return (), _read_hub_rows


def _plain_or_packed(path: Path) -> Path | None:
    return next((file for file in (path, path.with_name(path.name + ".gz")) if file.is_file()), None)


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Where each line stands, and the line; blank ones are left out."""
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as raw:
            for number, line in enumerate(raw, start=1):
                text = line.decode("utf-8").rstrip("\r\n")
                if text.strip():
                    yield f"{file}, line {number}", text
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}, line {number}: not UTF-8 text ({error})") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is a broken .gz file: {error}; get it anew") from error


def _objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in _lines(file):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be a JSON object, got {type(row).__name__}")
        yield where, row


def _read_hub_rows(files: tuple[Path, ...]) -> Iterator[Located]:
    yield from _objects(files[0])


def _read_boolq(files: tuple[Path, ...]) -> Iterator[Located]:
    for where, row in _objects(files[0]):
        yield where, _boolq_request(row, where) if "query" in row else _boolq_row(row, where)


def _boolq_row(row: Mapping[str, Any], where: str) -> Row:
    """A row of the original data, whose passages come without a title."""
    if not isinstance(row.get("answer"), bool):
        raise ValueError(f"{where}: boolq needs 'answer', true or false, got {row.get('answer')!r}")
    return {**row, "label": int(row["answer"])}


def _boolq_request(row: Mapping[str, Any], where: str) -> Row:
    """A harness request: "TITLE -- PASSAGE", a line "Question: ...", a line "Answer:"; `gold` is an index into
    `choices`. The title is left out, as the dev set has none."""
    query = row["query"] if isinstance(row["query"], str) else ""
    passage, found, question = query.removesuffix("\nAnswer:").rpartition("\nQuestion: ")
    choices, gold = row.get("choices"), row.get("gold")
    if not found or not isinstance(choices, list) or sorted(map(str, choices)) != ["no", "yes"]:
        raise ValueError(
            f"{where}: boolq needs a query with a passage, a line 'Question: ...' and a line 'Answer:', and the "
            f"choices yes and no; got {str(row)[:80]!r}"
        )
    if gold not in (0, 1):
        raise ValueError(f"{where}: boolq needs 'gold', 0 or 1, got {gold!r}")
    title, separator, text = passage.partition(" -- ")
    return {
        "passage": text if separator else title,
        "question": question,
        "label": int(choices[gold] == "yes"),
    }


def _read_rte(files: tuple[Path, ...]) -> Iterator[Located]:
    labels = TASKS["rte"].labels
    for number, (where, line) in enumerate(_lines(files[0])):
        cells = line.split("\t")
        if number == 0 and cells == ["index", "sentence1", "sentence2", "label"]:
            continue
        if len(cells) != 4 or cells[3] not in labels:
            raise ValueError(
                f"{where}: rte needs four columns, index, sentence1, sentence2 and label ({' or '.join(labels)}), "
                f"with tabs between them; got {line[:80]!r}"
            )
        yield where, {"premise": cells[1], "hypothesis": cells[2], "label": labels.index(cells[3])}


def _read_wic(files: tuple[Path, ...]) -> Iterator[Located]:
    data, gold = (list(_lines(file)) for file in files)
    if len(data) != len(gold):
        raise ValueError(
            f"{files[0]} has {len(data)} lines and {files[1]} {len(gold)}; they must have as many"
        )
    for (where, line), (where_gold, answer) in zip(data, gold, strict=True):
        cells = line.split("\t")
        if len(cells) != 5:
            raise ValueError(
                f"{where}: wic needs five columns, word, part of speech, positions and two sentences, with tabs "
                f"between them; got {line[:80]!r}"
            )
        if answer.strip() not in ("T", "F"):
            raise ValueError(f"{where_gold}: wic needs T or F, got {answer[:80]!r}")
        yield (
            where,
            {
                "word": cells[0],
                "sentence1": cells[3],
                "sentence2": cells[4],
                "label": int(answer.strip() == "T"),
            },
        )
