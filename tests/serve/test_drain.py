"""`twofold serve` as a process: what it says, how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest

import twofold
from tests.serve.running import WAIT_S, make_engine, make_text_model, serving, until
from twofold.serve import ServeSettings


@pytest.fixture(scope="module")
def folder(byte_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "pair"
    twofold.save(make_text_model(byte_tokenizer, max_position_embeddings=2048), path)
    return path


class Process:
    """A server, and what it writes."""

    def __init__(self, *arguments, **environment):
        code = "from twofold.cli import main; main()"
        self.popen = subprocess.Popen(
            [sys.executable, "-c", code, "serve", *map(str, arguments), "--backend", "torch", "--port", "0"],
            stderr=subprocess.PIPE, text=True, env=os.environ | environment,
        )  # fmt: skip
        self.lines = []
        threading.Thread(target=lambda: self.lines.extend(self.popen.stderr), daemon=True).start()

    @property
    def url(self):
        def is_up_or_over():
            return self.popen.poll() is not None or "serving on" in "".join(self.lines)

        until(is_up_or_over, 120)  # a machine with much to do takes long to import PyTorch
        assert self.popen.poll() is None, self.lines
        line = next(line for line in self.lines if "serving on" in line)
        return line.split("serving on ")[1].split(";")[0]

    def wait(self):
        return self.popen.wait(WAIT_S)


@contextmanager
def process(*arguments, **environment):
    found = Process(*arguments, **environment)
    try:
        yield found
    finally:
        found.popen.kill()
        found.popen.wait()


LONG = {"model": "one", "max_tokens": 600, "temperature": 0, "extra_body": {"stop_token_ids": []}}
KEY = "a-key-of-some-length"


def test_sigterm_lets_what_runs_finish_and_takes_nothing_new(folder, tmp_path):
    """And names, a key file and Vertex AI's variables are followed."""
    keys = tmp_path / "keys.txt"
    keys.write_text(f"{KEY}\n")
    arguments = [folder, folder, "--name", "one", "--name", "two", "--api-key-file", keys]
    with process(*arguments, AIP_PREDICT_ROUTE="/p", AIP_HEALTH_ROUTE="/h") as server:
        assert server.url.startswith("http://127.0.0.1:")
        http = httpx.Client(base_url=server.url)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
        assert [model.id for model in client.models.list()] == ["one", "two"]
        assert http.get("/h").status_code == http.get("/ready").status_code == 200
        assert http.post("/p", json={"instances": ["x"]}).status_code == 401
        with (
            ThreadPoolExecutor() as pool,
            client.completions.create(prompt="you", stream=True, **LONG) as stream,
        ):
            whole = pool.submit(client.completions.create, prompt="hello", **LONG)
            chunks = [next(iter(stream))]
            figures = {"url": "/metrics", "headers": {"Authorization": f"Bearer {KEY}"}}
            until(lambda: 'twofold_open_answers{model="one"} 2.0' in http.get(**figures).text)
            server.popen.send_signal(signal.SIGTERM)
            until(lambda: http.get("/ready").status_code == 503)
            time.sleep(0.5)  # a while later it is still there, for new connections too
            assert httpx.get(f"{server.url}/ready").status_code == 503
            assert http.get("/ready").json() == {"status": "draining"}
            assert http.get("/health").status_code == 200
            with pytest.raises(openai.InternalServerError, match="shuts down") as caught:
                client.completions.create(model="one", prompt="x")
            assert caught.value.status_code == 503
            assert caught.value.response.headers["retry-after"] == "1"
            chunks += stream
            assert whole.result().usage.completion_tokens == 600
        assert chunks[-1].choices[0].finish_reason == "length"
        assert server.wait() == 0
        records = [json.loads(line) for line in server.lines if line.startswith("{")]
        statuses = [record["status"] for record in records if record.get("route") == "/v1/completions"]
        assert sorted(statuses) == [200, 200, 503]
        assert KEY not in "".join(server.lines)


@pytest.mark.parametrize("n_signals", [1, 2])
def test_what_does_not_end_in_time_is_given_up(byte_tokenizer, n_signals):
    """At the end of the time for draining, or at a second signal."""
    engine = make_engine(byte_tokenizer, pause_s=0.02)
    with serving({"one": engine}, ServeSettings(drain_s=0.3 if n_signals == 1 else 60.0)) as running:
        stream = running.openai().completions.create(prompt="you", stream=True, **LONG | {"max_tokens": 200})
        next(iter(stream))
        started = time.monotonic()
        for _ in range(n_signals):
            running.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.APIError, match="shuts down"):
            list(stream)
        until(lambda: not engine.is_working)
        assert time.monotonic() - started < 3.0


def test_what_is_computed_beside_the_engine_is_given_up_too(byte_tokenizer, monkeypatch):
    engine = make_engine(byte_tokenizer)
    embed, n_calls = engine.embed, 0

    def slow(texts):
        nonlocal n_calls
        n_calls += 1
        time.sleep(0.3)
        return embed(texts)

    monkeypatch.setattr(engine, "embed", slow)
    with serving({"one": engine}, ServeSettings(drain_s=0.0)) as running, ThreadPoolExecutor() as pool:
        client = running.openai()
        texts = pool.submit(client.embeddings.create, model="one", input=["text"] * 100)
        until(lambda: n_calls)
        running.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.InternalServerError, match="shuts down"):
            texts.result()
        assert n_calls < 5


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--name", "a", "--name", "b"], {}, "got 2 names for 1 models"),
        (["{folder}"], {}, "models need different names, got pair, pair"),
        (["--max-waiting", "0"], {}, "TWOFOLD_SERVE_MAX_WAITING (or its flag)"),
        ([], {"TWOFOLD_SERVE_NONSENSE": "1"}, "TWOFOLD_SERVE_NONSENSE"),
        ([], {"TWOFOLD_API_KEYS": "short"}, "TWOFOLD_API_KEYS: key 1 is no API key"),
        (["--port", "{taken}"], {}, "cannot listen on 127.0.0.1 port"),
        (["--log-level", "loud"], {}, "unknown log level"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(
    folder, capsys, monkeypatch, arguments, environment, message
):
    from twofold.cli import main

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("twofold.cli.serve.load", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        filled = [a.format(folder=folder, taken=taken.getsockname()[1]) for a in arguments]
        monkeypatch.setattr(sys, "argv", ["twofold", "serve", str(folder), *filled])
        with pytest.raises(SystemExit) as exit:
            main()
    assert exit.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_public_are_warned_of(folder, capsys, monkeypatch):
    from twofold.cli import main

    monkeypatch.setattr("twofold.cli.serve.load", lambda *_, **__: 1 / 0)
    for arguments, is_warned in ((["--host", "0.0.0.0"], True), (["--host", "127.0.0.1"], False)):
        monkeypatch.setattr(sys, "argv", ["twofold", "serve", str(folder), "--port", "0", *arguments])
        with pytest.raises(ZeroDivisionError):
            main()
        assert ("no API keys" in capsys.readouterr().err) == is_warned
