"""A request that was handed in: what came of it so far, and a way to wait for more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from twofold.infer.prepare import Prepared
from twofold.infer.request import Completion, Delta

Listener = Callable[[Delta | None], None]
"""Called from the thread that decodes, with each delta, and with None at the end or after a failure."""


_WAIT_S = 1.0
"""After so long a waiting thread looks again whether it has to work itself."""


class RequestFailed(RuntimeError):
    """One request could not be answered; its cause says why. Others are not concerned."""


class Handle:
    """One request on its way. Made by `Engine.submit`.

    Args:
        prepared: the request.
        work: takes a step, or returns False where another thread does that.
        give_up: asks for the request to be cancelled.
    """

    def __init__(
        self, prepared: Prepared, work: Callable[[], bool], give_up: Callable[[Handle], None]
    ) -> None:
        self.prepared = prepared
        self._work, self._give_up = work, give_up
        self._deltas: list[Delta] = []
        self._completions: tuple[Completion, ...] | None = None
        self._error: Exception | None = None
        self._listener: Listener | None = None
        self._changed = threading.Condition()

    @property
    def is_done(self) -> bool:
        """Answered, cancelled or failed."""
        return self._completions is not None or self._error is not None

    def __iter__(self) -> Iterator[Delta]:
        """All deltas from the first, as they come.

        Raises:
            RequestFailed: see there.
        """
        n_seen = 0
        while True:
            with self._changed:
                new, is_last = self._deltas[n_seen:], self.is_done
            yield from new
            n_seen += len(new)
            if is_last:
                break
            if not new:
                self._wait(lambda: self.is_done or len(self._deltas) > n_seen)  # noqa: B023
        self._raise_error()

    def result(self) -> tuple[Completion, ...]:
        """Wait for the end: `n` answers, the best beam first.

        Raises:
            RequestFailed: see there.
        """
        while not self.is_done:
            self._wait(lambda: self.is_done)
        self._raise_error()
        assert self._completions is not None
        return self._completions

    def cancel(self) -> None:
        """Give the request up, wherever it is; what was written so far becomes its result. Does nothing once the
        request is done."""
        if not self.is_done:
            self._give_up(self)

    def listen(self, listener: Listener) -> None:
        """Have everything passed on, what came before at once. One listener for each handle."""
        with self._changed:
            self._listener = listener
            for delta in self._deltas:
                listener(delta)
            if self.is_done:
                listener(None)

    def add(self, deltas: Sequence[Delta]) -> None:
        """For the engine: something new."""
        with self._changed:
            self._deltas += deltas
            if self._listener is not None:
                for delta in deltas:
                    self._listener(delta)
            self._changed.notify_all()

    def finish(self, completions: tuple[Completion, ...]) -> None:
        """For the engine: all answers have ended."""
        with self._changed:
            self._completions = completions
            self._end()

    def fail(self, error: Exception) -> None:
        """For the engine: there will be no answer."""
        with self._changed:
            self._error = error
            self._end()

    def _wait(self, is_there: Callable[[], bool]) -> None:
        """Work, or until another thread has brought something."""
        if not self._work():
            with self._changed:
                self._changed.wait_for(is_there, _WAIT_S)

    def _end(self) -> None:
        if self._listener is not None:
            self._listener(None)
        self._changed.notify_all()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise RequestFailed(f"the request failed: {self._error}") from self._error
