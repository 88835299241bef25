"""The examples of local files, read when they are asked for and not before."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TypeAlias

Doc: TypeAlias = dict[str, Any]
"""One example as a task's templates see it."""

Row: TypeAlias = tuple[str, Any]
"""Where an example stands, for messages; and its line of JSON as str, or the example itself."""

Fields: TypeAlias = Mapping[str, type | tuple[Any, ...]]
"""What each line must have: a name, with dots for what is nested, and its type or its allowed values."""


@dataclass(frozen=True, kw_only=True)
class Docs:
    """The examples of a split, with as much of a `datasets.Dataset` as the harness uses.

    Counting reads the files without parsing, and iterating stops reading where the caller stops.
    """

    name: str
    """Of the files, for messages."""
    rows: Callable[[], Iterator[Row]]
    fields: Fields
    make: Callable[[Doc], Doc]

    def __iter__(self) -> Iterator[Doc]:
        """All examples.

        Raises:
            ValueError: a line that is no JSON object, or lacks a field; names file and line.
        """
        for where, row in self.rows():
            yield self._doc(where, row)

    def __len__(self) -> int:
        return sum(1 for _ in self.rows())

    def __getitem__(self, index: int) -> Doc:
        return next(islice(self, index, None))

    @property
    def features(self) -> Doc:
        """Names of the fields, as keys.

        Raises:
            ValueError: there is no example.
        """
        for doc in self:
            return dict.fromkeys(doc)
        raise ValueError(f"{self.name} has no examples")

    def map(self, function: Callable[[Doc], Doc]) -> Docs:
        """The same with what `function` adds to each example."""

        def made(doc: Doc) -> Doc:
            doc = self.make(doc)
            return {**doc, **function(doc)}

        return replace(self, make=made)

    def _doc(self, where: str, row: Any) -> Doc:
        doc = _parsed(where, row)
        for name, wanted in self.fields.items():
            _check(doc, name, wanted, where)
        try:
            return self.make(doc)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def json_lines(file: Path) -> Iterator[Row]:
    """Each line that is not blank."""
    return ((where, line) for where, line in _lines(file) if line.strip())


def interleaved(file: Path, field: str) -> Iterator[Row]:
    """JSON lines, one of each `field` in turn, so that the first n are of all kinds; the order within is kept.

    Raises:
        ValueError: a line that is no JSON object, or lacks the field.
    """
    kinds: dict[str, list[Row]] = {}
    for where, line in json_lines(file):
        doc = _parsed(where, line)
        _check(doc, field, str, where)
        kinds.setdefault(doc[field], []).append((where, doc))
    for turn in zip_longest(*kinds.values()):
        yield from (row for row in turn if row is not None)


def examples(file: Path) -> Iterator[Row]:
    """The list under "examples" of a file that is one JSON object.

    Raises:
        ValueError: another kind of file.
    """
    text = "\n".join(line for _, line in _lines(file))
    try:
        found = json.loads(text)["examples"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f'{file} must be a JSON object with a list under "examples" ({error!r})') from error
    for number, example in enumerate(found):
        yield f"{file}, example {number}", example


def line_pairs(first: Path, second: Path) -> Iterator[Row]:
    """Line n of two files together: {"first": str, "second": str}.

    Raises:
        ValueError: one has more lines.
    """
    for one, other in zip_longest(_lines(first), _lines(second)):
        if one is None or other is None:
            longer, where = (second, other[0]) if one is None else (first, one[0])
            raise ValueError(f"{where} has no partner: {longer.name} is longer than the file it belongs to")
        yield one[0], {"first": one[1], "second": other[1]}


def pages(file: Path) -> Iterator[Row]:
    """The articles of WikiText, whose headings of the first level are ` = Title = `: {"page": str}."""
    start, page = "", list[str]()
    for where, line in _lines(file):
        if re.fullmatch(r" = [^=].* = ", line) and page:
            yield start, {"page": "\n".join(page)}
            page = []
        if page or line.strip():
            start = start if page else where
            page.append(line)
    if page:
        yield start, {"page": "\n".join(page)}


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as handle:
            for number, line in enumerate(handle, start=1):
                yield f"{file}, line {number}", line.decode("utf-8").rstrip("\r\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is a broken .gz file: {error}; write it anew") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}, line {number}: not UTF-8 text ({error})") from error


def _parsed(where: str, row: Any) -> Doc:
    try:
        doc = json.loads(row) if isinstance(row, str) else row
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(doc, dict):
        raise ValueError(f"{where}: must be a JSON object, got {type(doc).__name__}")
    return doc


def _check(doc: Doc, name: str, wanted: type | tuple[Any, ...], where: str) -> None:
    value: Any = doc
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"{where}: no field {name!r}; it has {sorted(doc)}")
        value = value[part]
    if isinstance(wanted, tuple):
        is_right, what = value in wanted, f"one of {', '.join(map(repr, wanted))}"
    else:
        is_right, what = isinstance(value, wanted), f"of type {wanted.__name__}"
    if wanted is list:
        is_right, what = is_right and value != [], "a list that is not empty"
    if not is_right:
        raise ValueError(f"{where}: {name!r} must be {what}, got {str(value)[:80]!r}")
