"""Files in OpenAI's batch format: lines that ask, lines that answer.

In: {"custom_id", "method": "POST", "url", "body"}. Out, in the file of answers or in that of errors:
{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}; a line that could not be sent to the
server at all has no response and an error of {"code", "message"}. Source of the format: OpenAI's Batch API reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from twofold.infer.files import BOM, json_object

Url = Literal["/v1/completions", "/v1/chat/completions", "/v1/embeddings"]

_NEEDS = '"custom_id", "method", "url" and "body"'


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLine:
    """One line of the input."""

    number: int
    """From 1."""
    custom_id: str | None = None
    url: str = ""
    body: dict[str, Any] | None = None
    """What is posted there; None where there is an error."""
    error: str | None = None
    """Why the line cannot be used."""
    n_bytes: int = 0
    """That it takes in its file."""

    @property
    def record_id(self) -> str:
        """What its line of output is called."""
        return f"batch_req_{self.number}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a line got: the server's response, or none where the line has an error of its own."""

    line: BatchLine
    status_code: int | None = None
    request_id: str | None = None
    body: Any = None
    """Of the response, as JSON."""

    @property
    def is_ok(self) -> bool:
        """Answered: it belongs into the file of answers."""
        return self.status_code is not None and self.status_code < 400

    @property
    def is_broken(self) -> bool:
        """Not answered through no fault of the line's."""
        return self.status_code is not None and self.status_code >= 500

    @property
    def n_tokens(self) -> int:
        """Generated."""
        usage = self.body.get("usage") if isinstance(self.body, dict) else None
        return usage.get("completion_tokens", 0) if isinstance(usage, dict) else 0

    @property
    def error(self) -> str | None:
        """In one line, why there is no answer."""
        if self.is_ok:
            return None
        if self.status_code is None:
            return self.line.error
        error = self.body.get("error") if isinstance(self.body, dict) else None
        message = error.get("message") if isinstance(error, dict) else None
        return f"status {self.status_code}: {message or self.body}"

    def to_json(self) -> dict[str, Any]:
        """The line of output."""
        found: dict[str, Any] = {"id": self.line.record_id, "custom_id": self.line.custom_id}
        if self.status_code is None:
            return found | {"response": None, "error": {"code": "invalid_line", "message": self.line.error}}
        response = {"status_code": self.status_code, "request_id": self.request_id, "body": self.body}
        return found | {"response": response, "error": None}


class _Asked(BaseModel):
    """A line, checked."""

    model_config = ConfigDict(extra="forbid", strict=True)

    custom_id: str = Field(min_length=1)
    method: Literal["POST"]
    url: Url
    body: dict[str, Any]


def read_batch_lines(raw: Iterable[bytes]) -> Iterator[BatchLine]:
    """One `BatchLine` for each line, whatever is in it.

    Args:
        raw: lines as bytes, such as a file opened with "rb".
    """
    seen: dict[str, int] = {}
    for number, line in enumerate(raw, start=1):
        content = line.removeprefix(BOM) if number == 1 else line
        custom_id = None
        try:
            row = json_object(content, needs=_NEEDS)
            custom_id = row.get("custom_id") if isinstance(row.get("custom_id"), str) else None
            asked = _asked(row)
            first = seen.setdefault(asked.custom_id, number)
            if first != number:
                raise ValueError(f"custom_id {custom_id!r} is that of line {first} already; ids must differ")
        except ValueError as error:
            yield BatchLine(number=number, custom_id=custom_id, error=str(error), n_bytes=len(line))
        else:
            yield BatchLine(
                number=number, custom_id=custom_id, url=asked.url, body=asked.body, n_bytes=len(line)
            )


def _asked(row: dict[str, Any]) -> _Asked:
    """Raises ValueError with all that is wrong about a line."""
    try:
        asked = _Asked.model_validate(row)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise ValueError(f"a line needs {_NEEDS} and nothing else; {'; '.join(wrong)}") from None
    if asked.body.get("stream"):
        raise ValueError('body.stream is true, but a line has one response; leave "stream" out')
    return asked
