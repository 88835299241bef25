import asyncio
import time

import pytest

from twofold.infer import AsyncEngine, Engine, Request, RequestFailed, Sampling


def run(main, model, **options):
    """Run a coroutine function on an engine that is closed afterwards."""

    async def whole():
        engine = AsyncEngine(Engine(model, device="cpu", **options))
        try:
            await asyncio.wait_for(main(engine), 60)
        finally:
            await engine.close(cancel=True)
        scheduler = engine.engine.loop.scheduler
        assert (scheduler.used_bytes, scheduler.used_rows, scheduler.n_waiting) == (0, 0, 0)

    asyncio.run(whole())


def test_many_streams_at_once(text_model):
    """Each coroutine gets its own text, whoever else is served."""
    model = text_model()
    prompts = [f"prompt {'x' * i}" for i in range(10)]
    expected = Engine(model, device="cpu").generate(prompts, max_new_tokens=8, temperature=1.0, seed=3)

    async def main(engine):
        async def collect(i):
            request = Request(
                prompt=prompts[i], max_new_tokens=8, sampling=Sampling(temperature=1.0, seed=3 + i)
            )
            return [delta async for delta in engine.stream(request)]

        for deltas, completion in zip(
            await asyncio.gather(*(collect(i) for i in range(10))), expected, strict=True
        ):
            assert "".join(delta.text for delta in deltas) == completion.text
            assert deltas[-1].finish_reason == completion.finish_reason
        answers = await engine.generate(Request(prompt=prompts[0], num_beams=3, n=2, max_new_tokens=4))
        assert len(answers) == 2

    run(main, model, batch_size=4)


def test_a_coroutine_that_is_cancelled_cancels_its_request(text_model, monkeypatch):
    async def main(engine):
        handles = []
        submit = engine.engine.submit
        monkeypatch.setattr(engine.engine, "submit", lambda r: handles.append(submit(r)) or handles[-1])
        request = Request(prompt="hello", max_new_tokens=200, stop_token_ids=())
        stream = engine.stream(request)
        await anext(stream)
        await stream.aclose()
        task = asyncio.create_task(engine.generate(request))
        while len(handles) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await engine.generate(request))[0].finish_reason == "length"
        reasons = [handle.result()[0].finish_reason for handle in handles]
        assert reasons == ["cancelled", "cancelled", "length"]

    run(main, text_model())


def test_one_that_is_cancelled_while_it_hands_in(text_model, monkeypatch):
    async def main(engine):
        handed_in = []
        submit = engine.engine.submit

        def slow(request):
            time.sleep(0.2)
            handed_in.append(submit(request))
            return handed_in[0]

        monkeypatch.setattr(engine.engine, "submit", slow)
        request = Request(prompt="hello", max_new_tokens=200, stop_token_ids=())
        task = asyncio.create_task(engine.generate(request))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while not (handed_in and handed_in[0].is_done):
            await asyncio.sleep(0.02)
        assert handed_in[0].result()[0].finish_reason == "cancelled"

    run(main, text_model())


def test_errors_reach_who_asked(text_model):
    class Broken:
        def apply(self, logits_V):
            raise ZeroDivisionError("division by zero")

        def advance(self, token_id):
            pass

        def fork(self):
            return self

    async def main(engine):
        with pytest.raises(ValueError, match="source is empty"):
            await engine.generate(Request(prompt=""))
        with pytest.raises(RequestFailed, match="division by zero"):
            await engine.generate(Request(prompt="hello", constraint=Broken()))
        with pytest.raises(RequestFailed, match="division by zero"):
            async for _ in engine.stream(Request(prompt="hello", constraint=Broken())):
                pass
        assert (await engine.generate(Request(prompt="hello", max_new_tokens=2)))[0].token_ids

    run(main, text_model())
