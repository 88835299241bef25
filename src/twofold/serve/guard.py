"""Around every route: a request id, a line in the log, the key, the body within its bounds, the client still there.

Plain ASGI, so that streams pass through as they are.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twofold.serve.auth import find_key
from twofold.serve.errors import ApiError, bad_request, shutting_down
from twofold.serve.logs import logger
from twofold.serve.service import Service

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PROBES = frozenset(("/health", "/ready", "/metrics"))
"""Not in the log unless they fail, and answered while the server drains."""
_CLIENT_GONE = 499
"""In log and metrics, as nginx has it: the client left before it was answered."""


def facts(scope: Scope) -> dict[str, Any]:
    """What the log will say of this request; routes add to it."""
    found: dict[str, Any] = scope.setdefault("twofold.facts", {})
    return found


class Guard:
    """The outermost layer of the app."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given_id = headers.get(b"x-request-id", "")
        request_id = given_id if _REQUEST_ID.fullmatch(given_id) else secrets.token_hex(12)
        known = facts(scope)
        known["request_id"] = request_id
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            gone = await self._answer(scope, receive, noting, headers)
            status = _CLIENT_GONE if gone else status
        except ApiError as error:
            await error.response()(scope, receive, noting)
        except Exception:
            logger.exception("request failed", extra={"facts": dict(known)})
            if status:
                raise  # the answer has begun: all that is left is to break it off
            failure = ApiError(500, f"the server failed; its log says more about request {request_id}")
            await failure.response()(scope, receive, noting)
        finally:
            self._note(scope, status, time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: dict[bytes, str]) -> bool:
        """Returns whether the client left before it was answered."""
        service = self._service
        path = _path(scope)
        if service.settings.key_hashes and not service.is_public(path):
            key = find_key(headers.get(b"authorization"), service.settings.key_hashes)
            if key is None:
                raise ApiError(
                    401,
                    "this server wants an API key that it knows, as header Authorization: Bearer KEY",
                    code="invalid_api_key",
                )
            facts(scope)["key"] = key
        if service.is_draining and path not in _PROBES:
            raise shutting_down()
        body = await self._body(receive, headers)
        if body is None:
            return True
        _refuse_half_characters(body)
        return await _until_gone(self._app, scope, body, receive, send)

    async def _body(self, receive: Receive, headers: dict[bytes, str]) -> bytes | None:
        """All of it; None where the client left.

        Raises:
            ApiError: too large, or too slow in coming.
        """
        settings = self._service.settings
        length = headers.get(b"content-length", "")
        body = bytearray()
        is_whole = False
        try:
            if length.isdecimal() and len(length) < 20:
                self._refuse_large(int(length))
            async with asyncio.timeout(settings.timeout_s):
                while not is_whole:
                    async with asyncio.timeout(settings.stall_timeout_s):
                        message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    is_whole = not message.get("more_body", False)
                    self._refuse_large(len(body))
            return bytes(body)
        except TimeoutError as error:
            raise ApiError(408, "the body came too slowly; send it again", code="timeout") from error

    def _refuse_large(self, n_bytes: int) -> None:
        most = self._service.settings.max_body_bytes
        if n_bytes > most:
            raise ApiError(
                413,
                f"the body is larger than {most:,} bytes, which is the most this server takes; send less at a time",
                code="body_too_large",
            )

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        # As it is declared: what clients make up must not become a label. One refused here has not found its route.
        known = self._service.paths
        candidates = (_path(scope), getattr(scope.get("route"), "path", None))
        path = next((found for found in candidates if found in known), "other")
        self._service.metrics.requests.labels(path, str(status)).inc()
        self._service.metrics.request_s.labels(path).observe(seconds)
        if path in _PROBES and status < 400:
            return
        found = {
            **facts(scope),
            "method": scope["method"],
            "route": path,
            "status": status,
            "seconds": round(seconds, 4),
        }
        logger.info("request", extra={"facts": found})


def _path(scope: Scope) -> str:
    """Below where the app is mounted."""
    whole: str = scope["path"]
    return whole.removeprefix(scope.get("root_path", ""))


def _refuse_half_characters(body: bytes) -> None:
    """JSON can write half of a surrogate pair, which is no text: no tokenizer takes it, and no reply can carry it.

    Raises:
        ApiError: there is one.
    """
    if b"\\ud" not in body.lower():
        return
    with suppress(json.JSONDecodeError, UnicodeDecodeError, RecursionError):  # the route says what is wrong
        try:
            json.dumps(json.loads(body), ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise bad_request(
                "the body has half a surrogate pair (such as \\ud83d without its other half), which is no text; "
                "leave it out"
            ) from error


async def _until_gone(app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send) -> bool:
    """Run the app on a body that is here; end it when the client leaves. Returns whether that happened."""
    answered = asyncio.Event()
    is_read = False

    async def replayed() -> Message:
        nonlocal is_read
        if not is_read:
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}
        await answered.wait()
        return {"type": "http.disconnect"}

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    answering = asyncio.ensure_future(app(scope, replayed, send))
    leaving = asyncio.ensure_future(left())
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            answering.result()
            return False
        return True
    finally:
        answered.set()
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)
