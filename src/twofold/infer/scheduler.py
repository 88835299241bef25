"""Which requests run: admission by memory and rows, encoding in groups of similar length, no starvation.

Plain Python: a job is a few numbers, and what running means is the engine's business. Jobs wait, are admitted in
groups that are encoded together, run until they leave, and may leave at any time.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

_LOOKAHEAD = 64
"""Waiting jobs that are looked at for one group, so that a long queue costs nothing."""


@dataclass(eq=False, kw_only=True, slots=True)
class Job:
    """What the scheduler knows of a request."""

    n_bytes: int
    """Memory it holds while it runs, at most."""
    n_rows: int
    """Samples or beams that are decoded together."""
    n_source: int
    """Encoder tokens."""
    priority: int = 0
    """Higher goes first."""
    arrival: int = field(default=-1, init=False)
    n_overtaken: int = field(default=0, init=False)
    """Groups that were admitted with jobs which came later than this one."""
    is_overdue: bool = field(default=False, init=False)
    """Overtaken too often: it goes before all others, and nobody passes it again."""

    @property
    def place(self) -> tuple[bool, int, int]:
        """Order in the queue: overdue jobs, then by priority, then by arrival."""
        return (not self.is_overdue, 0 if self.is_overdue else -self.priority, self.arrival)


class Scheduler:
    """A queue in front of a bounded space.

    Args:
        max_bytes: of all running jobs together.
        max_rows: likewise.
        max_encode_tokens: of one group, padding included; a longer source is encoded alone.
        max_overtaken: after so many groups with later jobs a waiting one is overdue.
    """

    def __init__(
        self, *, max_bytes: int, max_rows: int, max_encode_tokens: int, max_overtaken: int = 32
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_encode_tokens", max_encode_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.max_bytes, self.max_rows = max_bytes, max_rows
        self.max_encode_tokens, self.max_overtaken = max_encode_tokens, max_overtaken
        self.used_bytes = self.used_rows = 0
        self._waiting: list[Job] = []
        self._running: set[Job] = set()
        self._n_arrived = 0

    @property
    def n_waiting(self) -> int:
        """Jobs not yet admitted."""
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Jobs that hold memory."""
        return len(self._running)

    def check(self, job: Job) -> None:
        """Refuse what could not run even alone; reads no state, so that any thread may call it.

        Raises:
            ValueError: too many rows or bytes.
        """
        if job.n_rows > self.max_rows:
            raise ValueError(
                f"the request needs {job.n_rows} rows (samples or beams), the engine decodes at most "
                f"{self.max_rows} together; ask for fewer, or raise the engine's batch_size"
            )
        if job.n_bytes > self.max_bytes:
            raise ValueError(
                f"the request needs {job.n_bytes:,} bytes of keys and values, the engine keeps at most "
                f"{self.max_bytes:,}; shorten it, lower max_new_tokens, or raise the engine's cache_bytes"
            )

    def submit(self, job: Job) -> None:
        """Let a job wait. Errors as in `check`."""
        self.check(job)
        job.arrival = self._n_arrived
        self._n_arrived += 1
        insort(self._waiting, job, key=lambda waiting: waiting.place)

    def admit(self) -> list[Job]:
        """The next group to encode, sorted by source length; its space is taken. Empty where nothing fits."""
        fitting = self._fitting(self._waiting[:_LOOKAHEAD])
        if not fitting:
            return []
        group = self._of_similar_length(fitting)
        self._take(group)
        self._count_overtaken(group)
        return sorted(group, key=lambda job: job.n_source)

    def shrink(self, job: Job, *, n_rows: int, n_bytes: int) -> None:
        """Some rows of a running job ended: it holds less from now on."""
        assert job in self._running
        assert n_rows <= job.n_rows
        assert n_bytes <= job.n_bytes
        self.used_rows += n_rows - job.n_rows
        self.used_bytes += n_bytes - job.n_bytes
        job.n_rows, job.n_bytes = n_rows, n_bytes

    def leave(self, job: Job) -> None:
        """A job is done or given up, waiting or running; its space is free."""
        if job in self._running:
            self._running.remove(job)
            self.used_rows -= job.n_rows
            self.used_bytes -= job.n_bytes
        else:
            self._waiting.remove(job)

    def _fitting(self, front: list[Job]) -> list[Job]:
        """Jobs that would fit together, in order. An overdue one that does not fit lets nobody pass."""
        free_rows, free_bytes = self.max_rows - self.used_rows, self.max_bytes - self.used_bytes
        fitting = []
        for job in front:
            if job.n_rows <= free_rows and job.n_bytes <= free_bytes:
                fitting.append(job)
                free_rows -= job.n_rows
                free_bytes -= job.n_bytes
            elif job.is_overdue:
                break
        return fitting

    def _of_similar_length(self, fitting: list[Job]) -> list[Job]:
        """The first job, and of the others those nearest in length, up to the padded size of a group."""
        first = fitting[0]
        group, longest = [first], first.n_source
        for job in sorted(fitting[1:], key=lambda job: abs(job.n_source - first.n_source)):
            if max(longest, job.n_source) * (len(group) + 1) <= self.max_encode_tokens:
                group.append(job)
                longest = max(longest, job.n_source)
        return group

    def _take(self, group: list[Job]) -> None:
        for job in group:
            self._waiting.remove(job)
            self._running.add(job)
            self.used_rows += job.n_rows
            self.used_bytes += job.n_bytes

    def _count_overtaken(self, group: list[Job]) -> None:
        latest = max(job.arrival for job in group)
        overtaken = [job for job in self._waiting if job.arrival < latest]
        for job in overtaken:
            job.n_overtaken += 1
            if job.n_overtaken == self.max_overtaken:
                self._waiting.remove(job)
                job.is_overdue = True
                insort(self._waiting, job, key=lambda waiting: waiting.place)
