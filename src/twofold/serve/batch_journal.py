"""The two files of a batch, answers and errors, that can be left at any time and continued.

Every line of input has a line in one of them, in the order of the input, so that walking through all three at once
finds where to go on. Beside the answers lie the settings they depend on (see `infer.journal`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from twofold.infer.journal import LineWriter, refuse_existing, refuse_other_settings, write_settings
from twofold.serve.batch_files import BatchLine, Outcome


class BatchJournal:
    """Outcomes on their way into the files.

    Args:
        answers_path, errors_path: of the output. Folders are made where they are missing; the file of errors appears
            with the first error.
        settings: JSON-able, all that the answers depend on.
        lines: the input.
        resume: continue files that are there; without any, start them. What a crash left unfinished at their ends
            is cut off.

    Attributes:
        rest: lines that have no outcome yet.
        n_lines: that have an outcome in the files.
        n_errors: those of them in the file of errors.
        n_input_bytes: that had an outcome before this run.

    Raises:
        FileExistsError: a file is there, and `resume` is off.
        FileNotFoundError: the answers have no settings beside them.
        ValueError: they were begun with other settings or from other lines, or hold something else.
    """

    def __init__(
        self,
        answers_path: Path,
        errors_path: Path,
        settings: Mapping[str, Any],
        lines: Iterator[BatchLine],
        *,
        resume: bool,
    ) -> None:
        if answers_path == errors_path:
            raise ValueError(f"answers and errors cannot both go to {answers_path}; name two files")
        self.answers_path, self.errors_path = answers_path, errors_path
        self.rest = lines
        self.n_lines = self.n_errors = self.n_input_bytes = 0
        self._outs: dict[Path, LineWriter] = {}
        if not resume:
            refuse_existing(answers_path)
            refuse_existing(errors_path)
        if answers_path.exists():
            refuse_other_settings(answers_path, settings)
            self._go_on(lines)
        else:
            refuse_existing(errors_path)  # nobody knows whose errors they are
            write_settings(answers_path, settings)
            self._open(answers_path)

    def write(self, outcome: Outcome) -> None:
        """Add a line, which is in its file on return."""
        self._open(self.answers_path if outcome.is_ok else self.errors_path).write(outcome.to_json())
        self.n_lines += 1
        self.n_errors += not outcome.is_ok

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            for out in self._outs.values():
                stack.callback(out.close)

    def _open(self, path: Path) -> LineWriter:
        if path not in self._outs:
            self._outs[path] = LineWriter(path)
        return self._outs[path]

    def _go_on(self, lines: Iterator[BatchLine]) -> None:
        """Walk through input and outcomes until a line has none, and cut off what lies behind it."""
        with ExitStack() as stack:
            parts = [
                _Part(path, stack.enter_context(open(path, "r+b")))
                for path in (self.answers_path, self.errors_path)
                if path.exists()
            ]
            while any(part.next_id for part in parts):
                line = next(lines, None)
                if line is None:
                    raise ValueError(
                        f"{self.answers_path} and {self.errors_path} have more lines than the input's "
                        f"{self.n_lines}; they belong to another input"
                    )
                part = next((part for part in parts if part.next_id == line.record_id), None)
                if part is None:
                    # A power cut may take the end of one file and leave that of the other.
                    self.rest = chain([line], lines)
                    break
                part.take(line)
                self.n_lines += 1
                self.n_errors += part.path == self.errors_path
                self.n_input_bytes += line.n_bytes
            for part in parts:
                part.cut_off()


class _Part:
    """One of the files, read record by record.

    Attributes:
        next_id: of the record that was read last; None after the last whole one.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self._n_taken = self._end = 0
        self._read()

    def take(self, line: BatchLine) -> None:
        """The record is this line's. Raises ValueError where it is that of another input."""
        if self._record.get("custom_id") != line.custom_id:
            raise ValueError(
                f"{self.path}, line {self._n_taken + 1} is the outcome of {self._record.get('custom_id')!r}, and "
                f"line {line.number} of the input is {line.custom_id!r}; resume with the input it was begun with"
            )
        self._n_taken += 1
        self._end = self._file.tell()
        self._read()

    def cut_off(self) -> None:
        """Leave what was taken."""
        self._file.truncate(self._end)

    def _read(self) -> None:
        raw = self._file.readline()
        self._record: dict[str, Any] = {}
        self.next_id: str | None = None
        if not raw.endswith(b"\n"):
            return
        record: Any = None
        with suppress(ValueError):
            record = json.loads(raw)
        if not isinstance(record, dict) or not str(record.get("id")).startswith("batch_req_"):
            raise ValueError(
                f"{self.path}, line {self._n_taken + 1} is no outcome of a batch, so the file cannot be continued; "
                "choose another name"
            )
        self._record, self.next_id = record, record["id"]
