"""The route gives the engine's numbers, and the page comes with the headers that keep it to itself."""

import asyncio
import base64
import re

import httpx
import numpy as np
import pytest

from tests.models.tiny import assert_same
from twofold.serve import ServeSettings, create_app
from twofold.serve.auth import hash_key
from twofold.serve.playground import add_playground

MESSAGES = [{"role": "user", "content": "summarise the text .\n\nthe bridge was closed for nine weeks"}]
ASKED = {"model": "lossless", "messages": MESSAGES, "answer": "ferries carried people"}
NAMES = ("weights", "sink", "own", "elsewhere")


@pytest.fixture(scope="module")
def ask(served):
    with httpx.Client(base_url=served.address) as client:
        yield lambda **changes: client.post("/playground/attribution", json=ASKED | changes)


def test_the_numbers_are_the_engines(ask, served):
    found = served.engines["lossless"].attribute(MESSAGES, ASKED["answer"], keep="layers", heads=[1])
    reply = ask(keep="layers", heads=[1]).json()
    assert (reply["num_layers"], reply["num_heads"], reply["shape"]) == (3, 4, list(found.weights.shape))
    assert reply["source"]["text"] == found.source_text
    assert [tuple(word) for word in reply["answer"]["words"]] == found.answer_words
    packed = ask(keep="layers", heads=[1], encoding_format="base64").json()
    for name in NAMES:
        expected = getattr(found, name)
        assert_same(expected.new_tensor(reply[name]), expected)
        assert np.array_equal(np.frombuffer(base64.b64decode(packed[name]), "<f4"), expected.numpy().ravel())


def test_token_ids_and_plain_prompts(ask, served):
    ids = served.engines["published"].tokenizer("ferries carried people")["input_ids"]
    reply = ask(
        model="published", messages=None, prompt="the bridge was closed", answer=None, answer_token_ids=ids
    )
    found = served.engines["published"].attribute("the bridge was closed", "ferries carried people")
    assert_same(found.weights.new_tensor(reply.json()["weights"]), found.weights)


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"model": "other"}, 404, "there is no model 'other'"),
        ({"prompt": "text"}, 400, "give prompt or messages: exactly one"),
        ({"answer": None}, 400, "give answer or answer_token_ids: exactly one"),
        ({"answer": ""}, 400, "a source and an answer, got"),
        ({"answer_token_ids": [9999], "answer": None}, 400, "token ids from 9999"),
        ({"layers": [3]}, 400, "layers must be different numbers from 0 to 2"),
        ({"heads": []}, 400, "heads"),
        ({"keep": "none"}, 400, "keep"),
        ({"answer": "the " * 300}, 400, "max_position_embeddings of 256"),
        ({"messages": [{"role": "user", "content": "the " * 300}]}, 400, "has 309 tokens|have|shorten"),
        ({"answer": "the " * 9000}, 400, "about 9"),
        ({"depth": 1}, 400, "there is no such parameter"),
    ],
)  # fmt: skip
def test_bad_requests(ask, changes, status, says):
    reply = ask(**changes)
    assert reply.status_code == status
    assert re.search(says, reply.json()["error"]["message"])


def test_replies_have_a_bound(ask, monkeypatch):
    monkeypatch.setattr("twofold.serve.playground.attribution._MOST_WEIGHTS", 100)
    assert ask().status_code == 200
    reply = ask(keep="all")
    assert reply.status_code == 400
    assert "12 maps of 3 answer tokens by 14 source tokens" in reply.json()["error"]["message"]
    assert ask(keep="all", layers=[0], heads=[2]).status_code == 200


def test_the_page_needs_no_key_and_all_else_does(engines):
    settings = ServeSettings(key_hashes=(hash_key("k" * 20),))
    app = create_app(engines, settings, extensions=(add_playground,))
    transport = httpx.ASGITransport(app)

    async def main():
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            page, script = await client.get("/"), await client.get("/playground/page/app.js")
            missing = await client.get("/playground/page/..%2f__init__.py")
            refused = await client.post("/playground/attribution", json=ASKED)
            document = (await client.get("/openapi.json")).json()
        return page, script, missing, refused, document

    page, script, missing, refused, document = asyncio.run(main())
    assert page.status_code == script.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert script.headers["content-type"].startswith("text/javascript")
    assert missing.status_code == 404
    assert refused.status_code == 401
    assert "/playground/attribution" in document["paths"]
    assert "/" not in document["paths"]
