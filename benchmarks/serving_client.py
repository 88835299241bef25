"""An open-loop client of the serving benchmark: requests go out when their time has come, whatever became of others.

Plain sockets under asyncio: it shares the processor with the server it measures, and may misbehave on purpose.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from inference_cases import Arrival

LIMIT_S = 300.0
"""After which a request that has no end counts as stuck."""


class Address(NamedTuple):
    """Of a server, on this machine only."""

    port: int
    host: str = "127.0.0.1"


@dataclass(kw_only=True, slots=True)
class Reply:
    """What came of one request. Times are seconds since it was due, waiting in the client included."""

    status: int | None = None
    """None: there was no HTTP response."""
    first_s: float = 0.0
    """Until the first piece of text."""
    done_s: float = 0.0
    due_s: float = 0.0
    """When it was due, since the load began."""
    n_tokens: int = 0
    is_whole: bool = False
    """The stream ended as it should, or the body is as long as its header says."""
    error: str | None = None
    """Why it was refused, in the server's words; or what broke."""
    retry_after: str | None = None
    times_s: list[float] = field(default_factory=list)
    """Of the pieces of text."""

    @property
    def is_answered(self) -> bool:
        """Whole, and not a refusal."""
        return self.status == 200 and self.is_whole and self.error is None

    @property
    def ended_s(self) -> float:
        """Since the load began."""
        return self.due_s + self.done_s

    @property
    def per_token_s(self) -> float | None:
        """Mean time of a token after the first; None where there was one only, or no text: random weights may write
        nothing but special tokens."""
        if self.n_tokens < 2 or not self.times_s:
            return None
        return (self.times_s[-1] - self.first_s) / (self.n_tokens - 1)


class Response(NamedTuple):
    """The head of an HTTP response, and its body as it comes, without its framing."""

    status: int
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]


Ask = Callable[[Address, bytes, Reply, Callable[[], float]], Awaitable[None]]
"""Sends a request and fills in the reply; the last argument tells the time since the request was due."""


def post(path: str, body: Mapping[str, Any] | bytes) -> bytes:
    """A whole request."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


async def respond(reader: asyncio.StreamReader) -> Response:
    """Read the head of a response.

    Raises:
        EOFError, ValueError: there is none.
    """
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])
    }
    body = _chunks(reader) if headers.get("transfer-encoding") == "chunked" else _plain(reader, headers)
    return Response(int(head[0].split()[1]), headers, body)


async def ask_for_text(address: Address, request: bytes, reply: Reply, clock: Callable[[], float]) -> None:
    """A well-behaved client: reads what there is, to the end."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        writer.write(request)
        await writer.drain()
        await take_response(reader, reply, clock)
    finally:
        writer.close()


async def take_response(reader: asyncio.StreamReader, reply: Reply, clock: Callable[[], float]) -> None:
    """Read a response into a reply."""
    response = await respond(reader)
    reply.status, reply.retry_after = response.status, response.headers.get("retry-after")
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        await _take_stream(response, reply, clock)
        return
    content = b"".join([part async for part in response.body])
    reply.is_whole = True
    with suppress(ValueError):
        reply.error = json.loads(content).get("error", {}).get("message")
    if response.status >= 400:
        reply.error = reply.error or f"status {response.status} without a reason"


async def _take_stream(response: Response, reply: Reply, clock: Callable[[], float]) -> None:
    async with aclosing(events(response.body)) as stream:
        async for event in stream:
            if event == b"[DONE]":
                reply.is_whole = True
                continue
            found = json.loads(event)
            if "error" in found:
                reply.error = found["error"]["message"]
            if usage := found.get("usage"):
                reply.n_tokens = usage["completion_tokens"]
            if any(choice["text"] for choice in found.get("choices", ())):
                reply.times_s.append(clock())
    reply.first_s = reply.times_s[0] if reply.times_s else 0.0
    if not reply.is_whole:
        reply.error = reply.error or "the stream broke off"


async def events(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events."""
    held = b""
    async for part in body:
        *whole, held = (held + part).split(b"\n\n")
        for event in whole:
            if event.startswith(b"data:"):
                yield event.removeprefix(b"data:").strip()


async def offer(
    address: Address,
    arrivals: Sequence[Arrival],
    requests: Sequence[bytes],
    asks: Sequence[Ask] | None = None,
) -> list[Reply]:
    """Send requests at their times.

    Args:
        address: of the server.
        arrivals: when each is due.
        requests: what is sent.
        asks: how each client behaves; all well, unless told otherwise.

    Returns:
        A reply for each.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()
    tasks = []
    for index, (arrival, request) in enumerate(zip(arrivals, requests, strict=True)):
        await asyncio.sleep(started + arrival.at_s - loop.time())
        ask = ask_for_text if asks is None else asks[index]
        tasks.append(asyncio.create_task(_one(address, request, ask, arrival.at_s, started)))
    return list(await asyncio.gather(*tasks))


async def _one(address: Address, request: bytes, ask: Ask, due_s: float, started: float) -> Reply:
    reply, loop, due = Reply(due_s=due_s), asyncio.get_running_loop(), started + due_s
    try:
        async with asyncio.timeout(LIMIT_S):
            await ask(address, request, reply, lambda: loop.time() - due)
    except TimeoutError:
        reply.is_whole, reply.error = False, f"stuck: no end after {LIMIT_S:g} s"
    except (OSError, EOFError, ValueError) as error:
        reply.is_whole, reply.error = False, f"{type(error).__name__}: {error}"
    reply.done_s = loop.time() - due
    return reply


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")


async def _plain(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    if "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        yield await reader.read()
