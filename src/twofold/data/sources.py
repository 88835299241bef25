"""Documents from files and datasets, behind one interface: a sequence of records."""

import glob
import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeAlias, cast, overload

import numpy as np

from twofold.config.data import DataConfig, SourceConfig

Record: TypeAlias = dict[str, Any]
"""{"text": str}, {"prompt": str, "completion": str} or {"messages": [{"role": str, "content": str}, ...]}."""

_FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}


class Mapped(Sequence[Record]):
    """A sequence of records read through a function, one at a time, so that large datasets stay on disk."""

    def __init__(self, length: int, get: Callable[[int], Record]) -> None:
        """`get` is called with indices from 0 to `length - 1`."""
        self._length = length
        self._get = get

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self._get(i) for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(f"record {index} of {self._length}")
        return self._get(index % self._length)


def open_source(config: SourceConfig) -> Sequence[Record]:
    """The documents of one source, in a fixed order (files by name).

    Text and jsonl are read into memory; `datasets` stay memory-mapped.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: a file that is not what its format says, a missing column, or no document at all.
        ImportError: `parquet` and `hf` need the extra `data`.
    """
    path = Path(config.path)
    if config.format == "hf" or (config.format == "auto" and _is_saved_dataset(path)):
        records: Sequence[Record] = _open_dataset(config, path)
    else:
        records = [record for file in _files(config) for record in _read_file(file, config)]
    if len(records) == 0:
        raise ValueError(f"source {config.path!r} has no documents; give a path with text in it")
    return records


def open_corpora(config: DataConfig) -> tuple[list[Sequence[Record]], list[Sequence[Record]]]:
    """All sources of a run: those to train on, and those held out (none if the config asks for none).

    `held_out_fraction` takes its share of documents from each source.
    """
    train = [open_source(source) for source in config.sources]
    if not config.held_out_fraction:
        return train, [open_source(source) for source in config.held_out]
    parts = [
        (corpus, split_documents(len(corpus), config.held_out_fraction, config.seed)) for corpus in train
    ]
    return (
        [_subset(corpus, kept) for corpus, (kept, _) in parts],
        [_subset(corpus, held_out) for corpus, (_, held_out) in parts],
    )


def _subset(corpus: Sequence[Record], indices: list[int]) -> Sequence[Record]:
    return Mapped(len(indices), lambda i: corpus[indices[i]])


def split_documents(num_documents: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split document indices into (train, held out), both ascending, each with at least one.

    Raises:
        ValueError: fewer than 2 documents, or a fraction outside (0, 1).
    """
    if num_documents < 2:
        raise ValueError(
            f"cannot hold out a share of {num_documents} document(s): at least 2 are needed; give held_out "
            "sources, or cut the text into more documents (document='paragraph' or 'line')"
        )
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    num_held_out = min(max(round(num_documents * fraction), 1), num_documents - 1)
    order = np.random.default_rng(seed).permutation(num_documents)
    return sorted(order[num_held_out:].tolist()), sorted(order[:num_held_out].tolist())


def _format_of(file: Path) -> str | None:
    name = file.with_suffix("") if file.suffix == ".gz" else file
    return _FORMATS.get(name.suffix.lower())


def _files(config: SourceConfig) -> list[Path]:
    path = Path(config.path)
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = (f for f in path.rglob("*") if not any(p.startswith(".") for p in f.relative_to(path).parts))
        files = sorted(f for f in inside if f.is_file())
        if config.format == "auto":
            files = [f for f in files if _format_of(f) is not None]
        elif config.format != "text":
            files = [f for f in files if _format_of(f) == config.format]
        if not files:
            raise FileNotFoundError(
                f"folder {config.path!r} has no files of format {config.format!r} (known: "
                f"{', '.join(_FORMATS)}, each also .gz); check the path or set format"
            )
        return files
    files = sorted(Path(match) for match in glob.glob(config.path, recursive=True) if Path(match).is_file())
    if not files:
        raise FileNotFoundError(
            f"no file, folder or match at {config.path!r}; check the path, or set format='hf' for a dataset "
            "of the hub"
        )
    return files


def _read_file(file: Path, config: SourceConfig) -> Iterator[Record]:
    """All records of one file."""
    kind = (_format_of(file) or "text") if config.format == "auto" else config.format
    if kind == "text" and config.is_supervised:
        raise ValueError(f"{file} is read as text, which has no columns; use jsonl or parquet, or set format")
    if kind == "parquet":
        yield from _read_parquet(file, config)
        return
    try:
        with _open_text(file) as handle:
            yield from _read_text(handle, config) if kind == "text" else _read_jsonl(handle, file, config)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{file} is not UTF-8 text (or a broken .gz file): {error}") from error


def _open_text(file: Path) -> TextIO:
    if file.suffix == ".gz":
        return cast(TextIO, gzip.open(file, "rt", encoding="utf-8-sig"))
    return open(file, encoding="utf-8-sig")


def _read_text(handle: TextIO, config: SourceConfig) -> Iterator[Record]:
    text = handle.read()
    if config.document == "line":
        parts = text.split("\n")
    elif config.document == "paragraph":
        parts = re.split(r"\n\s*\n", text)
    else:
        parts = [text]
    for part in parts:
        if part.strip():
            yield {"text": part}


def _read_jsonl(handle: TextIO, file: Path, config: SourceConfig) -> Iterator[Record]:
    for number, line in enumerate(handle, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            hint = "; the file looks like one JSON array, write one object per line" if line[0] == "[" else ""
            raise ValueError(f"{file}, line {number}: not JSON ({error}){hint}") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{file}, line {number}: each line must be a JSON object, got {type(row).__name__}"
            )
        yield _record(row, config, f"{file}, line {number}")


def _read_parquet(file: Path, config: SourceConfig) -> Iterator[Record]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('reading parquet needs pyarrow: pip install "twofold[data]"') from error
    table = pyarrow.parquet.ParquetFile(file)
    _check_columns(table.schema_arrow.names, config, str(file))
    number = 0
    for group in table.iter_batches(columns=_columns(config)):
        for row in group.to_pylist():
            yield _record(row, config, f"{file}, row {number}")
            number += 1


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _open_dataset(config: SourceConfig, path: Path) -> Sequence[Record]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError('format "hf" needs the datasets package: pip install "twofold[data]"') from error
    if _is_saved_dataset(path):
        dataset = datasets.load_from_disk(str(path))
        if isinstance(dataset, datasets.DatasetDict):
            if config.split not in dataset:
                raise ValueError(f"{config.path!r} has no split {config.split!r}; it has {sorted(dataset)}")
            dataset = dataset[config.split]
    else:
        dataset = datasets.load_dataset(config.path, split=config.split)
    _check_columns(dataset.column_names, config, config.path)
    return Mapped(len(dataset), lambda i: _record(dataset[i], config, f"{config.path}, row {i}"))


def _columns(config: SourceConfig) -> list[str]:
    if config.messages_field is not None:
        return [config.messages_field]
    if config.prompt_field is not None and config.completion_field is not None:
        return [config.prompt_field, config.completion_field]
    return [config.text_field]


def _check_columns(names: Sequence[str], config: SourceConfig, where: str) -> None:
    if missing := [name for name in _columns(config) if name not in names]:
        raise ValueError(
            f"{where}: no column {', '.join(map(repr, missing))}; it has {sorted(names)}: set text_field, "
            "prompt_field and completion_field, or messages_field"
        )


def _record(row: Mapping[str, Any], config: SourceConfig, where: str) -> Record:
    """The configured columns of a row under the names of `Record`, checked."""
    columns = _columns(config)
    _check_columns(list(row), config, where)
    wanted: type = list if config.messages_field is not None else str
    for name in columns:
        if not isinstance(row[name], wanted):
            raise ValueError(
                f"{where}: column {name!r} must be a {wanted.__name__}, got {type(row[name]).__name__}"
            )
    if config.messages_field is not None:
        return {"messages": row[columns[0]]}
    if config.is_supervised:
        return {"prompt": row[columns[0]], "completion": row[columns[1]]}
    return {"text": row[columns[0]]}
