"""Records from files and datasets, one after another, so that no corpus has to fit into memory.

A reader gives raw records, cheaply and in a fixed order; `parse_record` reads one. The second part can fail for a
record of its own and is done by the processes that tokenise.
"""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypeAlias, cast

from twofold.config.data import SourceConfig
from twofold.config.template import fill_template, template_columns

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
_BOM = b"\xef\xbb\xbf"
_ARRAY_READ = 1 << 20
_LONGEST_ARRAY_ITEM = 1 << 28


class RawRecord(NamedTuple):
    """A record as it was found."""

    where: str
    """For messages: file and line, row or number."""

    kind: Literal["text", "json", "row"]
    content: bytes | Mapping[str, Any]
    """A text document or a line of JSON as bytes, or a row."""


class BadRecord(ValueError):
    """A record that cannot be used; `reason` is one of few, for counting."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class SourceReader:
    """The raw records of one source, in a fixed order: files by name, then as they stand there."""

    def __init__(self, config: SourceConfig, columns: Sequence[str] | None = None) -> None:
        """Find the files or the dataset; nothing is read yet.

        Args:
            columns: to read. None: those that `config` names.

        Raises:
            FileNotFoundError: nothing at `path`.
            ValueError: no such split, or a dataset without the columns that are asked for.
            ImportError: `parquet` and `hf` need the extra `data`.
        """
        self._config = config
        self._columns = _columns(config) if columns is None else list(columns)
        path = Path(config.path)
        self._dataset: Any = None
        self._files: list[Path] = []
        if config.format == "hf" or (config.format == "auto" and _is_saved_dataset(path)):
            self._dataset = _open_dataset(config, path, self._columns)
        else:
            self._files = _find_files(config)
        self._answers: Path | None = None
        if config.completion_path is not None:
            self._answers = _find_answers(self._files, config)
        self._sizes = [file.stat().st_size for file in self._files]
        self._done = 0
        self._open: IO[bytes] | None = None

    def identity(self) -> list[Any]:
        """What changes when the data does, JSON-able: names, sizes and times of files, or a fingerprint."""
        if self._dataset is not None:
            return [self._config.path, self._config.split, self._dataset._fingerprint, len(self._dataset)]
        files = self._files if self._answers is None else [*self._files, self._answers]
        return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    @property
    def share_read(self) -> float:
        """How much of the source has been read, 0 to 1, in bytes of the files or rows of the dataset."""
        total = len(self._dataset) if self._dataset is not None else sum(self._sizes)
        at = 0 if self._open is None or self._open.closed else self._open.tell()
        return min(1.0, (self._done + at) / max(total, 1))

    def __iter__(self) -> Iterator[RawRecord]:
        """All records.

        Raises:
            ValueError: a broken .gz file, a JSON array that cannot be read on, or a file without the columns.
        """
        self._done = 0
        if self._dataset is not None:
            for number, row in enumerate(self._dataset):
                self._done = number + 1
                yield RawRecord(f"{self._config.path}, row {number}", "row", row)
            return
        if self._answers is not None:
            yield from self._read_parallel(self._files[0], self._answers)
            return
        for file, size in zip(self._files, self._sizes, strict=True):
            kind = self._kind(file)
            if kind == "text" and self._config.is_supervised:
                raise ValueError(
                    f"{file} is read as text, which has no columns; use jsonl or parquet, or set format"
                )
            if kind == "parquet":
                yield from _read_parquet(file, self._columns)
            else:
                yield from self._read_bytes(file, kind)
            self._done += size

    def _read_parallel(self, prompts: Path, completions: Path) -> Iterator[RawRecord]:
        """Line by line; where one is empty on both sides there is no record."""
        with _lines_of(prompts) as first, _lines_of(completions) as second:
            for number, (prompt, completion) in enumerate(zip_longest(first, second), start=1):
                if prompt is None or completion is None:
                    longer = completions if prompt is None else prompts
                    raise ValueError(
                        f"{prompts} and {completions} must have as many lines, but {longer} goes on after line "
                        f"{number - 1}; give two files of one corpus"
                    )
                row = {"prompt": prompt.strip(), "completion": completion.strip()}
                if any(row.values()):
                    yield RawRecord(f"{prompts}, line {number}", "row", row)
        self._done = self._sizes[0]

    def _kind(self, file: Path) -> str:
        return (_format_of(file) or "text") if self._config.format == "auto" else self._config.format

    def _read_bytes(self, file: Path, kind: str) -> Iterator[RawRecord]:
        try:
            with open(file, "rb") as raw:
                self._open = raw
                # BufferedReader and GzipFile both peek and iterate over lines.
                handle = cast(io.BufferedReader, gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw)
                if handle.peek(3)[:3] == _BOM:
                    handle.read(3)
                if kind == "text":
                    yield from _read_text(handle, file, self._config.document)
                elif handle.peek(64).lstrip()[:1] == b"[":
                    yield from _read_array(handle, file)
                else:
                    yield from _read_lines(handle, file)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{file} is a broken .gz file: {error}; write it anew") from error
        finally:
            self._open = None


def parse_record(raw: RawRecord, config: SourceConfig) -> Record:
    """Read a record: the configured columns under the names of `Record`.

    Raises:
        BadRecord: says where and why.
    """
    if raw.kind == "text":
        assert isinstance(raw.content, bytes)
        text = _decoded(raw.content, raw.where)
        if not text.strip():
            raise BadRecord("empty text", f"{raw.where}: empty text")
        return {"text": text.replace("\r\n", "\n").replace("\r", "\n")}
    columns = _columns(config)
    return _record(parse_row(raw, columns), columns, config, raw.where)


def parse_row(raw: RawRecord, columns: Sequence[str]) -> list[Any]:
    """The values of some columns of a record that is no running text.

    Raises:
        BadRecord: says where and why.
    """
    row: Any = raw.content
    if isinstance(row, bytes):
        try:
            row = json.loads(_decoded(row, raw.where))
        except (json.JSONDecodeError, RecursionError) as error:
            raise BadRecord("not JSON", f"{raw.where}: not JSON ({error})") from error
    if not isinstance(row, Mapping):
        raise BadRecord("not an object", f"{raw.where}: must be a JSON object, got {type(row).__name__}")
    if missing := _missing(list(row), columns):
        raise BadRecord("no column", f"{raw.where}: {_no_columns(missing, list(row))}")
    return [row[name] for name in columns]


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f"{where}: not UTF-8 text ({error})") from error


def _record(values: Sequence[Any], columns: Sequence[str], config: SourceConfig, where: str) -> Record:
    if config.messages_field is not None:
        _check_messages(values[0], columns[0], where)
        return {"messages": values[0]}
    if config.prompt_template is not None or config.completion_template is not None:
        return _filled(dict(zip(columns, values, strict=True)), config, where)
    for name, value in zip(columns, values, strict=True):
        if not isinstance(value, str):
            raise BadRecord(
                "wrong type", f"{where}: column {name!r} must be a str, got {type(value).__name__}"
            )
    if not any(value.strip() for value in values):
        raise BadRecord("empty text", f"{where}: empty text")
    if config.is_supervised:
        # One column may be both sides.
        return {"prompt": values[0], "completion": values[-1]}
    return {"text": values[0]}


def _filled(row: Mapping[str, Any], config: SourceConfig, where: str) -> Record:
    try:
        prompt, completion = (fill_template(template, row) for template in config.templates)
    except ValueError as error:
        raise BadRecord("wrong type", f"{where}: {error}") from error
    if not (prompt or completion):
        raise BadRecord("empty text", f"{where}: empty text")
    return {"prompt": prompt, "completion": completion}


def _check_messages(messages: Any, name: str, where: str) -> None:
    is_conversation = isinstance(messages, list) and all(
        isinstance(turn, Mapping)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in messages
    )
    if not is_conversation:
        raise BadRecord(
            "wrong type",
            f"{where}: column {name!r} must be a list of {{role, content}} with text in both, got "
            f"{str(messages)[:80]!r}",
        )


def _columns(config: SourceConfig) -> list[str]:
    if config.messages_field is not None:
        return [config.messages_field]
    if config.is_supervised:
        return list(dict.fromkeys(c for template in config.templates for c in template_columns(template)))
    return [config.text_field]


def _missing(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    return [name for name in columns if name not in names]


def _no_columns(missing: Sequence[str], names: Sequence[str]) -> str:
    return (
        f"no column {', '.join(map(repr, missing))}; it has {sorted(names)}: set text_field, prompt_field "
        "or what other fields the source has to one of these"
    )


def _check_columns(names: Sequence[str], columns: Sequence[str], where: str) -> None:
    if missing := _missing(names, columns):
        raise ValueError(f"{where}: {_no_columns(missing, names)}")


def _read_text(
    handle: io.BufferedReader, file: Path, document: Literal["file", "line", "paragraph"]
) -> Iterator[RawRecord]:
    if document == "file":
        yield RawRecord(str(file), "text", handle.read())
        return
    lines: list[bytes] = []
    start = 1
    for number, line in enumerate(handle, start=1):
        if line.strip() and document == "line":
            yield RawRecord(f"{file}, line {number}", "text", line.rstrip(b"\r\n"))
        elif line.strip():
            if not lines:
                start = number
            lines.append(line)
        elif lines:
            yield RawRecord(f"{file}, line {start}", "text", b"".join(lines).rstrip(b"\r\n"))
            lines = []
    if lines:
        yield RawRecord(f"{file}, line {start}", "text", b"".join(lines).rstrip(b"\r\n"))


def _read_lines(handle: io.BufferedReader, file: Path) -> Iterator[RawRecord]:
    for number, line in enumerate(handle, start=1):
        if line.strip():
            yield RawRecord(f"{file}, line {number}", "json", line)


def _read_array(handle: io.BufferedReader, file: Path) -> Iterator[RawRecord]:
    """The items of a file that is one JSON array; a window moves over it, so the file may be of any size."""
    text = io.TextIOWrapper(handle, encoding="utf-8")
    decoder = json.JSONDecoder()
    try:
        window = ""
        while not window:
            window = text.read(_ARRAY_READ).lstrip()
        window = window[1:]  # the bracket
        number, is_first = 0, True
        while True:
            window = window.lstrip()
            try:
                if not window:
                    raise ValueError("the array does not end")
                if window[0] == "]":
                    return
                start = 0
                if not is_first:
                    if window[0] != ",":
                        raise ValueError(f"expected ',' or ']', found {window[0]!r}")
                    start = len(window) - len(window[1:].lstrip())
                item, end = decoder.raw_decode(window, start)
                if end == len(window):
                    raise ValueError("the array does not end")  # a number or word could go on
            except ValueError as error:  # JSONDecodeError is one
                more = text.read(max(_ARRAY_READ, len(window))) if len(window) < _LONGEST_ARRAY_ITEM else ""
                if not more:
                    raise ValueError(
                        f"{file}, item {number}: the JSON array cannot be read on ({error}); repair the file, or "
                        "write one object per line"
                    ) from error
                window += more
                continue
            yield RawRecord(f"{file}, item {number}", "row", item)
            number, is_first, window = number + 1, False, window[end:]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    finally:
        text.detach()


def _read_parquet(file: Path, columns: list[str]) -> Iterator[RawRecord]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('reading parquet needs pyarrow: pip install "twofold[data]"') from error
    table = pyarrow.parquet.ParquetFile(file)
    _check_columns(table.schema_arrow.names, columns, str(file))
    number = 0
    for group in table.iter_batches(columns=columns):
        for row in group.to_pylist():
            yield RawRecord(f"{file}, row {number}", "row", row)
            number += 1


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _open_dataset(config: SourceConfig, path: Path, columns: list[str]) -> Any:
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
    _check_columns(dataset.column_names, columns, config.path)
    return dataset.select_columns(columns)


def _format_of(file: Path) -> str | None:
    name = file.with_suffix("") if file.suffix == ".gz" else file
    return _FORMATS.get(name.suffix.lower())


def _find_answers(prompts: Sequence[Path], config: SourceConfig) -> Path:
    """The file at `completion_path`."""
    assert config.completion_path is not None
    file = Path(config.completion_path)
    if len(prompts) != 1:
        raise ValueError(f"completion_path goes with one file, but {config.path!r} has {len(prompts)}")
    if not file.is_file():
        raise FileNotFoundError(f"no file at completion_path={config.completion_path!r}; check the path")
    return file


@contextmanager
def _lines_of(file: Path) -> Iterator[IO[str]]:
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as handle:
            yield cast(IO[str], handle)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is a broken .gz file: {error}; write it anew") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def _find_files(config: SourceConfig) -> list[Path]:
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
