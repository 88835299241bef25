"""The engine's loop: each step encodes one group of waiting requests and decodes one token of all running ones.

A request that runs alone may have more than one token decoded in a step: what it guesses is verified with its newest.

One thread at a time steps. Requests and cancellations may come from any thread: they lie in an inbox that every
step empties first.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from twofold.infer.backends import Backend, Held
from twofold.infer.beams import Beams
from twofold.infer.handle import Handle
from twofold.infer.lookup import Guesser
from twofold.infer.samples import Answers, Samples
from twofold.infer.scheduler import Job, Scheduler


@dataclass(eq=False, slots=True)
class Running:
    """A request in the decode stage."""

    handle: Handle
    job: Job
    held: Held
    answers: Answers
    guesser: Guesser | None
    tokens: list[int] = field(default_factory=list)
    """The newest of each row, not yet taken in by the backend."""

    def guess(self) -> list[int]:
        """What may follow them, where the request asks for guesses and there is one."""
        return [] if self.guesser is None else self.guesser.guess()


class Loop:
    """Requests through scheduler and backend.

    Args:
        backend: runs the model.
        scheduler: says what runs.
        device: where the backend's logits lie.
    """

    def __init__(self, backend: Backend, scheduler: Scheduler, device: torch.device) -> None:
        self.backend, self.scheduler = backend, scheduler
        self._device = device
        self._submitted: deque[tuple[Handle, Job]] = deque()
        self._cancelled: deque[Handle] = deque()
        self._jobs: dict[Handle, Job] = {}
        self._handles: dict[Job, Handle] = {}
        self._running: dict[Job, Running] = {}
        self._turn = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Memory that running requests hold in the backend."""
        return sum(running.held.n_bytes for running in self._running.values())

    @property
    def is_idle(self) -> bool:
        """Nothing runs, waits, or lies in the inbox."""
        return not (self._jobs or self._submitted or self._cancelled)

    def is_running(self, handle: Handle) -> bool:
        """The request is in the decode stage; any thread may ask."""
        return self._jobs.get(handle) in self._running

    def job_of(self, handle: Handle) -> Job:
        """What the scheduler has to know of a request.

        Raises:
            ValueError: it could not run even alone.
        """
        prepared = handle.prepared
        job = Job(
            n_bytes=self.backend.bytes_needed(prepared.start),
            n_rows=prepared.request.n_rows,
            n_source=len(prepared.source_ids),
            priority=prepared.request.priority,
        )
        self.scheduler.check(job)
        return job

    def submit(self, handle: Handle, job: Job) -> None:
        """Hand a request in."""
        self._submitted.append((handle, job))

    def cancel(self, handle: Handle) -> None:
        """Give a request up: now, or right after the step that is being taken."""
        self._cancelled.append(handle)
        self._settle()

    def cancel_all(self) -> None:
        """Give up whatever is open, once the step that is being taken is over."""
        with self._turn:
            self._empty_inbox()
            self._cancelled.extend(self._jobs)
            self._empty_inbox()

    def step(self) -> bool:
        """Encode a group, decode a token. Returns whether anything is left to do.

        What one request does wrong, it fails for alone. An error in the loop itself ends all of them.
        """
        with self._turn:
            try:
                self._empty_inbox()
                group = self.scheduler.admit()
                assert group or self._running or not self.scheduler.n_waiting  # else nothing would ever run
                if group:
                    self._start(group)
                running = list(self._running.values())
                # Guesses ride on the weights that a single row reads anyway; beside others they cost their time.
                if len(running) == 1 and (guesses := running[0].guess()):
                    self._verify(running[0], guesses)
                elif running:
                    self._decode(running)
            except Exception as error:
                for job in list(self._handles):
                    self._fail(job, error)
                raise
        self._settle()
        return not self.is_idle

    def _settle(self) -> None:
        """Cancel what is to be cancelled, unless another thread is in the loop: it will, as it looks again after
        letting go."""
        while self._cancelled and self._turn.acquire(blocking=False):
            try:
                self._empty_inbox()
            finally:
                self._turn.release()

    def _empty_inbox(self) -> None:
        while self._submitted:
            handle, job = self._submitted.popleft()
            self._jobs[handle], self._handles[job] = job, handle
            self.scheduler.submit(job)
        while self._cancelled:
            handle = self._cancelled.popleft()
            if handle in self._jobs:
                self._cancel(self._jobs[handle])

    def _cancel(self, job: Job) -> None:
        handle, running = self._handles[job], self._running.get(job)
        answers = self._answers(handle) if running is None else running.answers
        self._leave(job)
        handle.add(answers.cancel())
        handle.finish(answers.completions())

    def _answers(self, handle: Handle) -> Answers:
        prepared = handle.prepared
        return Beams(prepared) if prepared.request.num_beams > 1 else Samples(prepared, self._device)

    def _start(self, group: Sequence[Job]) -> None:
        """Encode stage: together, or one by one where that fails."""
        try:
            started = self.backend.start([self._handles[job].prepared.start for job in group])
        except Exception as error:
            if len(group) == 1:
                self._fail(group[0], error)
            else:
                for job in group:
                    self._start([job])
            return
        for job, (held, logits_V) in zip(group, started, strict=True):
            handle = self._handles[job]
            try:
                guesser = handle.prepared.guesser() if self.backend.can_verify else None
                self._running[job] = Running(handle, job, held, self._answers(handle), guesser)
            except Exception as error:  # the caller's constraint may refuse to be forked
                self._fail(job, error)
                continue
            self._advance(self._running[job], logits_V[None])

    def _decode(self, group: Sequence[Running]) -> None:
        """Decode stage: together, or one by one where that fails."""
        try:
            logits = self.backend.step([r.held for r in group], [r.tokens for r in group])
        except Exception as error:
            if len(group) == 1:
                self._fail(group[0].job, error)
            else:
                for running in group:
                    self._decode([running])
            return
        for running, logits_RV in zip(group, logits, strict=True):
            self._advance(running, logits_RV)

    def _verify(self, running: Running, guesses: Sequence[int]) -> None:
        """Decode stage of a request with guesses: choose token by token, as long as that gives what was guessed."""
        try:
            logits_TV = self.backend.verify(running.held, [*running.tokens, *guesses])
        except Exception as error:
            self._fail(running.job, error)
            return
        n_right = 0
        for logits_V in logits_TV:
            self._advance(running, logits_V[None])
            if running.job not in self._running:
                return
            if n_right == len(guesses) or running.tokens != [guesses[n_right]]:
                break
            n_right += 1
        running.held.accept(1 + n_right)
        assert running.guesser is not None
        running.guesser.learn(n_right)

    def _advance(self, running: Running, logits_RV: Tensor) -> None:
        """Choose the next tokens of a request, and let it go on or end."""
        try:
            advance = running.answers.advance(logits_RV)
        except Exception as error:
            self._fail(running.job, error)
            return
        running.tokens = advance.tokens
        if running.guesser is not None:
            for token in advance.tokens:
                running.guesser.add(token)
        if not advance.rows:
            self._leave(running.job)
            running.handle.add(advance.deltas)
            running.handle.finish(running.answers.completions())
            return
        running.held.select(advance.rows)
        if running.handle.prepared.request.num_beams == 1:  # beams may become more again
            self.scheduler.shrink(running.job, n_rows=len(advance.rows), n_bytes=running.held.n_bytes)
        running.handle.add(advance.deltas)

    def _fail(self, job: Job, error: Exception) -> None:
        handle = self._handles[job]
        self._leave(job)
        handle.fail(error)

    def _leave(self, job: Job) -> None:
        """Forget a request, and with it what it held."""
        self._running.pop(job, None)
        self.scheduler.leave(job)
        del self._jobs[self._handles.pop(job)]
