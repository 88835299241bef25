"""Requests that guess, against the plain generator: fewer steps, the same answers."""

import random

import pytest
import torch

from tests.infer.test_engine import OnlyTokens, alone, assert_empty, ids_request, run_with_arrivals
from tests.models.tiny import MEETINGS, build, gemma_stack, meeting_id, pair_config, stack
from twofold.infer import Engine, Request, RequestFailed, Sampling

MAX_NEW = 40


def talkative(seed=0, **meeting):
    """Soft-caps, windows of 3, and a head of its own: answers go round in circles, but not from the start."""
    config = pair_config(gemma_stack(), tie_word_embeddings="none", **meeting)
    return build(config, seed, qk_factor=2.0)


def long_request(rng: random.Random, **options) -> Request:
    defaults = {
        "source": [rng.randrange(3, 40) for _ in range(rng.randrange(12))],
        "prefix": [rng.randrange(2, 40) for _ in range(rng.choice([1, 1, 2, 5]))],
        "max_new_tokens": MAX_NEW,
        "lookup": rng.choice([1, 3, 8]),
    }
    return ids_request(**(defaults | options))


class Steps:
    """Counts what an engine asks of its backend."""

    def __init__(self, engine: Engine) -> None:
        backend = engine.loop.backend
        self._step, self._verify = backend.step, backend.verify
        backend.step, backend.verify = self.step, self.verify
        self.n_together = self.n_alone = self.n_verified = 0
        self.is_last_verified = False

    def step(self, held, tokens):
        self.n_alone += len(held) == 1
        self.n_together += len(held) > 1
        self.is_last_verified = False
        return self._step(held, tokens)

    def verify(self, held, tokens):
        self.n_verified += 1
        self.is_last_verified = True
        return self._verify(held, tokens)


def answers(handle):
    return [(c.token_ids, c.finish_reason) for c in handle.result()]


@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
def test_guesses_change_nothing(meeting):
    model, rng = talkative(**meeting), random.Random(meeting_id(meeting))
    engine = Engine(model, device="cpu")
    steps = Steps(engine)
    for _ in range(4):
        request = long_request(rng)
        handle = engine.submit(request)
        assert answers(handle) == alone(model, request)
        assert [delta.token_ids for delta in handle] == [(token,) for token in handle.result()[0].token_ids]
        assert_empty(engine)
    assert steps.n_verified > 10
    assert steps.n_alone + steps.n_verified < 4 * (MAX_NEW - 1)


@pytest.mark.parametrize("meeting", [MEETINGS[i] for i in (0, 5, 15)], ids=meeting_id)
def test_others_that_come_and_go_change_nothing(meeting):
    """While others run there are plain steps, after them guesses again; and they come again and again."""
    model, rng = talkative(**meeting), random.Random(meeting_id(meeting))
    requests = [
        long_request(rng, max_new_tokens=rng.choice([1, 2, 12, 40]), lookup=rng.choice([0, 2, 6, 6]))
        for _ in range(15)
    ]
    engine = Engine(model, device="cpu", batch_size=3, cache_bytes=60_000)
    steps = Steps(engine)
    handles = []
    for first in range(0, 15, 3):
        handles += run_with_arrivals(engine, requests[first : first + 3], rng)
    for handle, request in zip(handles, requests, strict=True):
        assert answers(handle) == alone(model, request)
    assert min(steps.n_together, steps.n_alone, steps.n_verified) > 3


def test_nothing_is_guessed_beside_others():
    engine = Engine(talkative(), device="cpu")
    steps = Steps(engine)
    handles = [engine.submit(long_request(random.Random(i), lookup=8)) for i in range(2)]
    for handle in handles:
        handle.result()
    assert (steps.n_together, steps.n_alone, steps.n_verified) == (MAX_NEW - 1, 0, 0)


def test_ends_anywhere_within_a_guess():
    """By each token of the answer as a stop token, and after each number of tokens."""
    model = talkative(7, **MEETINGS[14])
    request = ids_request(max_new_tokens=MAX_NEW, lookup=8)
    (whole, _), *_ = alone(model, request)
    assert len(set(whole)) > 6
    engine = Engine(model, device="cpu")
    for token in set(whole):
        found = engine.submit(ids_request(max_new_tokens=MAX_NEW, lookup=8, stop_token_ids=(token,)))
        assert answers(found) == [(whole[: whole.index(token) + 1], "stop")]
        assert [delta.finish_reason for delta in found][-1] == "stop"
    for n in range(1, MAX_NEW + 1):
        assert answers(engine.submit(ids_request(max_new_tokens=n, lookup=8))) == [(whole[:n], "length")]
    assert_empty(engine)


def test_stop_strings_end_within_a_guess(text_model):
    """By each ten characters of an answer that repeats shorter pieces: the last of them may well be guessed."""
    model = text_model(tie_word_embeddings="none", layout="separate", reads="final")
    engine = Engine(model, device="cpu")
    steps = Steps(engine)
    plain = engine.submit(Request(prompt="aaaa", max_new_tokens=MAX_NEW)).result()[0]
    assert len(plain.token_ids) == MAX_NEW
    n_within = 0
    for start in range(len(plain.text) - 9):
        options = {"max_new_tokens": MAX_NEW, "stop": plain.text[start : start + 10]}
        expected = engine.submit(Request(prompt="aaaa", **options))
        (completion,) = expected.result()
        found = engine.submit(Request(prompt="aaaa", lookup=8, **options))
        assert found.result() == (completion,)
        assert list(found) == list(expected)
        n_within += steps.is_last_verified and completion.finish_reason == "stop"
    assert n_within > 10
    assert_empty(engine)


@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": 2},
        {"sampling": Sampling(temperature=0.7, seed=3)},
        {"sampling": Sampling(temperature=0.25, top_k=9, top_p=0.9, repetition_penalty=1.02, seed=4)},
        {"sampling": Sampling(frequency_penalty=0.02), "logprobs": 0},
        {"constraint": OnlyTokens([5, 6, 7, 9] * 6), "stop_token_ids": (1,)},
    ],
)
def test_whatever_else_is_asked_for(options):
    """Tokens are chosen one by one from the logits of their places, so that nothing else has to know of guesses."""
    engine = Engine(talkative(), device="cpu")
    request = {"source": [5, 6, 7, 8, 5, 6], "max_new_tokens": MAX_NEW, **options}
    expected = engine.submit(ids_request(**request)).result()[0]
    steps = Steps(engine)
    found = engine.submit(ids_request(**request, lookup=5)).result()[0]
    assert (found.token_ids, found.finish_reason) == (expected.token_ids, expected.finish_reason)
    assert steps.n_verified > 2
    assert steps.n_alone + steps.n_verified < len(found.token_ids) - 1
    if "logprobs" in options:
        for one, other in zip(found.logprobs, expected.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [value for _, value in one.top] == pytest.approx([x for _, x in other.top], abs=1e-4)


def test_cancelled_between_guesses():
    model = talkative()
    engine = Engine(model, device="cpu")
    request = ids_request(max_new_tokens=MAX_NEW, lookup=4)
    handle = engine.submit(request)
    for _ in range(8):
        engine.loop.step()
    handle.cancel()
    (found, reason), *_ = answers(handle)
    assert reason == "cancelled"
    assert 9 < len(found) < MAX_NEW
    assert found == alone(model, request)[0][0][: len(found)]
    assert_empty(engine)


def test_a_verification_that_fails(monkeypatch):
    engine = Engine(talkative(), device="cpu")

    def failing(held, tokens):
        raise MemoryError("too much")

    monkeypatch.setattr(engine.loop.backend, "verify", failing)
    with pytest.raises(RequestFailed, match="too much"):
        engine.submit(ids_request(max_new_tokens=MAX_NEW, lookup=4)).result()
    assert_empty(engine)


def test_a_choice_that_fails_within_a_guess():
    """The same token again and again, as guessed, until none is allowed."""

    class Few(OnlyTokens):
        def apply(self, logits_V):
            return super().apply(logits_V) if self.tokens else torch.full_like(logits_V, -torch.inf)

        def fork(self):
            return Few(self.tokens)

    engine = Engine(talkative(), device="cpu")
    steps = Steps(engine)
    handle = engine.submit(ids_request(max_new_tokens=MAX_NEW, lookup=8, constraint=Few([5] * 12)))
    with pytest.raises(RequestFailed, match="no token can be chosen"):
        handle.result()
    assert steps.is_last_verified
    assert [delta.token_ids for delta in handle._deltas] == [(5,)] * 12
    assert_empty(engine)


def test_a_backend_that_cannot_verify_takes_plain_steps(monkeypatch):
    model = talkative()
    engine = Engine(model, device="cpu")
    monkeypatch.setattr(engine.loop.backend, "can_verify", False)
    steps = Steps(engine)
    request = ids_request(max_new_tokens=MAX_NEW, lookup=4)
    assert answers(engine.submit(request)) == alone(model, request)
    assert (steps.n_alone, steps.n_verified) == (MAX_NEW - 1, 0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lookup": -1}, "lookup must be 0"),
        ({"lookup": 4, "num_beams": 2}, "the request has 2 rows"),
        ({"lookup": 4, "n": 3, "sampling": Sampling(temperature=1.0)}, "the request has 3 rows"),
    ],
)
def test_what_cannot_be_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        ids_request(**options)


def test_guesses_need_memory_of_their_own():
    """Room for the newest token and the guesses, in each of three layers, and for no more than may be written."""
    engine = Engine(build(pair_config(stack())), device="cpu")
    needed = {
        n: engine.loop.job_of(engine.submit(ids_request(max_new_tokens=9, lookup=n))).n_bytes
        for n in (0, 1, 4, 50)
    }
    per_token = 3 * 2 * 2 * 8 * 4
    assert [needed[n] - needed[0] for n in (1, 4, 50)] == [2 * per_token, 5 * per_token, 8 * per_token]
    engine.close()
