"""The engine against the plain generator: whatever else runs, a request gets what it would get alone."""

import random
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.tiny import MEETINGS, build, gemma_stack, meeting_id, pair_config, stack
from twofold.infer import Engine, Request, RequestFailed, Sampling, generate
from twofold.infer.handle import Handle
from twofold.infer.prepare import prepare
from twofold.infer.request import Delta

MAX_NEW = 9


def soft_capped(**meeting):
    """Soft-caps, windows of 3, three encoder masks."""
    masks = ("sink", "bidirectional", "causal")
    return build(pair_config(gemma_stack(), encoder_mask=masks, **meeting), qk_factor=2.0)


def ids_request(source=(5, 6, 7), prefix=(2,), **options) -> Request:
    defaults = {"max_new_tokens": MAX_NEW, "stop_token_ids": ()}
    return Request(source_ids=source, prefix_ids=prefix, **(defaults | options))


def random_request(rng: random.Random) -> Request:
    sampling = rng.choice(
        [
            Sampling(),
            Sampling(temperature=1.2, seed=rng.randrange(99)),
            Sampling(
                temperature=0.9, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.3, seed=rng.randrange(9)
            ),
        ]
    )
    return ids_request(
        source=[rng.randrange(3, 40) for _ in range(rng.randrange(12))],
        prefix=[rng.randrange(2, 40) for _ in range(rng.choice([1, 1, 2, 5]))],
        max_new_tokens=rng.randrange(1, MAX_NEW + 1),
        stop_token_ids=rng.sample(range(40), 3),
        sampling=sampling,
        n=1 if sampling.temperature == 0 else rng.choice([1, 1, 3]),
    )


def alone(model, request: Request):
    """What `generate` makes of one request: (token ids, reason) of every answer."""
    rows = generate(
        model,
        [request.source_ids] * request.n,
        [request.prefix_ids] * request.n,
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
        stop_token_ids=request.stop_token_ids,
    )
    return [(row.token_ids, row.finish_reason) for row in rows]


def assert_empty(engine: Engine) -> None:
    scheduler = engine.loop.scheduler
    assert engine.loop.is_idle
    assert (scheduler.used_bytes, scheduler.used_rows, scheduler.n_waiting, scheduler.n_running) == (
        0,
        0,
        0,
        0,
    )
    assert engine.loop.held_bytes == 0


def run_with_arrivals(engine: Engine, requests: list[Request], rng: random.Random):
    """Hand requests in at random steps; memory stays within what was reserved, and that within the bound."""
    waiting = list(requests)
    handles = []
    while waiting or not engine.loop.is_idle:
        n_arriving = rng.choice([0, 0, 1, 3])
        handles += [engine.submit(request) for request in waiting[:n_arriving]]
        del waiting[:n_arriving]
        engine.loop.step()
        assert engine.loop.held_bytes <= engine.loop.scheduler.used_bytes <= engine.cache_bytes
        assert sum(r.held.n_rows for r in engine.loop._running.values()) <= engine.batch_size
    assert_empty(engine)
    return handles


@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
def test_random_arrivals_change_nothing(meeting):
    model, rng = soft_capped(**meeting), random.Random(meeting_id(meeting))
    requests = [random_request(rng) for _ in range(12)]
    handles = run_with_arrivals(Engine(model, device="cpu", batch_size=5), requests, rng)
    for handle, request in zip(handles, requests, strict=True):
        assert [(c.token_ids, c.finish_reason) for c in handle.result()] == alone(model, request)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([MEETINGS[0], MEETINGS[5], MEETINGS[15]]))
def test_any_batch_composition_changes_nothing(seed, meeting):
    """Also without soft-caps, with few rows, little memory and small encode groups."""
    rng = random.Random(seed)
    model = build(pair_config(stack(), **meeting))
    requests = [random_request(rng) for _ in range(rng.randrange(1, 9))]
    engine = Engine(
        model,
        device="cpu",
        batch_size=rng.choice([3, 8]),
        cache_bytes=rng.choice([24_000, 40_000, 10**9]),
        encode_tokens=rng.choice([1, 20, 1000]),
    )
    handles = run_with_arrivals(engine, requests, rng)
    for handle, request in zip(handles, requests, strict=True):
        assert [(c.token_ids, c.finish_reason) for c in handle.result()] == alone(model, request)


def test_a_continuing_decoder_counts_each_requests_own_source():
    """Source 60 + 1 + 3 just fits max_position_embeddings of 64, beside a request with a long prefix."""
    model = build(pair_config(stack(), decoder_positions="continue"))
    requests = [
        ids_request(source=[5] * 60, max_new_tokens=3),
        ids_request(source=[6], prefix=[7] * 40, max_new_tokens=3),
    ]
    found = run_with_arrivals(Engine(model, device="cpu"), requests, random.Random(0))
    for handle, request in zip(found, requests, strict=True):
        assert [(c.token_ids, c.finish_reason) for c in handle.result()] == alone(model, request)


def test_samples_differ_and_are_reproducible():
    engine = Engine(build(pair_config(stack())), device="cpu")
    request = ids_request(n=4, sampling=Sampling(temperature=1.0, seed=11))
    first, again = (engine.submit(request).result() for _ in "ab")
    assert first == again
    assert len({c.token_ids for c in first}) == 4
    single = engine.submit(ids_request(sampling=Sampling(temperature=1.0, seed=13))).result()[0]
    assert single.token_ids == first[2].token_ids  # sample i draws with seed + i


@torch.no_grad()
@pytest.mark.parametrize("num_beams", [1, 3])
def test_logprobs_are_those_of_a_whole_forward_pass(num_beams):
    model = soft_capped(layout="merged", reads="aligned", decoder_positions="continue")
    sampling = Sampling(temperature=1.5, repetition_penalty=1.5) if num_beams == 1 else Sampling()
    request = ids_request(prefix=(2, 9), logprobs=3, sampling=sampling, n=3, num_beams=num_beams)
    for completion in Engine(model, device="cpu").submit(request).result():
        ids = torch.tensor([[2, 9, *completion.token_ids]])
        logits = model(torch.tensor([[5, 6, 7]]), None, ids, torch.ones_like(ids)).logits[0, 1:-1]
        expected = logits.log_softmax(-1)
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids) == MAX_NEW
        for found, token, row in zip(completion.logprobs, completion.token_ids, expected, strict=True):
            assert found.logprob == pytest.approx(row[token].item(), abs=1e-4)
            values, indices = row.topk(3)
            assert [token for token, _ in found.top] == indices.tolist()
            assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-4)
        if num_beams > 1:
            total = sum(x.logprob for x in completion.logprobs)
            assert completion.score == pytest.approx(total / MAX_NEW, abs=1e-4)


def test_deltas_make_the_completion():
    engine = Engine(build(pair_config(stack())), device="cpu")
    request = ids_request(n=2, sampling=Sampling(temperature=1.0), logprobs=1, stop_token_ids=(4, 9, 14, 19))
    handle = engine.submit(request)
    deltas = list(handle)
    assert list(handle) == deltas
    for index, completion in enumerate(handle.result()):
        own = [delta for delta in deltas if delta.index == index]
        assert tuple(t for delta in own for t in delta.token_ids) == completion.token_ids
        assert tuple(x for delta in own for x in delta.logprobs) == completion.logprobs
        assert [delta.finish_reason for delta in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == completion.finish_reason
    assert len(deltas) > 3


def test_priorities():
    """One row: the request of high priority is answered before those that came earlier."""
    engine = Engine(build(pair_config(stack())), device="cpu", batch_size=1)
    order: list[str] = []
    for name, priority in (("a", 0), ("b", 0), ("high", 1)):
        handle = engine.submit(ids_request(priority=priority, max_new_tokens=2))
        handle.listen(lambda delta, name=name: order.append(name) if delta is None else None)
    while engine.loop.step():
        pass
    assert order == ["high", "a", "b"]


class TestCancellation:
    def test_frees_memory_at_once(self):
        engine = Engine(build(pair_config(stack())), device="cpu", batch_size=2)
        handles = [engine.submit(ids_request()) for _ in range(4)]
        for _ in range(3):
            engine.loop.step()
        n_bytes = engine.loop.held_bytes
        handles[0].cancel()
        assert engine.loop.held_bytes == n_bytes // 2
        handles[3].cancel()  # still waiting
        assert handles[3].result()[0].token_ids == ()
        cut = handles[0].result()[0]
        assert cut.finish_reason == "cancelled"
        whole = handles[1].result()[0]
        assert cut.token_ids == whole.token_ids[:4]  # the first comes with the encoding
        assert handles[2].result()[0] == whole
        assert_empty(engine)
        handles[1].cancel()  # done long ago
        assert handles[1].result()[0] == whole

    def test_leaving_a_stream_early(self):
        engine = Engine(build(pair_config(stack())), device="cpu")
        stream = engine.stream(ids_request())
        assert isinstance(next(stream), Delta)
        stream.close()
        assert_empty(engine)

    def test_of_beams_gives_what_was_best(self):
        engine = Engine(build(pair_config(stack())), device="cpu")
        handle = engine.submit(ids_request(num_beams=3, n=2))
        for _ in range(3):
            engine.loop.step()
        handle.cancel()
        assert [(len(c.token_ids), c.finish_reason) for c in handle.result()] == [(4, "cancelled")] * 2
        waiting = engine.submit(ids_request(num_beams=3, n=2))
        waiting.cancel()
        assert [c.token_ids for c in waiting.result()] == [(), ()]
        assert_empty(engine)

    def test_from_within_a_step(self):
        """A constraint that cancels its own request while the engine steps: no deadlock, done right after."""
        engine = Engine(build(pair_config(stack())), device="cpu")
        handles = []

        class Impatient:
            def apply(self, logits_V):
                handles[0].cancel()
                return logits_V

            def advance(self, token_id):
                pass

            def fork(self):
                return self

        handles.append(engine.submit(ids_request(constraint=Impatient())))
        assert handles[0].result()[0].finish_reason == "cancelled"
        assert_empty(engine)


class OnlyTokens:
    """A constraint: these tokens in this order, then token 1."""

    def __init__(self, tokens):
        self.tokens = list(tokens)

    def apply(self, logits_V):
        allowed = self.tokens[0] if self.tokens else 1
        return torch.full_like(logits_V, -torch.inf).index_put((torch.tensor(allowed),), logits_V[allowed])

    def advance(self, token_id):
        assert self.tokens.pop(0) == token_id

    def fork(self):
        return OnlyTokens(self.tokens)


class TestConstraints:
    @pytest.mark.parametrize(
        "options", [{}, {"n": 2, "sampling": Sampling(temperature=1.0)}, {"num_beams": 3}]
    )
    def test_are_followed(self, options):
        engine = Engine(build(pair_config(stack())), device="cpu")
        request = ids_request(constraint=OnlyTokens([30, 31, 30]), stop_token_ids=(1,), **options)
        for _ in range(2):  # the request's own constraint is not used up
            for completion in engine.submit(request).result():
                assert completion.token_ids == (30, 31, 30, 1)
                assert completion.finish_reason == "stop"

    def test_one_that_allows_nothing_fails_alone(self):
        class Nothing(OnlyTokens):
            def apply(self, logits_V):
                return torch.full_like(logits_V, -torch.inf)

            def fork(self):
                return self

        model = build(pair_config(stack()))
        engine = Engine(model, device="cpu")
        good = ids_request()
        handles = [engine.submit(r) for r in (good, ids_request(constraint=Nothing([])), good)]
        beams = engine.submit(ids_request(constraint=Nothing([]), num_beams=2))
        for bad in (handles[1], beams):
            with pytest.raises(RequestFailed, match="no token can be chosen"):
                bad.result()
        with pytest.raises(RequestFailed):
            list(handles[1])
        for handle in (handles[0], handles[2]):
            assert [(c.token_ids, c.finish_reason) for c in handle.result()] == alone(model, good)
        assert_empty(engine)

    @pytest.mark.parametrize("method", ["apply", "advance", "fork"])
    def test_one_that_raises_fails_alone(self, method):
        constraint = OnlyTokens([30, 31, 32])
        setattr(constraint, method, lambda *_: 1 / 0)
        if method != "fork":
            constraint.fork = lambda: constraint
        model = build(pair_config(stack()))
        engine = Engine(model, device="cpu")
        bad, good = engine.submit(ids_request(constraint=constraint)), engine.submit(ids_request())
        with pytest.raises(RequestFailed, match="division by zero"):
            bad.result()
        assert [(c.token_ids, c.finish_reason) for c in good.result()] == alone(model, ids_request())
        assert_empty(engine)


class TestBadRequests:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"source": [5, 40]}, "token ids from 2 to 40; the vocabulary is 0 to 39"),
            ({"source": [5] * 65}, "source of 65 tokens is longer"),
            ({"prefix": []}, "the request has an empty decoder prefix"),
            ({"max_new_tokens": 64}, "pass the decoder's max_position_embeddings of 64"),
            ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
            ({"n": 0}, "n must be at least 1"),
            ({"n": 2}, "n=2 greedy answers would all be equal"),
            ({"n": 3, "num_beams": 2}, "n=3 answers from 2 beams"),
            ({"num_beams": 2, "sampling": Sampling(temperature=1.0)}, "takes no temperature"),
            ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping must be"),
            ({"num_beams": 9}, "needs 9 rows"),
            ({"source": [5] * 60, "max_new_tokens": 40}, "bytes of keys and values"),
            ({"stop_token_ids": (1, 40)}, r"stop_token_ids \[40\] are not in the vocabulary of 0 to 39"),
            ({"stop": "x"}, "no tokenizer"),
            ({"stop": ["a", ""]}, "a stop string is empty"),
            ({"logprobs": -1}, "logprobs must be 0"),
            ({"logprobs": 41}, "logprobs=41 asks for more tokens"),
        ],
    )
    def test_are_refused_before_anything_runs(self, options, match):
        engine = Engine(build(pair_config(stack())), device="cpu", cache_bytes=30_000)
        with pytest.raises(ValueError, match=match):
            engine.submit(ids_request(**options))
        assert_empty(engine)

    def test_prompt_or_ids(self):
        with pytest.raises(ValueError, match="exactly one of them"):
            Request()
        with pytest.raises(ValueError, match="exactly one of them"):
            Request(prompt="a", source_ids=[1], prefix_ids=[1])
        with pytest.raises(ValueError, match="source_ids and prefix_ids go together"):
            Request(source_ids=[1])
        with pytest.raises(ValueError, match="no tokenizer"):
            Engine(build(pair_config(stack())), device="cpu").submit(Request(prompt="a"))

    def test_sizes_of_the_engine(self):
        with pytest.raises(ValueError, match="cache_bytes must be at least 1"):
            Engine(build(pair_config(stack())), device="cpu", cache_bytes=0)
        with pytest.raises(ValueError, match="max_encode_tokens must be at least 1"):
            Engine(build(pair_config(stack())), device="cpu", encode_tokens=0)


class TestFailuresOfTheBackend:
    @staticmethod
    def assert_only_the_second_of_three_fails(engine):
        """Its source is the one with token 39, and the only one of two tokens."""
        handles = [engine.submit(ids_request(source=source)) for source in ([5], [39, 5], [6])]
        with pytest.raises(RequestFailed, match="too much"):
            handles[1].result()
        for handle in (handles[0], handles[2]):
            expected = alone(engine.model, handle.prepared.request)
            assert [(c.token_ids, c.finish_reason) for c in handle.result()] == expected
        assert_empty(engine)

    def test_an_encoding_that_fails_takes_nobody_with_it(self, monkeypatch):
        """Out of memory for sources that contain token 39."""
        engine = Engine(build(pair_config(stack())), device="cpu")
        start = engine.loop.backend.start

        def failing(starts):
            if any(39 in s.source_ids for s in starts):
                raise MemoryError("too much")
            return start(starts)

        monkeypatch.setattr(engine.loop.backend, "start", failing)
        self.assert_only_the_second_of_three_fails(engine)

    def test_a_step_that_fails_is_tried_one_by_one(self, monkeypatch):
        engine = Engine(build(pair_config(stack())), device="cpu")
        start, step = engine.loop.backend.start, engine.loop.backend.step
        failing_ones = []

        def noting(starts):
            started = start(starts)
            pairs = zip(starts, started, strict=True)
            failing_ones.extend(held for s, (held, _) in pairs if 39 in s.source_ids)
            return started

        def failing(held, tokens):
            if failing_ones[0] in held and held[0].n_tokens == 3:
                raise MemoryError("too much")
            return step(held, tokens)

        monkeypatch.setattr(engine.loop.backend, "start", noting)
        monkeypatch.setattr(engine.loop.backend, "step", failing)
        self.assert_only_the_second_of_three_fails(engine)

    def test_logits_that_are_no_numbers(self):
        model = build(pair_config(stack()))
        with torch.no_grad():
            model.decoder.norm.weight.fill_(torch.nan)
        engine = Engine(model, device="cpu")
        with pytest.raises(RequestFailed, match="logits are not finite"):
            engine.submit(ids_request()).result()


class TestThreads:
    def test_many_callers_share_one_engine(self):
        """Eight threads submit at once, with and without the engine's own thread."""
        model = build(pair_config(stack()))
        for starts in (False, True):
            engine = Engine(model, device="cpu", batch_size=4)
            if starts:
                engine.start()
            found = {}

            def call(i, engine=engine, found=found):
                request = ids_request(source=[3 + i] * (i + 1), sampling=Sampling(temperature=1.0, seed=i))
                found[i] = (request, list(engine.submit(request)))

            threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert len(found) == 8
            for request, deltas in found.values():
                expected, _ = alone(model, request)[0]
                assert tuple(t for delta in deltas for t in delta.token_ids) == expected
            engine.close()
            assert_empty(engine)

    def test_an_error_of_the_loop_ends_what_is_open_and_nothing_else(self, monkeypatch):
        engine = Engine(build(pair_config(stack())), device="cpu")
        engine.start()
        admit = engine.loop.scheduler.admit
        monkeypatch.setattr(engine.loop.scheduler, "admit", lambda: 1 / 0)
        with pytest.raises(RequestFailed, match="division by zero"):
            engine.submit(ids_request()).result()
        monkeypatch.setattr(engine.loop.scheduler, "admit", admit)
        assert len(engine.submit(ids_request()).result()[0].token_ids) == MAX_NEW
        engine.close()

    @pytest.mark.parametrize("starts", [False, True])
    def test_closing_finishes_or_cancels(self, starts):
        for cancel in (False, True):
            engine = Engine(build(pair_config(stack())), device="cpu", batch_size=1)
            if starts:
                engine.start()
            handles = [engine.submit(ids_request(max_new_tokens=50)) for _ in range(3)]
            engine.close(cancel=cancel)
            assert all(handle.is_done for handle in handles)
            reasons = {handle.result()[0].finish_reason for handle in handles}
            if not cancel:
                assert reasons == {"length"}
            elif not starts:
                assert reasons == {"cancelled"}
            else:  # a thread that runs may have finished some before
                assert reasons <= {"cancelled", "length"}
            assert_empty(engine)
            with pytest.raises(RuntimeError, match="the engine was closed"):
                engine.submit(ids_request())

    def test_as_a_context(self):
        with Engine(build(pair_config(stack())), device="cpu") as engine:
            handle = engine.submit(ids_request())
        assert handle.result()[0].finish_reason == "length"

        def interrupted():
            with Engine(build(pair_config(stack())), device="cpu") as engine:
                cut.append(engine.submit(ids_request()))
                raise KeyboardInterrupt

        cut = []
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert cut[0].result()[0].finish_reason == "cancelled"

    def test_news_between_looking_and_waiting_are_not_missed(self):
        """They would cost a second each."""
        request = ids_request()

        def work() -> bool:
            handle.add([Delta(index=0, text="", token_ids=(1,))])
            handle.finish(())
            return False

        handle = Handle(prepare(request, pair_config(stack()), None), work, lambda _: None)
        started = time.perf_counter()
        assert len(list(handle)) == 1
        assert time.perf_counter() - started < 0.5
