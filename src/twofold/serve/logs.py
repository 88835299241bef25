"""The server's log: one JSON object a line, with request ids, and never a prompt, an answer or a key."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any, TextIO

logger = logging.getLogger("twofold.serve")


class JsonLines(logging.Formatter):
    """Records as JSON.

    Args:
        shows_errors: an exception's own message is written too. It may quote what a client sent, so that by
            default only its type and place are.
    """

    def __init__(self, *, shows_errors: bool = False) -> None:
        super().__init__()
        self._shows_errors = shows_errors

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        seconds, milliseconds = divmod(int(record.created * 1000), 1000)
        found: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{milliseconds:03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            found["error"] = _chain(record.exc_info[1], self._shows_errors)
        return json.dumps(found, ensure_ascii=False, default=str)


def configure(level: str, stream: TextIO = sys.stderr) -> None:
    """Write the log of server, engine and uvicorn as JSON lines; for a process that serves and does nothing else."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines(shows_errors=level == "debug"))
    for name in ("twofold", "uvicorn"):
        chosen = logging.getLogger(name)
        chosen.handlers, chosen.propagate = [handler], False
        chosen.setLevel(level.upper())


def _chain(error: BaseException | None, shows_errors: bool) -> list[dict[str, Any]]:
    """An exception and its causes, the outermost first."""
    found = []
    while error is not None:
        entry: dict[str, Any] = {
            "type": type(error).__name__,
            "at": [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)],
        }
        if shows_errors:
            entry["message"] = str(error)
        found.append(entry)
        error = error.__cause__
    return found
