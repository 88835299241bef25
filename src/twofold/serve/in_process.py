"""A request to an app without a network: what `twofold batch` has in common with the server is all of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message


class Response(NamedTuple):
    """What came back."""

    status_code: int
    request_id: str | None
    body: Any
    """JSON."""


async def post(app: ASGIApp, path: str, body: dict[str, Any]) -> Response:
    """POST JSON, and wait for the whole answer. Whoever stops waiting is a client that left.

    Args:
        app: whose lifespan has begun, in this event loop.
        path: of the route.
        body: of the request.
    """
    content = json.dumps(body, ensure_ascii=False).encode("utf-8")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"host", b"in-process"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
        ],
        "client": None,
        "server": None,
        "state": {},
    }
    requests: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await asyncio.Event().wait()  # the client stays: nothing more comes
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    headers = dict(sent[0]["headers"])
    request_id = headers.get(b"x-request-id")
    whole = b"".join(message.get("body", b"") for message in sent[1:])
    return Response(sent[0]["status"], None if request_id is None else request_id.decode(), json.loads(whole))
