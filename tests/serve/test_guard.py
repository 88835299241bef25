"""Keys, bodies, request ids, the log, figures."""

import asyncio
import io
import json
import logging
import re
import socket

import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from tests.serve.running import make_engine, serving, until
from twofold.serve import ServeSettings, create_app
from twofold.serve.auth import find_key, hash_key, read_keys
from twofold.serve.logs import JsonLines

KEYS = ("first-key-0123456789", "second-key-012345678")


@pytest.fixture(scope="module")
def guarded(byte_tokenizer):
    """With two keys, small bodies and little patience; and a route of an extension."""

    def extend(app, service):
        service.public_paths |= {"/hello", "/static/*"}
        for path in ("/hello", "/static/deep/file", "/hidden"):
            app.get(path)(lambda: {"from": "extension"})

    settings = ServeSettings(
        key_hashes=tuple(map(hash_key, KEYS)), max_body_bytes=2000, stall_timeout_s=0.5, max_new_tokens=7,
        max_prompt_tokens=50, default_new_tokens=3,
    )  # fmt: skip
    with serving({"tiny": make_engine(byte_tokenizer)}, settings, extensions=[extend]) as running:
        yield running


@pytest.fixture
def log():
    """Lines of the server's log, as objects."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("twofold")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel("INFO")
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_only_who_has_a_key_is_answered(guarded):
    for key in KEYS:
        assert guarded.openai(api_key=key).models.list().data
    for key in ("none", KEYS[0][:-1], KEYS[0] + "x", ""):
        with pytest.raises((openai.AuthenticationError, openai.OpenAIError)):
            guarded.openai(api_key=key).models.list()
    with guarded.http() as http:
        reply = http.post(
            "/v1/completions", json={"prompt": "x"}, headers={"Authorization": f"Basic {KEYS[0]}"}
        )
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert [http.get(path).status_code for path in ("/hidden", "/metrics", "/nowhere")] == [401] * 3
        public = ("/health", "/ready", "/docs", "/openapi.json", "/hello", "/static/deep/file")
        assert [http.get(path).status_code for path in public] == [200] * 6
        assert http.get("/openapi.json").json()["security"] == [{"key": []}]


def test_the_same_holds_below_another_app(byte_tokenizer):
    settings = ServeSettings(key_hashes=(hash_key(KEYS[0]),))
    app = create_app({"tiny": make_engine(byte_tokenizer)}, settings)
    outer = Starlette(routes=[Mount("/below", app)])

    async def main():
        transport = httpx.ASGITransport(outer)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x") as http,
        ):
            assert (await http.get("/below/health")).status_code == 200
            assert (await http.get("/below/metrics")).status_code == 401
            keyed = {"headers": {"Authorization": f"Bearer {KEYS[0]}"}}
            body = {"prompt": "x", "max_tokens": 2}
            assert (await http.post("/below/v1/completions", json=body, **keyed)).json()["choices"]
            figures = (await http.get("/below/metrics", **keyed)).text
            assert 'twofold_requests_total{route="/v1/completions",status="200"} 1.0' in figures
            assert 'twofold_requests_total{route="/metrics",status="401"} 1.0' in figures

    asyncio.run(main())


def test_keys_are_read_as_they_are_or_as_their_hashes(tmp_path):
    text = f"# for the team\n{KEYS[0]}\n\nsha256:{hash_key(KEYS[1])}  # hashed\n"
    hashes = read_keys(text, "keys.txt")
    assert [find_key(f"Bearer {key}", hashes) for key in KEYS] == [0, 1]
    assert find_key(f"bearer  {KEYS[0]}", hashes) == 0
    assert [find_key(given, hashes) for given in (None, "", "Bearer", f"Bearer {hashes[0]}")] == [None] * 4
    for wrong, message in (("short", "at least 16"), ("# nothing\n", "has no API key"), ("sha256:abc", "16")):
        with pytest.raises(ValueError, match=message):
            read_keys(wrong, "keys.txt")


def test_settings_come_from_the_environment_and_flags_go_before():
    environment = {
        "TWOFOLD_SERVE_TIMEOUT_S": "5", "TWOFOLD_SERVE_MAX_WAITING": "9", "AIP_PREDICT_ROUTE": "/p",
        "TWOFOLD_API_KEYS": f"{KEYS[0]}, {KEYS[1]}", "OTHER": "x",
    }  # fmt: skip
    found = ServeSettings.from_environment(environment, max_waiting=3, drain_s=None)
    assert (found.timeout_s, found.max_waiting, found.drain_s, found.predict_route) == (5.0, 3, 30.0, "/p")
    assert found.key_hashes == tuple(map(hash_key, KEYS))
    for wrong, message in (
        ({"TWOFOLD_SERVE_TIMEOUT": "5"}, "TWOFOLD_SERVE_TIMEOUT .*not permitted; settings are .*timeout_s"),
        ({"TWOFOLD_SERVE_MAX_WAITING": "0"}, "MAX_WAITING.*greater than or equal to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ServeSettings.from_environment(wrong)


def test_bodies_are_bounded_in_size_and_time(guarded):
    headers = {"Authorization": f"Bearer {KEYS[0]}", "Content-Type": "application/json"}
    with guarded.http(headers=headers) as http:
        large = b"{" + b" " * 3000

        def pieces():
            for start in range(0, len(large), 100):
                yield large[start : start + 100]

        for content in (large, pieces()):  # of known length, and in chunks
            reply = http.post("/v1/completions", content=content)
            assert reply.status_code == 413
            assert "larger than 2,000 bytes" in reply.json()["error"]["message"]
        exact = json.dumps({"prompt": "x"}).encode()
        assert http.post("/v1/completions", content=exact.ljust(2000)).status_code == 200
    with socket.create_connection(("127.0.0.1", guarded.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[0]}\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert b"HTTP/1.1 408" in connection.recv(10_000)
    with socket.create_connection(("127.0.0.1", guarded.port)) as connection:
        connection.sendall(
            f"{head}Content-Length: 3000\r\n\r\n".encode()
        )  # known before anything of it comes
        assert b"HTTP/1.1 413" in connection.recv(10_000)


def test_token_limits_of_the_server(guarded):
    client = guarded.openai(api_key=KEYS[0])
    with pytest.raises(openai.BadRequestError, match="8 tokens are asked for, this server writes at most 7"):
        client.completions.create(model="tiny", prompt="x", max_tokens=8)
    for options in ({"prompt": "x" * 51}, {"prompt": [5] * 51}):
        with pytest.raises(
            openai.BadRequestError, match="has 51 tokens, this server's max_prompt_tokens are 50"
        ):
            client.completions.create(model="tiny", **options)
    with pytest.raises(openai.BadRequestError, match="has 51 tokens, this server's max_prompt_tokens are 50"):
        client.embeddings.create(model="tiny", input="x" * 51)
    options = {"model": "tiny", "extra_body": {"stop_token_ids": []}}
    assert client.completions.create(prompt="x", **options).usage.completion_tokens == 7
    chat = client.chat.completions.create(messages=[{"role": "user", "content": "x"}], **options)
    assert chat.usage.completion_tokens == 3


def test_every_answer_has_a_request_id(http):
    assert http.get("/v1/models", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = {
        http.get("/nowhere", headers={"X-Request-Id": "no id!"}).headers["x-request-id"] for _ in range(2)
    }
    assert len(made) == 2
    assert all(re.fullmatch("[0-9a-f]{24}", one) for one in made)


def test_the_log_says_what_happened_and_not_what_was_said(guarded, log):
    secret = "the secret words"
    client = guarded.openai(api_key=KEYS[1])
    client.completions.create(model="tiny", prompt=secret, max_tokens=5, extra_headers={"X-Request-Id": "abc"},
                              extra_body={"stop_token_ids": []})  # fmt: skip
    list(client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": secret}], stream=True,
                                        max_tokens=2, extra_body={"stop_token_ids": []}))  # fmt: skip
    for wrong in ({"prompt": [secret, 1]}, {"prompt": secret, secret: 1}, {"prompt": secret, "n": 99},
                  {"model": secret, "prompt": "x"}, {"prompt": "x", "regex": f"(({secret}"}):  # fmt: skip
        with pytest.raises(openai.APIError):
            client.completions.create(**{"model": "tiny", "prompt": "x"} | {"extra_body": wrong})
    engine = guarded.engine
    submit = engine.submit

    def failing(request):
        raise RuntimeError(f"about {secret}")

    engine.submit = failing
    try:
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="tiny", prompt=secret)
    finally:
        engine.submit = submit
    with guarded.http() as http:
        http.get(f"/v1/models?{secret}", headers={"Authorization": f"Bearer {secret}-0123456789"})
        http.get("/health")
    lines = log()
    written = json.dumps(lines)
    assert secret not in written
    assert not any(key in written for key in KEYS)
    first, second, *others = lines
    expected = {
        "level": "info", "event": "request", "request_id": "abc", "key": 1, "model": "tiny", "stream": False,
        "prompt_tokens": len(secret), "new_tokens": 5, "method": "POST", "route": "/v1/completions", "status": 200,
    }  # fmt: skip
    assert expected.items() <= first.items()
    assert 0 < first["first_token_s"] <= first["seconds"]
    assert second["route"] == "/v1/chat/completions"
    assert (second["stream"], second["new_tokens"]) == (True, 2)
    statuses = [line["status"] for line in others if line["event"] == "request"]
    assert statuses == [400, 400, 400, 404, 400, 500, 401]  # and not the probe
    error = next(line for line in others if line["level"] == "error")
    assert error["error"][0]["type"] == "RuntimeError"
    assert any("failing" in place for place in error["error"][0]["at"])


def sample(text, name):
    """The value of one line of Prometheus' text."""
    return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(name + " ")))


def test_figures_count_right(byte_tokenizer):
    with serving({"tiny": make_engine(byte_tokenizer)}) as running, running.http() as http:
        body = {"prompt": "hello", "max_tokens": 6, "stop_token_ids": [], "temperature": 1}
        for more in ({}, {"n": 3}, {"stream": True}):
            assert http.post("/v1/completions", json=body | more).status_code == 200
        http.post("/v1/completions", json={})
        http.get("/made/up/by/a/client")
        until(lambda: 'status="404"' in http.get("/metrics").text)  # a request counts once it is over
        reply = http.get("/metrics")
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        expected = {
            'twofold_requests_total{route="/v1/completions",status="200"}': 3,
            'twofold_requests_total{route="/v1/completions",status="400"}': 1,
            'twofold_requests_total{route="other",status="404"}': 1,
            'twofold_request_seconds_count{route="/v1/completions"}': 4,
            'twofold_prompt_tokens_total{model="tiny"}': 15,
            'twofold_new_tokens_total{model="tiny"}': 30,
            'twofold_time_to_first_token_seconds_count{model="tiny"}': 3,
            'twofold_time_per_token_seconds_count{model="tiny"}': 3,
            'twofold_open_answers{model="tiny"}': 0,
            'twofold_requests_running{model="tiny"}': 0,
            'twofold_requests_waiting{model="tiny"}': 0,
            'twofold_cache_bytes{model="tiny"}': 0,
            "twofold_ready": 1,
        }
        assert {name: sample(reply.text, name) for name in expected} == expected
        assert "made" not in reply.text
