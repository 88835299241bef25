"""What one server holds: its models, what is open, and whether it still takes requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from twofold.data.tokenize import encode
from twofold.infer import Engine, Request
from twofold.serve.errors import ApiError, bad_request, shutting_down
from twofold.serve.limits import Gate
from twofold.serve.metrics import Metrics
from twofold.serve.settings import ServeSettings
from twofold.serve.token_text import TokenTexts
from twofold.serve.work import Work

Beside = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a function in a thread, and gives what that returns."""


class Served:
    """One model of a server.

    Args:
        name: by which clients choose it.
        engine: with a tokenizer.
        settings: of the server.

    Attributes:
        gate: counts answers.
        aside_gate: counts what is computed beside the engine: embeddings, attributions.
        aside: lets one of these run at a time, and likewise `grammars` those that compile a schema or pattern.

    Raises:
        ValueError: the model has no tokenizer.
    """

    def __init__(self, name: str, engine: Engine, settings: ServeSettings) -> None:
        if engine.tokenizer is None:
            raise ValueError(
                f"model {name!r} has no tokenizer, so it takes no text; put tokenizer files into its folder"
            )
        self.name, self.engine = name, engine
        self.created = int(time.time())
        self.gate = Gate(engine.batch_size, settings.max_waiting)
        self.aside_gate = Gate(1, settings.max_waiting)
        self.aside, self.grammars = asyncio.Semaphore(1), asyncio.Semaphore(1)
        self.token_texts = TokenTexts(engine.tokenizer)
        # A tokenizer whose file asks for truncation or padding is changed by its first call, which no other thread
        # may be in the middle of.
        encode(engine.tokenizer, "warm")

    @property
    def is_alive(self) -> bool:
        """Its engine works."""
        return self.engine.is_working


class Service:
    """One server without its routes.

    Args:
        models: engines by name; the first is used where a request names none.
        settings: limits and keys.

    Attributes:
        paths: of all routes, for log and figures.
        public_paths: that need no key; those that end in "/*" stand for all that begin so.

    Raises:
        ValueError: no model, or one without a tokenizer.
    """

    def __init__(self, models: Mapping[str, Engine], settings: ServeSettings) -> None:
        if not models:
            raise ValueError("there is no model to serve; give at least one")
        self.settings = settings
        self.models = {name: Served(name, engine, settings) for name, engine in models.items()}
        self.metrics = Metrics(self)
        self.paths: frozenset[str] = frozenset()
        self.public_paths: set[str] = {"/health", "/ready", "/docs", "/openapi.json"}
        self.is_draining = False
        self.works: set[Work] = set()
        self._asides: set[asyncio.Timeout] = set()

    def model(self, name: str | None) -> Served:
        """By its name.

        Raises:
            ApiError: 404, there is none of this name.
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise ApiError(
                404,
                f"there is no model {name!r} here; there is {', '.join(map(repr, self.models))}",
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    def is_public(self, path: str) -> bool:
        """No key is needed there."""
        return path in self.public_paths or any(
            path.startswith(public[:-1]) for public in self.public_paths if public.endswith("/*")
        )

    @property
    def is_ready(self) -> bool:
        """New requests will be answered."""
        return not self.is_draining and self.is_alive

    @property
    def is_alive(self) -> bool:
        """All engines work."""
        return all(served.is_alive for served in self.models.values())

    @property
    def n_open(self) -> int:
        """Requests that somebody waits for."""
        return len(self.works) + len(self._asides)

    def start(self) -> None:
        """Let the engines work."""
        for served in self.models.values():
            served.engine.start()

    def drain(self) -> None:
        """Take no new requests. May be called from a signal handler."""
        self.is_draining = True

    def give_up_all(self) -> None:
        """End what is open with 503."""
        for work in list(self.works):
            work.give_up(shutting_down())
        for timeout in self._asides:
            if not timeout.expired():
                timeout.reschedule(asyncio.get_running_loop().time())

    async def close(self) -> None:
        """Give up what is open, and end the engines."""
        self.drain()
        self.give_up_all()
        for served in self.models.values():
            await asyncio.to_thread(served.engine.close, cancel=True)

    async def open(
        self,
        served: Served,
        facts: dict[str, Any],
        n_answers: int,
        make_requests: Callable[[], Sequence[Request]],
        *,
        needs_grammar: bool = False,
    ) -> Work:
        """Hand requests in; the caller closes the work.

        Args:
            served: the model.
            facts: of the request, for the log; numbers of tokens are added at the end.
            n_answers: rows of all requests together.
            make_requests: called in a thread, as tokenising takes time.
            needs_grammar: it compiles a schema or a pattern, which only one at a time does.

        Raises:
            ApiError: too many at a time; or what `make_requests` refuses.
        """
        work = Work(self, served, n_answers, facts)
        try:
            await work.submit(make_requests, turn=served.grammars if needs_grammar else None)
        except BaseException:
            work.close()
            raise
        return work

    @asynccontextmanager
    async def beside(self, served: Served, n: int) -> AsyncIterator[Beside]:
        """A turn at computing with the model itself, beside its engine: embeddings, attributions. One at a time.

        Gives an awaitable function that runs another in a thread, where a ValueError is the client's. Long work is
        best cut into several such calls: between them it can be given up.

        Args:
            served: the model.
            n: how much it counts for at `aside_gate`, such as a number of texts.

        Raises:
            ApiError: too many at a time, or too late.
        """
        started = time.perf_counter()
        served.aside_gate.enter(n)
        timeout = asyncio.timeout(self.settings.timeout_s)
        self._asides.add(timeout)
        try:
            async with timeout, served.aside:
                yield _in_thread
        except TimeoutError as error:
            if self.is_draining:
                raise shutting_down() from error
            raise ApiError(
                503,
                f"not answered within {self.settings.timeout_s:g} s; try again later or send less",
                code="timeout",
                retry_after_s=served.aside_gate.retry_after_s,
            ) from error
        finally:
            self._asides.discard(timeout)
            served.aside_gate.leave(n, time.perf_counter() - started)


async def _in_thread(compute: Callable[[], Any]) -> Any:
    """Until it is over, even if nobody waits any more: what it uses is not free before."""
    running = asyncio.ensure_future(asyncio.to_thread(compute))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise
    except ValueError as error:
        raise bad_request(str(error)) from error
