"""The soak of the serving benchmark: hours of ordinary users, and some that are not."""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from inference_cases import Arrival, Load
from serving_client import Address, Ask, Reply, ask_for_text, offer, post, take_response
from serving_figures import is_refused, percentiles
from serving_systems import Http, completion, open_system, prompts

SHARES = {
    "well": 0.80,
    "leaves": 0.08,
    "slow": 0.02,
    "never_reads": 0.01,
    "oversize": 0.02,
    "malformed": 0.07,
}
OVERSIZE_BYTES = 3 * 1024 * 1024
MEMORY_LIMIT = 0.05
SHORTEST_FOR_MEMORY = 5.0
"""Minutes: before that, memory still grows towards what the load needs."""
SETTLE_S = 10.0

MALFORMED: Mapping[str, bytes] = {
    "no_json": post("/v1/completions", b'{"prompt": "a'),
    "no_object": post("/v1/completions", b"[1, 2]"),
    "no_prompt": post("/v1/completions", {"max_tokens": 4}),
    "no_utf8": post("/v1/completions", b'{"prompt": "\xff\xfe"}'),
    "wrong_type": post("/v1/completions", {"prompt": 7}),
    "bad_number": post("/v1/completions", {"prompt": "a", "max_tokens": -1}),
    "not_a_number": post("/v1/completions", b'{"prompt": "a", "temperature": NaN}'),
    "unknown_field": post("/v1/completions", {"prompt": "a", "promt": "b"}),
    "unknown_model": post("/v1/completions", {"prompt": "a", "model": "no-such-model"}),
    "unknown_token": post("/v1/completions", {"prompt": [2**30], "max_tokens": 4}),
    "too_many_tokens": post("/v1/completions", {"prompt": "a", "max_tokens": 10**9}),
    "deep": post("/v1/completions", b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "no_turns": post("/v1/chat/completions", {"messages": []}),
    "no_route": post("/v1/nothing", {}),
    "wrong_method": b"DELETE /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n",
    "no_http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}
"""What a server must refuse, by name."""


def soak(
    spec: dict[str, Any],
    *,
    minutes: float,
    rate: float,
    lengths: Mapping[str, tuple[int, int]],
    seed: int = 0,
) -> tuple[dict[str, Any], list[str]]:
    """Offer a mixture of clients to a server of our own.

    Args:
        spec: of the system (see `serving_systems.open_system`).
        minutes: of arrivals.
        rate: requests a second, all sorts together.
        lengths: of prompts and answers.
        seed: of everything random.

    Returns:
        What happened, and what must not have: empty if all is well.
    """
    arrivals = Load(rate, max(1, round(60 * minutes * rate)), **lengths).arrivals(seed)
    draw = random.Random(seed)
    kinds = draw.choices(list(SHARES), list(SHARES.values()), k=len(arrivals))
    clients = [_client(kind, draw) for kind in kinds]
    sources = prompts(arrivals, spec["vocab_size"])
    requests = [
        fixed or completion(ids, one.new)
        for (_, fixed), ids, one in zip(clients, sources, arrivals, strict=True)
    ]
    system = open_system("server", spec)
    assert isinstance(system, Http)
    try:
        system.offer([Arrival(0.0, one.source, one.new) for one in arrivals[: 2 * spec["rows"]]])
        memory = _Memory(system.server.pid)
        asks = [ask for ask, _ in clients]
        replies = asyncio.run(offer(system.server.address, arrivals, requests, asks))
        samples = memory.stop()
        left_open = _left_open(system.server.address)
    finally:
        system.close()
    details = _details(kinds, replies, samples) | {
        "minutes": minutes,
        "rate": rate,
        "left_open": left_open,
    }
    return details, _failures(details)


def soak_metrics(details: Mapping[str, Any] | None) -> dict[str, float]:
    """Flat figures; none where there was no soak."""
    if details is None:
        return {}
    names = (
        "minutes",
        "rate",
        "requests",
        "stuck",
        "unexplained",
        "accepted_by_mistake",
        "http_5xx",
        "memory_growth",
    )
    return {f"soak_{name}": details[name] for name in names}


def _client(kind: str, draw: random.Random) -> tuple[Ask, bytes | None]:
    """How it behaves, and what it sends, where that is no ordinary request."""
    if kind == "leaves":
        return _leaving(10 ** draw.uniform(-2.5, 0.5)), None
    if kind == "slow":
        return _slow, None
    if kind == "never_reads":
        return _never_reading(draw.uniform(1.0, 10.0)), None
    if kind == "oversize":
        return _ask_to_be_refused, post("/v1/completions", {"prompt": "a" * OVERSIZE_BYTES})
    if kind == "malformed":
        return _ask_to_be_refused, MALFORMED[draw.choice(list(MALFORMED))]
    return ask_for_text, None


def _leaving(after_s: float) -> Ask:
    """Reads for a while, and is gone."""

    async def ask(address: Address, request: bytes, reply: Reply, clock: Callable[[], float]) -> None:
        try:
            async with asyncio.timeout(after_s):
                await ask_for_text(address, request, reply, clock)
        except TimeoutError:
            reply.is_whole = False

    return ask


def _never_reading(after_s: float) -> Ask:
    async def ask(address: Address, request: bytes, reply: Reply, clock: Callable[[], float]) -> None:
        _, writer = await asyncio.open_connection(address.host, address.port, limit=1)
        writer.write(request)
        await asyncio.sleep(after_s)
        writer.transport.abort()

    return ask


async def _slow(address: Address, request: bytes, reply: Reply, clock: Callable[[], float]) -> None:
    """Takes a few bytes at a time from a small buffer, but takes them all."""
    reader, writer = await asyncio.open_connection(address.host, address.port, limit=256)
    try:
        writer.write(request)
        await writer.drain()
        slow = asyncio.StreamReader()
        passing = asyncio.create_task(_drip(reader, slow))
        try:
            await take_response(slow, reply, clock)
        finally:
            passing.cancel()
    finally:
        writer.close()


async def _drip(reader: asyncio.StreamReader, slow: asyncio.StreamReader) -> None:
    while part := await reader.read(256):
        slow.feed_data(part)
        await asyncio.sleep(0.05)
    slow.feed_eof()


async def _ask_to_be_refused(
    address: Address, request: bytes, reply: Reply, clock: Callable[[], float]
) -> None:
    """Reads the answer even where the server closed before all was sent."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        writer.write(request)
        try:
            await writer.drain()
        except ConnectionError as error:
            reply.error = f"{type(error).__name__} while sending"
        try:
            await take_response(reader, reply, clock)
        except (EOFError, ConnectionError, IndexError) as error:
            reply.error = f"{type(error).__name__}: the connection was closed"
    finally:
        writer.close()


class _Memory:
    """Resident bytes of a process, once a second."""

    def __init__(self, pid: int) -> None:
        self._pid, self._samples = pid, list[int]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> list[int]:
        """All samples."""
        self._stop.set()
        self._thread.join()
        return self._samples

    def _watch(self) -> None:
        file = Path(f"/proc/{self._pid}/status")
        while True:
            found = re.search(r"VmRSS:\s+(\d+) kB", file.read_text())
            if found:
                self._samples.append(1024 * int(found[1]))
            if self._stop.wait(1.0):
                return


def _details(kinds: Sequence[str], replies: Sequence[Reply], samples: Sequence[int]) -> dict[str, Any]:
    by_kind = {kind: [r for k, r in zip(kinds, replies, strict=True) if k == kind] for kind in SHARES}
    well_formed = [*by_kind["well"], *by_kind["slow"]]
    wrong = [*by_kind["oversize"], *by_kind["malformed"]]
    tenth = max(1, len(samples) // 10)
    before, after = median(samples[tenth : 2 * tenth] or samples), median(samples[-tenth:])
    return {
        "requests": len(replies),
        "outcomes": {kind: dict(Counter(map(_outcome, found))) for kind, found in by_kind.items()},
        "stuck": sum((reply.error or "").startswith("stuck") for reply in replies),
        "unexplained": sum(not (reply.is_answered or is_refused(reply)) for reply in well_formed),
        "accepted_by_mistake": sum(reply.status is not None and reply.status < 400 for reply in wrong),
        "http_5xx": sum((reply.status or 0) >= 500 for reply in replies),
        "errors": dict(
            Counter(r.error or "no end" for r in well_formed if not r.is_answered).most_common(10)
        ),
        "first_token_s": percentiles(
            [reply.first_s for reply in by_kind["well"] if reply.is_answered and reply.times_s]
        ),
        "memory_bytes_before": before,
        "memory_bytes_after": after,
        "memory_growth": after / before - 1,
    }


def _outcome(reply: Reply) -> str:
    if reply.is_answered:
        return "answered"
    return f"status {reply.status}" if reply.status and reply.status != 200 else "no whole answer"


def _failures(details: Mapping[str, Any]) -> list[str]:
    found = [
        f"{details[name]} {name}"
        for name in ("stuck", "unexplained", "accepted_by_mistake", "http_5xx")
        if details[name]
    ]
    found += [f"{name} is {value:g} at the end" for name, value in details["left_open"].items() if value]
    if details["minutes"] >= SHORTEST_FOR_MEMORY and details["memory_growth"] > MEMORY_LIMIT:
        found.append(f"memory grew by {details['memory_growth']:.1%}")
    return found


def _left_open(address: Address) -> dict[str, float]:
    """What the server still holds, a while after the last client."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        with urllib.request.urlopen(f"http://{address.host}:{address.port}/metrics", timeout=10) as response:
            text = response.read().decode()
        found = re.findall(
            r"^(twofold_(?:open_answers|requests_\w+|cache_bytes))\{\S*model=\S+\} (\S+)$", text, re.M
        )
        values = {name: float(value) for name, value in found if not name.endswith(("_total", "_created"))}
        if not any(values.values()) or time.monotonic() > deadline:
            return values
        time.sleep(0.2)
