"""Lines of a batch through a server's app in this process: the same checks, answers and errors as over HTTP."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Generator, Iterable
from typing import Any

from fastapi import FastAPI

from twofold.infer import Engine
from twofold.serve.app import create_app
from twofold.serve.batch_files import BatchLine, Outcome
from twofold.serve.in_process import post
from twofold.serve.settings import ServeSettings

WINDOW = 256
"""Lines that are handed in or wait to be given out, at most."""

_SEED_STEP = 1 << 20
"""Between the seeds of two lines: more than the answers that a line has."""
_NO_LIMIT = 1 << 40


def batch_app(name: str, engine: Engine) -> FastAPI:
    """A server's app without a server's limits: nobody else waits here.

    Args:
        name: by which lines call the model.
        engine: with a tokenizer.
    """
    settings = ServeSettings(
        max_body_bytes=_NO_LIMIT,
        max_waiting=_NO_LIMIT,
        timeout_s=float(_NO_LIMIT),
        stall_timeout_s=float(_NO_LIMIT),
    )
    return create_app({name: engine}, settings)


class Batches:
    """An app at work in this process, for callers that know no event loop.

    Args:
        app: see `batch_app`; started here.
        seed: of lines that give none, see `seeded`.
    """

    def __init__(self, app: FastAPI, *, seed: int = 0) -> None:
        self._app, self._seed = app, seed
        self._runner = asyncio.Runner()
        self._lifespan = app.router.lifespan_context(app)
        self._runner.run(self._lifespan.__aenter__())

    def answer(self, lines: Iterable[BatchLine]) -> Generator[Outcome, None, None]:
        """Outcomes in the order of the lines, as they come; closing it gives up what is open."""
        outcomes = answer_batch(self._app, lines, seed=self._seed)
        try:
            while (outcome := self._runner.run(_next(outcomes))) is not None:
                yield outcome
        finally:
            self._runner.run(outcomes.aclose())

    def close(self) -> None:
        """End the engine."""
        try:
            self._runner.run(self._lifespan.__aexit__(None, None, None))
        finally:
            self._runner.close()


async def answer_batch(
    app: FastAPI, lines: Iterable[BatchLine], *, seed: int = 0, window: int = WINDOW
) -> AsyncGenerator[Outcome, None]:
    """Outcomes in the order of the lines, as they come; later lines run while earlier ones are waited for.

    Args:
        app: whose lifespan has begun, in this event loop.
        lines: the input.
        seed: of lines that give none, see `seeded`.
        window: see `WINDOW`.
    """
    pending: deque[asyncio.Task[Outcome]] = deque()
    rest = iter(lines)
    try:
        while True:
            while len(pending) < window and (line := next(rest, None)) is not None:
                pending.append(asyncio.create_task(_answer(app, line, seed)))
            if not pending:
                return
            yield await pending.popleft()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def seeded(line: BatchLine, seed: int) -> dict[str, Any]:
    """The body with a seed, where it generates and gives none: neither the batch nor where a run starts matters."""
    body = line.body or {}
    if line.url == "/v1/embeddings" or body.get("seed") is not None:
        return body
    return body | {"seed": seed + line.number * _SEED_STEP}


async def _answer(app: FastAPI, line: BatchLine, seed: int) -> Outcome:
    if line.body is None:
        return Outcome(line=line)
    response = await post(app, line.url, seeded(line, seed))
    return Outcome(
        line=line, status_code=response.status_code, request_id=response.request_id, body=response.body
    )


async def _next(outcomes: AsyncGenerator[Outcome, None]) -> Outcome | None:
    return await anext(outcomes, None)
