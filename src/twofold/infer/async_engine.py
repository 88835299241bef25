"""The engine for asyncio: it works in its thread, and coroutines wait without blocking theirs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress

from twofold.infer.engine import Engine
from twofold.infer.handle import Handle
from twofold.infer.request import Completion, Delta, Request


class AsyncEngine:
    """An `Engine` whose requests are awaited. A coroutine that is cancelled cancels its request.

    Args:
        engine: started here, if it was not.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        engine.start()

    async def stream(self, request: Request) -> AsyncIterator[Delta]:
        """The deltas as they come.

        Raises:
            ValueError: see `Engine.submit`.
            RequestFailed: see there.
        """
        async with aclosing(self._deltas(await self._submit(request))) as deltas:
            async for delta in deltas:
                yield delta

    async def generate(self, request: Request) -> tuple[Completion, ...]:
        """The answers. Errors as in `stream`."""
        handle = await self._submit(request)
        async with aclosing(self._deltas(handle)) as deltas:
            async for _ in deltas:
                pass
        return handle.result()

    async def close(self, *, cancel: bool = False) -> None:
        """See `Engine.close`."""
        await asyncio.to_thread(self.engine.close, cancel=cancel)

    async def _submit(self, request: Request) -> Handle:
        # Tokenising a long text would hold up the event loop.
        submitted = asyncio.ensure_future(asyncio.to_thread(self.engine.submit, request))
        try:
            return await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(_give_up)
            raise

    async def _deltas(self, handle: Handle) -> AsyncGenerator[Delta, None]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Delta | None] = asyncio.Queue()

        def pass_on(delta: Delta | None) -> None:
            with suppress(RuntimeError):  # the event loop is gone, and with it whoever waited
                loop.call_soon_threadsafe(queue.put_nowait, delta)

        handle.listen(pass_on)
        try:
            while (delta := await queue.get()) is not None:
                yield delta
            handle.result()  # raises what the request failed with
        finally:
            handle.cancel()


def _give_up(submitted: asyncio.Future[Handle]) -> None:
    """Nobody waits any more for what was just handed in."""
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()
