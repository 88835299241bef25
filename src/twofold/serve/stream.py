"""Server-sent events out of work: what comes is sent at once, at the pace at which the client reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from twofold.infer import Completion
from twofold.serve.errors import ApiError, error_body
from twofold.serve.guard import facts
from twofold.serve.logs import logger
from twofold.serve.work import Arrived, Work

_PATIENCE_S = 10.0
"""For the first token before the answer begins: until then an error has its own status, after which clients retry."""
_PING_S = 15.0
"""After so long without an event a comment is sent, so that nobody between takes the connection for dead."""


class Writer(Protocol):
    """What the replies of an API look like, as JSON objects: whole, or as events."""

    def whole(self, answers: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        """The reply to a request without `stream`, given all answers to each prompt."""
        ...

    def first(self) -> Sequence[Any]:
        """Before anything has come."""
        ...

    def more(self, arrived: Arrived) -> Sequence[Any]:
        """For what has come."""
        ...

    def last(self) -> Sequence[Any]:
        """After everything."""
        ...


async def reply(work: Work, writer: Writer, *, is_streamed: bool) -> Response:
    """What the client gets; the work is closed when that is done.

    Raises:
        ApiError: see `Work.next`; of a stream, it is an event or its beginning.
    """
    if is_streamed:
        return EventStream(work, writer)
    try:
        return JSONResponse(writer.whole(await work.completions()))
    finally:
        work.close()


class EventStream(Response):
    """The answer to a request with `stream`. Closes the work.

    An error after the beginning is an event `{"error": ...}`, after which the stream ends without [DONE].
    """

    media_type = "text/event-stream"

    def __init__(self, work: Work, writer: Writer) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._work, self._writer = work, writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            try:
                first = await self._next(_PATIENCE_S)
            except ApiError as error:  # before the beginning it is an error as any other
                await error.response()(scope, receive, send)
                return
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            try:
                await self._send_all(send, first)
            except ApiError as error:
                facts(scope)["error"] = error.code or error.status
                await self._send(send, _events([error.body]))
            except TimeoutError:
                # Nothing more would be read: break off, and let uvicorn close the connection.
                facts(scope)["error"] = "client_does_not_read"
                return
            except Exception:
                logger.exception("stream failed", extra={"facts": dict(facts(scope))})
                await self._send(send, _events([error_body(500, "the server failed; its log says more")]))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._work.close()

    async def _send_all(self, send: Send, arrived: Arrived | None) -> None:
        await self._send(send, _events(self._writer.first()))
        while arrived is None or arrived:
            body = b": still at work\n\n" if arrived is None else _events(self._writer.more(arrived))
            await self._send(send, body)
            arrived = await self._next(_PING_S)
        await self._send(send, _events(self._writer.last()) + b"data: [DONE]\n\n")

    async def _next(self, patience_s: float) -> Arrived | None:
        """What has come; None: nothing for so long."""
        try:
            async with asyncio.timeout(patience_s):
                return await self._work.next()
        except TimeoutError:
            return None

    async def _send(self, send: Send, body: bytes) -> None:
        """Waits while the client has not read what was sent before.

        Raises:
            TimeoutError: for too long.
        """
        if body:
            async with asyncio.timeout(self._work.service.settings.stall_timeout_s):
                await send({"type": "http.response.body", "body": body, "more_body": True})


def _events(values: Iterable[Any]) -> bytes:
    return b"".join(
        b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
        for value in values
    )
