"""Batches made ahead in a thread, so that the device does not wait for them."""

import threading
from collections.abc import Iterator, Mapping
from queue import Empty, Queue
from types import TracebackType
from typing import Any, Self

from twofold.config.history import Reading
from twofold.data.batch import Batch
from twofold.data.loader import Loader


class Prefetcher:
    """A loader's steps, made ahead; close it, or use it as a context.

    The state is that of what has been handed out: steps that were made and not taken are made again on resuming.
    """

    def __init__(self, loader: Loader, num_ahead: int = 2) -> None:
        """Nothing is made before the first `next_step`, so that a state can still be loaded.

        Args:
            loader: must not be used otherwise from now on, except for `one_pass`.
            num_ahead: steps.
        """
        self._loader = loader
        self._state = loader.state_dict()
        self._queue: Queue[tuple[list[Batch], dict[str, Any]] | Exception] = Queue(num_ahead)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.num_streams = loader.num_streams

    def next_step(self) -> list[Batch]:
        """See `Loader.next_step`; raises what the thread ran into, when its turn comes, and from then on."""
        if self._stop.is_set():
            raise RuntimeError("the prefetcher has been closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="twofold-prefetch", daemon=True)
            self._thread.start()
        item = self._queue.get()
        if isinstance(item, Exception):
            self._queue.put(item)  # the thread has ended, so there is room
            raise item
        batches, self._state = item
        return batches

    def one_pass(self) -> Iterator[Batch]:
        """See `Loader.one_pass`."""
        return self._loader.one_pass()

    def reading(self, state: Mapping[str, Any] | None = None) -> Reading:
        """See `Loader.reading`."""
        return self._loader.reading(state)

    def state_dict(self) -> dict[str, Any]:
        """See `Loader.state_dict`."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Loader.load_state_dict`; drops what was made ahead."""
        self._end_thread()
        self._loader.load_state_dict(state)
        self._state = self._loader.state_dict()

    def close(self) -> None:
        """End the thread."""
        self._end_thread()
        self._stop.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                batches = self._loader.next_step()
                self._queue.put((batches, self._loader.state_dict()))
        except Exception as error:  # goes to the caller of next_step
            self._queue.put(error)

    def _end_thread(self) -> None:
        self._stop.set()
        while self._thread is not None and self._thread.is_alive():
            # A thread that waits for room gets it and then sees the stop.
            try:
                self._queue.get(timeout=0.02)
            except Empty:
                continue
        while not self._queue.empty():
            self._queue.get()
        self._thread = None
        self._stop.clear()
