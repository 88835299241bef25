"""The requests of one call: handed to the engine together, waited for together, given up together."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from twofold.infer import Completion, Delta, Request, RequestFailed
from twofold.infer.handle import Handle
from twofold.serve.errors import ApiError, bad_request

if TYPE_CHECKING:
    from twofold.serve.service import Served, Service

Arrived = list[tuple[int, Delta]]
"""Which request, and what is new of it."""


class Work:
    """Made by `Service.open`; used from the event loop.

    Args:
        service: the server.
        served: the model.
        n_answers: places at its gate.
        facts: for the log; numbers of tokens are added at the end.

    Attributes:
        handles: one for each request, in order.

    Raises:
        ApiError: there is no place.
    """

    def __init__(self, service: Service, served: Served, n_answers: int, facts: dict[str, Any]) -> None:
        served.gate.enter(n_answers)
        self.service, self.served, self.n_answers = service, served, n_answers
        self._facts = facts
        self.handles: list[Handle] = []
        self.started, self.first, self.last = time.perf_counter(), 0.0, 0.0
        self.num_prompt_tokens = self.num_new_tokens = 0
        self._loop = asyncio.get_running_loop()
        self.deadline = self._loop.time() + service.settings.timeout_s
        self._arrived: deque[tuple[int, Delta | None]] = deque()
        self._event = asyncio.Event()
        self._is_woken = self._is_closed = False
        self._n_open = 0
        self._refusal: ApiError | None = None
        service.works.add(self)

    async def submit(
        self, make_requests: Callable[[], Sequence[Request]], *, turn: asyncio.Semaphore | None = None
    ) -> None:
        """Hand in, in a thread.

        Args:
            make_requests: called there.
            turn: held until that thread is done, whether or not somebody still waits for it.

        Raises:
            ApiError: what cannot be answered, or too late.
        """
        try:
            async with asyncio.timeout_at(self.deadline):
                if turn is not None:
                    await turn.acquire()
                submitting = asyncio.ensure_future(asyncio.to_thread(self._submit_all, make_requests))
                if turn is not None:
                    submitting.add_done_callback(lambda _: turn.release())
                try:
                    self.handles = await asyncio.shield(submitting)
                except asyncio.CancelledError:
                    submitting.add_done_callback(_give_up)
                    raise
        except TimeoutError as error:
            raise self._too_late() from error
        prepared = [handle.prepared for handle in self.handles]
        self.num_prompt_tokens = sum(len(p.source_ids) + len(p.prefix_ids) for p in prepared)
        self._n_open = len(self.handles)
        for number, handle in enumerate(self.handles):
            handle.listen(lambda delta, number=number: self._take(number, delta))  # type: ignore[misc]

    async def next(self) -> Arrived:
        """What has come since the last call, at least something; empty at the end.

        Raises:
            ApiError: too late, given up, or failed; nothing more comes then.
        """
        while self._n_open or self._arrived:
            await self._wait()
            arrived: Arrived = []
            while self._arrived:
                number, delta = self._arrived.popleft()
                if delta is None:
                    self._n_open -= 1
                    self._raise_failure(self.handles[number])
                else:
                    arrived.append((number, delta))
                    self.num_new_tokens += len(delta.token_ids)
            if arrived:
                self.last = time.perf_counter()
                self.first = self.first or self.last
                return arrived
        return []

    async def completions(self) -> list[tuple[Completion, ...]]:
        """All answers of each request. Errors as in `next`."""
        while await self.next():
            pass
        return [handle.result() for handle in self.handles]

    def give_up(self, refusal: ApiError) -> None:
        """Let whoever waits fail with this."""
        self._refusal = self._refusal or refusal
        self._event.set()

    def close(self) -> None:
        """Cancel what still runs; give the places back."""
        if self._is_closed:
            return
        self._is_closed = True
        for handle in self.handles:
            handle.cancel()
        self.service.works.discard(self)
        self.served.gate.leave(self.n_answers, time.perf_counter() - self.started)
        self.service.metrics.take(self)
        self._facts.update(prompt_tokens=self.num_prompt_tokens, new_tokens=self.num_new_tokens)
        if self.first:
            self._facts["first_token_s"] = round(self.first - self.started, 4)

    def _submit_all(self, make_requests: Callable[[], Sequence[Request]]) -> list[Handle]:
        handles: list[Handle] = []
        try:
            for request in make_requests():
                handles.append(self.served.engine.submit(request))  # noqa: PERF401 (those before an error are kept)
        except BaseException as error:
            for handle in handles:
                handle.cancel()
            if isinstance(error, ValueError | ImportError):
                raise bad_request(str(error)) from error
            if isinstance(error, RecursionError):
                raise bad_request("the request is nested too deeply; make it flatter") from error
            raise
        return handles

    def _take(self, number: int, delta: Delta | None) -> None:
        """From the engine's thread: note it, and wake the event loop, once for all that come before it looks."""
        self._arrived.append((number, delta))
        if not self._is_woken:
            self._is_woken = True
            with suppress(RuntimeError):  # the event loop is gone, and with it whoever waited
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._is_woken = False
        self._event.set()

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout_at(self.deadline):
                await self._event.wait()
        except TimeoutError:
            self._refusal = self._refusal or self._too_late()
        self._event.clear()
        if self._refusal is not None:
            raise self._refusal

    def _too_late(self) -> ApiError:
        limit = f"{self.service.settings.timeout_s:g} s"
        if self.first or any(
            map(self.served.engine.loop.is_running, self.handles)
        ):  # beams have no first token
            return ApiError(504, f"the answer took longer than {limit}; ask for fewer tokens", code="timeout")
        return ApiError(
            503,
            f"no answer was begun within {limit}, as the server is busy; try again later",
            code="timeout",
            retry_after_s=self.served.gate.retry_after_s,
        )

    def _raise_failure(self, handle: Handle) -> None:
        """What the engine failed with: the client's doing where a constraint leaves nothing to say, ours else."""
        try:
            handle.result()
        except RequestFailed as failed:
            if isinstance(failed.__cause__, ValueError):
                raise bad_request(str(failed.__cause__)) from failed
            raise


def _give_up(submitting: asyncio.Future[list[Handle]]) -> None:
    """Nobody waits any more for what was just handed in."""
    if not submitting.cancelled() and submitting.exception() is None:
        for handle in submitting.result():
            handle.cancel()
