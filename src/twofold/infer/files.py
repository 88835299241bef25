"""Files of any size through the engine: lines are read as a stream, run together, and answered in their order."""

from __future__ import annotations

import json
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from twofold.data.chat import Messages
from twofold.infer.engine import Engine
from twofold.infer.handle import Handle, RequestFailed
from twofold.infer.request import Completion, Request

BOM = b"\xef\xbb\xbf"
"""That some programs put before the first line of a file."""
_WAIT_S = 0.05
"""For a line that is not there yet, while others can be worked on: a file's is there at once, a pipe's may not be."""


class BadLine(ValueError):
    """A line that cannot be answered, where that is to end the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of the input."""

    number: int
    """From 1."""
    prompt: str | Messages | None = None
    """None where there is an error."""
    id: Any = None
    """What the line calls itself, anything of JSON."""
    error: str | None = None
    """Why it cannot be used."""
    n_bytes: int = 0
    """That it takes in its file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a line got: completions, or an error."""

    line: Line
    completions: tuple[Completion, ...] = ()
    error: str | None = None

    @property
    def n_tokens(self) -> int:
        """Generated."""
        return sum(len(completion.token_ids) for completion in self.completions)

    def to_json(self) -> dict[str, Any]:
        """Line number, the line's id where it has one, and the completion; several as a list under "answers"."""
        found: dict[str, Any] = {"line": self.line.number}
        if self.line.id is not None:
            found["id"] = self.line.id
        if self.error is not None:
            return found | {"error": self.error}
        completions = [completion.to_json() for completion in self.completions]
        return found | (completions[0] if len(completions) == 1 else {"answers": completions})


def read_lines(raw: Iterable[bytes]) -> Iterator[Line]:
    """Lines of JSON as they come, one `Line` for each, whatever is in it.

    Args:
        raw: lines as bytes, such as a file opened with "rb". An object with "text" (a str) or "messages" (a list of
            {"role", "content"}), and an "id" where it likes.
    """
    for number, line in enumerate(raw, start=1):
        content = line.removeprefix(BOM) if number == 1 else line
        identity = None
        try:
            row = json_object(content, needs='"text" or "messages"')
            identity = row.get("id")
            yield Line(number=number, prompt=_prompt(row), id=identity, n_bytes=len(line))
        except ValueError as error:
            yield Line(number=number, id=identity, error=str(error), n_bytes=len(line))


def json_object(content: bytes, *, needs: str) -> dict[str, Any]:
    """One line's object.

    Args:
        content: the line.
        needs: what the object has to hold, for the message.

    Raises:
        ValueError: there is none.
    """
    if not content.strip():
        raise ValueError(f"the line is empty; it needs a JSON object with {needs}")
    try:
        row = json.loads(content.decode("utf-8"))
        if b"\\u" in content:  # half a surrogate pair can be written as JSON, but is no text
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON in UTF-8 ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"need a JSON object with {needs}, got {type(row).__name__}")
    return row


def answer_lines(
    engine: Engine, lines: Iterable[Line], template: Request, *, window: int = 256, strict: bool = False
) -> Generator[Answer, None, None]:
    """Answers in the order of the lines, as they come; later lines run while earlier ones are waited for.

    Args:
        engine: best not one that others use at the same time, as its batch is then shared.
        lines: read from a thread, a little ahead.
        template: what is asked for each line, but for its prompt and seed. Line i (the first is 0) draws with
            `seed + i * n`, where n is the number of answers: neither the batch nor where a run starts matters.
        window: lines that are handed in or wait to be given out, at most.
        strict: the first bad line ends it, after the answers before.

    Raises:
        BadLine: with `strict`.
        RequestFailed: a request failed for another reason than what it asks.
    """
    pending: deque[tuple[Line, Handle | str]] = deque()
    ahead = _Ahead(lines, window)
    try:
        while True:
            while len(pending) < window and (line := ahead.next(wait=not pending)) is not None:
                pending.append((line, _handed_in(engine, line, template)))
            if not pending:
                return
            line, handle = pending.popleft()
            try:
                answer = _answer(line, handle)
            except BaseException:
                pending.appendleft((line, handle))
                raise
            if strict and answer.error is not None:
                raise BadLine(f"line {line.number}: {answer.error}")
            yield answer
    finally:
        ahead.close()
        for _, handle in pending:
            if isinstance(handle, Handle):
                handle.cancel()


def _prompt(row: dict[str, Any]) -> str | Messages:
    """What a line asks.

    Raises:
        ValueError: not exactly one of text and conversation, or one that is empty or of the wrong type.
    """
    text, messages = row.get("text"), row.get("messages")
    if (text is None) == (messages is None):
        raise ValueError(f'need "text" or "messages", exactly one of them; got {", ".join(row) or "nothing"}')
    if messages is None:
        if not isinstance(text, str):
            raise ValueError(f'"text" must be a string, got {type(text).__name__}')
        if not text:
            raise ValueError('"text" is empty')
        return text
    if not isinstance(messages, list) or not messages or not all(_is_turn(turn) for turn in messages):
        raise ValueError('"messages" must be a list of {"role", "content"} with strings in both')
    return messages


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content"))


def _handed_in(engine: Engine, line: Line, template: Request) -> Handle | str:
    """On its way, or why not."""
    if line.prompt is None:
        return line.error or "there is nothing to answer"
    seed = template.sampling.seed + (line.number - 1) * template.n
    sampling = template.sampling.model_copy(update={"seed": seed})
    try:
        return engine.submit(replace(template, prompt=line.prompt, sampling=sampling))
    except ValueError as error:
        return str(error)


def _answer(line: Line, handle: Handle | str) -> Answer:
    """Wait for it."""
    if isinstance(handle, str):
        return Answer(line=line, error=handle)
    try:
        return Answer(line=line, completions=handle.result())
    except RequestFailed as failed:
        # A constraint that allows nothing concerns this line. No memory left, say, is no fault of the line's.
        if isinstance(failed.__cause__, ValueError):
            return Answer(line=line, error=str(failed.__cause__))
        raise


class _Ahead:
    """Lines read by a thread, so that a pipe that has nothing to give holds nobody up.

    Args:
        lines: an error in them is raised where the line would come.
        n_ahead: that are read before somebody takes them.
    """

    def __init__(self, lines: Iterable[Line], n_ahead: int) -> None:
        self._queue: queue.Queue[Line | Exception | None] = queue.Queue(n_ahead)
        self._is_closed = self._is_over = False
        threading.Thread(target=self._read, args=(lines,), name="twofold-lines", daemon=True).start()

    def next(self, *, wait: bool) -> Line | None:
        """The next line. None: there are no more, or, unless it is to be waited for, none is there yet."""
        if self._is_over:
            return None
        try:
            found = self._queue.get(timeout=None if wait else _WAIT_S)
        except queue.Empty:
            return None
        self._is_over = not isinstance(found, Line)
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        """Read no more; a line that the thread is waiting for is the last."""
        self._is_closed = True
        while not self._queue.empty():
            self._queue.get_nowait()

    def _read(self, lines: Iterable[Line]) -> None:
        last: Exception | None = None
        try:
            for line in lines:
                self._queue.put(line)
                if self._is_closed:
                    return
        except Exception as error:
            last = error
        self._queue.put(last)
