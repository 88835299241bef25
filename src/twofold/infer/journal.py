"""A file of answers that can be left at any time and continued.

One line of JSON for each line of input, in its order, so that the number of whole lines says how far it is. Beside
`OUT` lies `OUT.settings.json` with what the answers depend on; a run with other settings does not continue it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from twofold.infer.files import Answer, Line
from twofold.models import EncoderDecoder


class Journal:
    """Answers on their way into a file.

    Args:
        path: of the output. Its folder is made where it is missing.
        settings: JSON-able, all that the answers depend on.
        lines: the input. Those that are answered already are taken from it.
        resume: continue a file that is there; without one, start it. Half a line at its end is cut off.

    Attributes:
        n_lines: that are in the file.
        n_errors: those of them that hold an error instead of an answer.
        n_input_bytes: that were answered before this run.

    Raises:
        FileExistsError: `path` is there, and `resume` is off.
        FileNotFoundError: `path` has no settings beside it.
        ValueError: it was begun with other settings or from other lines, or holds something else.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], lines: Iterator[Line], *, resume: bool
    ) -> None:
        self.path = path
        self.n_lines = self.n_errors = self.n_input_bytes = 0
        if not path.exists():
            write_settings(path, settings)
        else:
            if not resume:
                refuse_existing(path)
            refuse_other_settings(path, settings)
            with open(path, "r+b") as file:
                file.truncate(self._read(file, lines))
        self._out = LineWriter(path)

    def write(self, answer: Answer) -> None:
        """Add a line, which is in the file on return."""
        self._out.write(answer.to_json())
        self.n_lines += 1
        self.n_errors += answer.error is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.close()

    def _read(self, file: BinaryIO, lines: Iterator[Line]) -> int:
        """Go through what is there, and through the input with it. Returns where the last whole line ends."""
        end = 0
        for raw in file:
            if not raw.endswith(b"\n"):
                break
            record = self._record(raw)
            line = next(lines, None)
            if line is None:
                raise ValueError(
                    f"{self.path} has answers to more lines than the input's {self.n_lines}; it belongs to another "
                    "input"
                )
            if json.dumps(record.get("id")) != json.dumps(line.id):
                raise ValueError(
                    f"{self.path}, line {line.number} answers id {record.get('id')!r}, and the input has {line.id!r} "
                    "there; resume with the input it was begun with"
                )
            end += len(raw)
            self.n_input_bytes += line.n_bytes
            self.n_lines += 1
            self.n_errors += "error" in record
        return end

    def _record(self, raw: bytes) -> dict[str, Any]:
        record: Any = None
        with suppress(ValueError):
            record = json.loads(raw)
        if not isinstance(record, dict) or record.get("line") != self.n_lines + 1:
            raise ValueError(
                f"{self.path}, line {self.n_lines + 1} is not the answer to line {self.n_lines + 1} of an input, so "
                "the file cannot be continued; choose another name"
            )
        return record


class LineWriter:
    """JSON lines at the end of a file, made where it is missing; its folder too.

    Nothing waits in a buffer: what a full disk does not take is not tried again when the file is closed, where a second
    error would hide the first.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a line, which is in the file on return.

        Raises:
            OSError: it is not, or not all of it; the message names the file.
        """
        rest = memoryview((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8"))
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        """Give the file back."""
        self._file.close()


def refuse_existing(path: Path) -> None:
    """Raises FileExistsError where an output is there already."""
    if path.exists():
        raise FileExistsError(
            f"{path} exists; continue it with resume (--resume), choose another name, or remove it"
        )


def fingerprint(model: EncoderDecoder) -> str:
    """16 hex digits that tell models apart: from the configuration, and from 16 numbers of every parameter."""
    digest = hashlib.sha256(model.config.model_dump_json().encode())
    for name, parameter in model.named_parameters():
        some = parameter.detach().flatten()[:: max(1, parameter.numel() // 16)]
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def settings_path(path: Path) -> Path:
    """Where the settings of an output lie."""
    return path.with_name(path.name + ".settings.json")


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Lay them beside an output that is to be begun; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(settings), indent=1, ensure_ascii=False)
    settings_path(path).write_text(text + "\n", encoding="utf-8")


def refuse_other_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises FileNotFoundError or ValueError unless the output was begun with these settings."""
    beside = settings_path(path)
    if not beside.is_file():
        raise FileNotFoundError(
            f"{beside} is missing, so nobody knows what {path} was made with, and it cannot be continued; choose "
            "another name"
        )
    try:
        before = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{beside} is not JSON ({error}); choose another name for the output") from error
    now = json.loads(json.dumps(dict(settings)))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changes = "; ".join(f"{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in names)
        raise ValueError(
            f"{path} was begun with other settings: {changes}. Resume with the same, or choose another name"
        )
