"""The loop with a backend of plain numbers: what is taken is given back, whatever happens."""

import random

import torch

from tests.models.tiny import pair_config, stack
from twofold.infer import Request, Sampling
from twofold.infer.handle import Handle
from twofold.infer.loop import Loop
from twofold.infer.prepare import prepare
from twofold.infer.scheduler import Scheduler

VOCAB = 8


class Counted:
    """What `NumbersBackend` holds of a request."""

    def __init__(self, backend, start):
        self.backend, self.n_rows = backend, start.n_rows
        self.per_row = start.n_tokens
        self.n_source = len(start.source_ids)
        self.n_tokens, self.n_verified, self.n_waiting = len(start.prefix_ids), start.n_verified, 0
        self.is_bad = 7 in start.source_ids

    @property
    def n_bytes(self):
        return self.n_source + self.n_rows * self.per_row + self.n_verified

    def select(self, rows):
        self.n_rows = len(rows)

    def accept(self, n):
        assert 1 <= n <= self.n_waiting
        self.n_tokens, self.n_waiting = self.n_tokens + n, 0
        self.backend.n_accepted += n - 1


class NumbersBackend:
    """Random logits; sources with token 6 cannot be encoded, those with 7 fail in a later step."""

    can_verify = True

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.n_accepted = self.n_verifications = 0

    def bytes_needed(self, start):
        return len(start.source_ids) + start.n_rows * start.n_tokens + start.n_verified

    def start(self, starts):
        if any(6 in start.source_ids for start in starts):
            raise MemoryError
        return [(Counted(self, start), torch.randn(VOCAB, generator=self.generator)) for start in starts]

    def step(self, held, tokens):
        if any(h.is_bad for h in held):
            raise MemoryError
        assert [h.n_rows for h in held] == [len(row) for row in tokens]
        for h in held:
            h.n_tokens += 1
            assert h.n_tokens <= h.per_row
        return [torch.randn(h.n_rows, VOCAB, generator=self.generator) for h in held]

    def verify(self, held, tokens):
        if held.is_bad:
            raise MemoryError
        assert held.n_rows == 1
        assert 2 <= len(tokens) <= held.n_verified
        assert held.n_tokens + len(tokens) <= held.per_row
        held.n_waiting = len(tokens)
        self.n_verifications += 1
        return torch.randn(len(tokens), VOCAB, generator=self.generator)


def random_request(rng):
    shape = rng.choice(
        [
            {},
            {"lookup": rng.randrange(1, 6), "max_new_tokens": rng.randrange(1, 30), "stop_token_ids": (1,)},
            {"n": 3, "sampling": Sampling(temperature=1.0)},
            {"num_beams": 2, "n": 2},
        ]
    )
    limits = {"max_new_tokens": rng.randrange(1, 5), "stop_token_ids": (1, 5)}
    return Request(
        source_ids=[rng.randrange(3, 6) for _ in range(rng.randrange(4))] + rng.choice([[]] * 8 + [[6], [7]]),
        prefix_ids=[2],
        priority=rng.randrange(3),
        **(limits | shape),
    )


def test_ten_thousand_requests_leave_nothing_behind():
    """Random shapes, priorities, cancellations and failures of the backend; some requests guess."""
    rng = random.Random(0)
    config = pair_config(stack(vocab_size=VOCAB))
    scheduler = Scheduler(max_bytes=60, max_rows=12, max_encode_tokens=12)
    backend = NumbersBackend(0)
    loop = Loop(backend, scheduler, torch.device("cpu"))
    handles, n_left = [], 10_000
    while n_left or not loop.is_idle:
        for _ in range(min(n_left, rng.choice([0] * 7 + [1] * 4 + [12]))):
            handle = Handle(prepare(random_request(rng), config, None), lambda: True, loop.cancel)
            loop.submit(handle, loop.job_of(handle))
            handles.append(handle)
            n_left -= 1
        if handles and rng.random() < 0.5:
            rng.choice(handles[-40:]).cancel()
        loop.step()
        assert loop.held_bytes <= scheduler.used_bytes <= 60
    assert all(handle.is_done for handle in handles)
    reasons = [c.finish_reason for h in handles if h._error is None for c in h.result()]
    failed = sum(handle._error is not None for handle in handles)
    assert {reason: reasons.count(reason) > 100 for reason in ("stop", "length", "cancelled")} == {
        "stop": True,
        "length": True,
        "cancelled": True,
    }
    assert 500 < failed < 4000
    assert backend.n_verifications > 50
    assert backend.n_accepted > 10
    assert (scheduler.used_bytes, scheduler.used_rows, scheduler.n_waiting, scheduler.n_running) == (
        0,
        0,
        0,
        0,
    )
    assert loop.held_bytes == 0
