"""Requests that nobody meant: made from the OpenAPI document, and at random. Nothing may fail inside."""

import json
import random
import socket
from contextlib import suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from tests.serve.running import make_engine, serving, until
from twofold.serve import ServeSettings
from twofold.serve.playground import add_playground

FEW = settings(
    max_examples=10, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip

SAYS_MORE_THAN_THE_DOCUMENT = [positive_data_acceptance, negative_data_rejection]
"""A text may be too long, and settings contradict each other; null and false may stand for fields without support."""


@pytest.fixture(scope="module")
def fuzzed(byte_tokenizer):
    """Bounded, so that no example takes long."""
    settings = ServeSettings(
        max_new_tokens=8, default_new_tokens=4, predict_route="/predict", stall_timeout_s=1.0
    )
    with serving({"tiny": make_engine(byte_tokenizer)}, settings, extensions=(add_playground,)) as running:
        yield running


def checking(statuses):
    """A property that notes the statuses of its answers."""

    def check(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"  # made-up names would all end in 404
        response = case.call()
        assert response.status_code < 500, case.as_curl_command()
        case.validate_response(response, excluded_checks=SAYS_MORE_THAN_THE_DOCUMENT)
        statuses.append(response.status_code)

    return check


def test_requests_made_from_the_document(fuzzed):
    """Right ones and wrong ones: every answer is one that the document knows, and none a failure of the server."""
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    statuses = {mode: [] for mode in GenerationMode}
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in GenerationMode:
            if mode is GenerationMode.NEGATIVE and not operation.body:
                continue

            FEW(given(operation.as_strategy(mode))(checking(statuses[mode])))()
    positive, negative = statuses[GenerationMode.POSITIVE], statuses[GenerationMode.NEGATIVE]
    assert positive.count(200) > 20
    assert negative.count(400) > 40
    until(lambda: not fuzzed.service.n_open)


VALUES = [
    None, True, False, 0, 1, 2, 7, -1, 0.0, 0.5, 1e-30, 1e308, 2**31, 2**63, -(2**63), "", "a", "text", "\x00",
    "ä€\U0001f600", [], {}, ["a"], ["", "a"], [1, 2], [257], [[1], [2]], {"include_usage": True},
    {"type": "json_object"}, [{"role": "user", "content": "x"}], "(a|b)+", "x" * 3000,
    {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "string", "maxLength": 3}}},
]  # fmt: skip


def random_body(rng, fields):
    """Mostly right, so that much of it gets far."""
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 6}
    for name in rng.sample(fields, rng.randrange(4)):
        body[name] = rng.choice(VALUES)
    return body


def n_prompts(prompt):
    return len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1


def test_streams_of_anything(fuzzed):
    """Each ends in [DONE], or in an error said as one, whatever was asked."""
    rng = random.Random(0)
    n_streams = 0
    with fuzzed.http() as http:
        schemas = http.get("/openapi.json").json()["components"]["schemas"]
        for route, name in (("completions", "CompletionRequest"), ("chat/completions", "ChatRequest")):
            fields = list(schemas[name]["properties"])
            for _ in range(150):
                body = {k: v for k, v in random_body(rng, fields).items() if k in fields}
                reply = http.post(f"/v1/{route}", json=body)
                assert reply.status_code in (200, 400, 404), (body, reply.text)
                if not reply.headers["content-type"].startswith("text/event-stream"):
                    assert reply.status_code == 200 or reply.json()["error"]["message"]
                    continue
                n_streams += 1
                *events, last, end = reply.text.split("\n\n")
                assert (last, end) == ("data: [DONE]", ""), body
                chunks = [json.loads(event.removeprefix("data: ")) for event in events]
                reasons = [
                    c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]
                ]
                assert len(reasons) == (body.get("n") or 1) * n_prompts(body.get("prompt")), body
    assert n_streams > 80
    until(lambda: not fuzzed.service.n_open)


def test_connections_of_anything(fuzzed):
    """Garbage, halves, lies about lengths, and ends in the middle of everything."""
    rng = random.Random(1)
    body = json.dumps({"prompt": "x", "stream": True, "max_tokens": 8}).encode()
    whole = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (len(body), body)
    )
    for _ in range(80):
        sent = bytearray(whole * rng.choice([1, 1, 2]))
        for _ in range(rng.randrange(3)):
            at = rng.randrange(len(sent))
            sent[at : at + rng.randrange(4)] = rng.randbytes(rng.randrange(4))
        del sent[rng.choice([len(sent), rng.randrange(len(sent))]) :]
        received = b""
        connection = socket.create_connection(("127.0.0.1", fuzzed.port), timeout=5)
        with connection, suppress(ConnectionError, TimeoutError):
            connection.sendall(sent)
            connection.settimeout(rng.choice([0.001, 0.05]))
            while part := connection.recv(65536):
                received += part
        assert b"HTTP/1.1 5" not in received
    until(lambda: not fuzzed.service.n_open)
    with fuzzed.http() as http:
        assert http.get("/health").status_code == 200
        assert (
            http.post(
                "/v1/completions", content=body, headers={"Content-Type": "application/json"}
            ).status_code
            == 200
        )
