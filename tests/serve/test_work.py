"""Work that is given up: by the client, by the clock, or because there is too much of it."""

import asyncio
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import openai
import pytest

from tests.serve.running import WAIT_S, make_engine, serving, until
from twofold.infer import Request, Sampling
from twofold.serve import ServeSettings, create_app

LONG = {"model": "tiny", "max_tokens": 200, "temperature": 0, "stop_token_ids": []}
PAUSE_S = 0.02


def is_idle(running):
    return running.service.n_open == 0 and running.engine.loop.is_idle


@pytest.fixture(scope="module")
def slow(byte_tokenizer):
    """Two answers at a time, four seconds for a long one, and room for two more."""
    engine = make_engine(byte_tokenizer, pause_s=PAUSE_S, batch_size=2)
    with serving({"tiny": engine}, ServeSettings(max_waiting=2)) as running:
        yield running


def raw_request(port, body, *, receive_bytes=None, path="/v1/completions"):
    """A connection on which a request was sent, and nothing read yet."""
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.connect(("127.0.0.1", port))
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def test_a_client_that_leaves_takes_its_work_along(slow):
    """While it is streamed to, while it waits for a whole answer, and while its turn has not come."""
    with (
        slow.http() as http,
        http.stream("POST", "/v1/completions", json={**LONG, "prompt": "x", "stream": True}) as reply,
    ):
        assert reply.status_code == 200
        next(reply.iter_bytes())
        assert slow.engine.loop.scheduler.n_running == 1
    until(lambda: is_idle(slow))
    connections = [raw_request(slow.port, {**LONG, "prompt": "x" * n}) for n in (1, 2, 3)]
    until(lambda: len(slow.service.works) == 3 and slow.engine.loop.scheduler.n_waiting == 1)
    started = time.monotonic()
    for connection in connections:
        connection.close()
    until(lambda: is_idle(slow))
    assert time.monotonic() - started < 1.0  # not the four seconds that the answers would take
    assert slow.service.models["tiny"].gate.n_open == 0
    with slow.http() as http:
        assert 'twofold_requests_total{route="/v1/completions",status="499"} 4.0' in http.get("/metrics").text


def test_a_client_that_leaves_before_its_request_is_whole(slow):
    connection = raw_request(slow.port, {"prompt": "x"})
    half = socket.create_connection(("127.0.0.1", slow.port))
    half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    half.close()
    connection.close()
    until(lambda: is_idle(slow))


def test_too_many_at_a_time_are_told_to_come_again(slow):
    connections = [raw_request(slow.port, {**LONG, "prompt": "x"}) for _ in range(4)]
    until(lambda: slow.service.models["tiny"].gate.n_open == 4)
    for stream in (False, True):
        with pytest.raises(
            openai.RateLimitError, match="4 answers are being written or wait, 4 are allowed"
        ) as caught:
            slow.openai().completions.create(model="tiny", prompt="x", stream=stream)
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        assert caught.value.code == "queue_full"
    # What is computed beside the engine has a queue of its own.
    assert slow.openai().embeddings.create(model="tiny", input="x").data
    for connection in connections:
        connection.close()
    until(lambda: is_idle(slow))
    with pytest.raises(openai.BadRequestError, match="at most 2 at a time"):
        slow.openai().completions.create(model="tiny", prompt=["x"] * 3)


def test_a_client_that_reads_nothing_holds_nobody_up(byte_tokenizer):
    """Its answer of a megabyte or more fills the buffers between; others are served, and then it is let go."""
    engine = make_engine(byte_tokenizer, batch_size=4, max_position_embeddings=2048)
    settings = ServeSettings(stall_timeout_s=1.0, max_logprobs=200)
    much = {
        **LONG,
        "prompt": "x",
        "max_tokens": 2000,
        "n": 3,
        "temperature": 1.0,
        "logprobs": 200,
        "stream": True,
    }
    with serving({"tiny": engine}, settings) as running:
        connection = raw_request(running.port, much, receive_bytes=4096)
        until(lambda: running.service.works)
        work = next(iter(running.service.works))
        for _ in range(3):
            started = time.monotonic()
            reply = running.openai().completions.create(
                model="tiny", prompt="hello", max_tokens=2, temperature=0
            )
            assert reply.choices[0].text
            assert time.monotonic() - started < 5.0
        until(lambda: is_idle(running))
        assert work.num_new_tokens < 6000  # it was given up before its end
        until(lambda: not running.server.server_state.connections)  # and its connection is ended
        assert b"[DONE]" not in rest_of(connection)


def test_where_the_system_does_not_end_such_connections(byte_tokenizer):
    """The app breaks off by itself, without an end that could be taken for the answer's."""
    app = create_app({"tiny": make_engine(byte_tokenizer)}, ServeSettings(stall_timeout_s=0.2))
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "asgi": {"version": "3.0"},
        "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    sent = []

    async def main():
        messages = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": body})

        async def send(message):
            sent.append(message)
            if message.get("body"):
                await asyncio.Event().wait()

        async with app.router.lifespan_context(app):
            await asyncio.wait_for(app(scope, messages.get, send), WAIT_S)
            assert app.state.service.n_open == 0

    asyncio.run(main())
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[-1]["more_body"]


def rest_of(connection):
    """What still comes before the other end breaks off."""
    received = b""
    with connection, suppress(ConnectionError):
        while part := connection.recv(1 << 20):
            received += part
    return received


def test_a_client_that_reads_slowly_gets_everything(server):
    body = {
        "model": "tiny",
        "prompt": "x",
        "max_tokens": 40,
        "temperature": 0,
        "logprobs": 20,
        "stream": True,
        "stop_token_ids": [],
    }
    connection = raw_request(server.port, body, receive_bytes=4096)
    received = b""
    while not received.endswith(b"0\r\n\r\n"):
        time.sleep(0.01)
        received += connection.recv(2048)
    connection.close()
    content = unchunked(received.partition(b"\r\n\r\n")[2]).decode()
    assert content.endswith("data: [DONE]\n\n")
    chunks = [json.loads(line[6:]) for line in content.splitlines() if line.startswith("data: {")]
    reported = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"]]
    assert sum(len(logprobs["tokens"]) for logprobs in reported if logprobs) == 40


def unchunked(content):
    """What was sent in HTTP's chunks."""
    found = b""
    while content:
        size, _, content = content.partition(b"\r\n")
        found, content = found + content[: int(size, 16)], content[int(size, 16) + 2 :]
    return found


def events(reply):
    """The data of a stream's events."""
    return [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]


def test_time_is_up(byte_tokenizer):
    """504 for one that was being answered, 503 for one that waited; a stream that has begun says it in an event."""
    engine = make_engine(byte_tokenizer, pause_s=PAUSE_S, batch_size=2)
    with serving({"tiny": engine}, ServeSettings(timeout_s=0.7)) as running, ThreadPoolExecutor() as pool:

        def ask(**options):
            with running.http() as http:
                return http.post("/v1/completions", json={**LONG, "prompt": "x"} | options)

        first = ask()
        assert first.status_code == 504
        assert "took longer than 0.7 s" in first.json()["error"]["message"]
        until(lambda: is_idle(running))
        both = {"n": 2, "sampling": Sampling(temperature=1.0)}
        in_the_way = engine.submit(Request(prompt="x", max_new_tokens=200, stop_token_ids=(), **both))
        for future in [pool.submit(ask, stream=stream) for stream in (False, True)]:
            reply = future.result()
            assert reply.status_code == 503
            assert reply.json()["error"]["code"] == "timeout"
            assert int(reply.headers["retry-after"]) >= 1
        in_the_way.cancel()
        until(lambda: is_idle(running))
        assert ask(num_beams=2).status_code == 504  # though nothing has come of it
        *begun, last = events(ask(stream=True))
        assert len(begun) > 3
        assert json.loads(last)["error"]["code"] == "timeout"
        with pytest.raises(openai.APIError, match="took longer"):
            list(running.openai().completions.create(model="tiny", prompt="x", max_tokens=200, stream=True,
                                                     extra_body={"stop_token_ids": []}))  # fmt: skip


def test_what_fails_in_the_engine(byte_tokenizer, monkeypatch):
    """Ours: 500 without a word of the inside. Theirs, a pattern that leaves nothing to say: 400."""
    engine = make_engine(byte_tokenizer)
    with serving({"tiny": engine}) as running, running.http() as http:
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 3}
        step = engine.loop.backend.step

        def broken(*arguments):
            time.sleep(0.1)
            raise RuntimeError("secret inside")

        engine.loop.backend.step = broken
        reply = http.post("/v1/completions", json=body)
        assert reply.status_code == 500
        assert reply.json()["error"]["type"] == "server_error"
        assert reply.headers["x-request-id"] in reply.json()["error"]["message"]
        streamed = http.post("/v1/completions", json=body | {"stream": True})
        assert streamed.status_code == 200  # the first token was there
        assert json.loads(events(streamed)[-1])["error"]["type"] == "server_error"
        assert "secret" not in reply.text + streamed.text
        engine.loop.backend.step = step
        monkeypatch.setattr(engine, "regex", lambda pattern: Forbidding())
        reply = http.post("/v1/completions", json=body | {"regex": "x"})
        assert reply.status_code == 400
        assert "no token can be chosen" in reply.json()["error"]["message"]
        assert http.post("/v1/completions", json=body).status_code == 200
        assert http.get("/health").status_code == 200
        # An engine whose thread has ended can only be started anew.
        engine.close()
        assert http.get("/health").status_code == http.get("/ready").status_code == 503


class Forbidding:
    """A constraint that allows nothing."""

    def apply(self, logits_V):
        return logits_V - float("inf")

    def advance(self, token_id):
        raise AssertionError

    def fork(self):
        return self


def test_the_event_loop_turns_while_long_texts_are_tokenised(byte_tokenizer, monkeypatch):
    """And while a schema is compiled, of which there is one at a time."""
    engine = make_engine(byte_tokenizer)
    n_compiling, most_compiling = 0, 0

    def slow_regex(pattern):
        nonlocal n_compiling, most_compiling
        n_compiling += 1
        most_compiling = max(most_compiling, n_compiling)
        time.sleep(0.2)
        n_compiling -= 1
        raise ValueError("refused after a while")

    monkeypatch.setattr(engine, "regex", slow_regex)
    with serving({"tiny": engine}) as running, ThreadPoolExecutor() as pool, running.http() as http:

        def ask(i):
            with running.http() as other:
                long = {"prompt": "word " * 300_000} if i % 2 else {"prompt": "x", "regex": "x"}
                return other.post("/v1/completions", json={"model": "tiny", **long})

        replies = [pool.submit(ask, i) for i in range(6)]
        slowest = 0.0
        while not all(reply.done() for reply in replies):
            started = time.monotonic()
            assert http.get("/health").status_code == 200
            slowest = max(slowest, time.monotonic() - started)
        assert [reply.result().status_code for reply in replies] == [400] * 6
        assert "has about 1500000 tokens, at most 256 are read" in replies[1].result().text
        assert most_compiling == 1
        assert slowest < 1.0
