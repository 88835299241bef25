"""OpenAI's own client, unchanged, gets what the engine says."""

import asyncio
import base64
import json
import math
import re
from itertools import pairwise

import numpy as np
import openai
import pytest

from tests.serve.running import until
from twofold.infer import Request, Sampling

GREEDY = {"model": "tiny", "temperature": 0}
CHAT = [{"role": "user", "content": "hello"}]


def answers(server, prompts, **options):
    """The engine's own, beside the server."""
    found = []
    for i, prompt in enumerate(prompts):
        sampling = Sampling(temperature=options.get("temperature", 0.0), seed=options.get("seed", 0) + 2 * i)
        request = Request(
            prompt=prompt, max_new_tokens=options["n_tokens"], sampling=sampling, n=options.get("n", 1)
        )
        found += server.engine.submit(request).result()
    return found


def ids_of(server, text):
    return server.engine.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_greedy_text_is_the_engines(server, client):
    prompts = ["hello", "a longer text, of which more is to be read"]
    expected = [answer.text for answer in answers(server, prompts, n_tokens=20)]
    for given in (prompts, [ids_of(server, prompt) for prompt in prompts]):
        reply = client.completions.create(prompt=given, max_tokens=20, **GREEDY)
        assert [choice.text for choice in reply.choices] == expected
        assert [choice.index for choice in reply.choices] == [0, 1]
    assert reply.model == "tiny"
    assert reply.usage.prompt_tokens == sum(map(len, prompts))
    assert reply.usage.completion_tokens == sum(
        len(a.token_ids) for a in answers(server, prompts, n_tokens=20)
    )
    for given in (prompts[0], ids_of(server, prompts[0])):
        assert client.completions.create(prompt=given, max_tokens=20, **GREEDY).choices[0].text == expected[0]
    assert len(client.completions.create(prompt="hello", **GREEDY, extra_body={"return_token_ids": True})
               .choices[0].token_ids) <= 16  # fmt: skip


def test_samples_draw_with_their_seed(server, client):
    prompts = ["hello", "you"]
    reply = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=9, n=2, seed=5, extra_body={"return_token_ids": True}
    )
    expected = answers(server, prompts, n_tokens=9, n=2, seed=5, temperature=1.0)
    assert [tuple(choice.token_ids) for choice in reply.choices] == [a.token_ids for a in expected]
    assert len({choice.text for choice in reply.choices}) == 4
    unseeded = {
        client.completions.create(model="tiny", prompt="hello", max_tokens=9).choices[0].text
        for _ in range(4)
    }
    assert len(unseeded) > 1


def test_chat_is_answered_by_its_template(server, client):
    expected = answers(server, [[{"role": "system", "content": "short"}, *CHAT]], n_tokens=12)[0]
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    for role, content in (("system", "hello"), ("developer", parts)):
        messages = [{"role": role, "content": "short"}, {"role": "user", "content": content}]
        reply = client.chat.completions.create(messages=messages, max_completion_tokens=12, **GREEDY)
        assert reply.choices[0].message.content == expected.text
        assert reply.choices[0].message.role == "assistant"
        assert reply.choices[0].finish_reason == expected.finish_reason
    again = [*messages, reply.choices[0].message.model_dump(), *CHAT]  # as clients go on with a conversation
    assert client.chat.completions.create(messages=again, max_tokens=1, **GREEDY).choices[0].message.content


def test_a_stream_is_the_whole_in_pieces(client):
    options = {"model": "tiny", "seed": 3, "n": 2, "extra_body": {"return_token_ids": True}}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    prompts = ["hello", "you"]
    whole = client.completions.create(prompt=prompts, max_tokens=14, logprobs=2, **options)
    chunks = list(client.completions.create(prompt=prompts, max_tokens=14, logprobs=2, **options, **streamed))
    assert len(chunks) > 8
    for choice in whole.choices:
        pieces = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert [t for piece in pieces for t in piece.token_ids] == choice.token_ids
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish_reason == choice.finish_reason
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [x for piece in pieces if piece.logprobs for x in getattr(piece.logprobs, name)]
            expected = getattr(choice.logprobs, name)
            if name == "top_logprobs":
                assert [set(x) for x in joined] == [set(x) for x in expected]
            else:
                assert joined == (expected if name == "tokens" else pytest.approx(expected, rel=1e-4)), name
    assert chunks[-1].usage == whole.usage
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_a_chat_stream_is_the_whole_in_pieces(client):
    options = {"model": "tiny", "seed": 3, "n": 2, "messages": CHAT, "max_completion_tokens": 14}
    options |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True))
    for choice in whole.choices:
        pieces = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert pieces[0].delta.role == "assistant"
        assert "".join(piece.delta.content or "" for piece in pieces) == choice.message.content
        assert pieces[-1].finish_reason == choice.finish_reason
        joined = [entry for piece in pieces if piece.logprobs for entry in piece.logprobs.content]
        assert [e.token for e in joined] == [e.token for e in choice.logprobs.content]
        assert [e.logprob for e in joined] == pytest.approx(
            [e.logprob for e in choice.logprobs.content], rel=1e-4
        )
        # Of the bytes of whole characters the text is made.
        raw = b"".join(bytes(entry.bytes) for entry in joined)
        assert raw.decode(errors="replace") == choice.message.content
        assert all(len(entry.top_logprobs) == 2 for entry in joined)
    assert len({chunk.id for chunk in chunks}) == 1


def test_logprobs_are_the_engines(server, client):
    reply = client.completions.create(prompt="hello", max_tokens=12, logprobs=3, **GREEDY)
    expected = server.engine.submit(Request(prompt="hello", max_new_tokens=12, logprobs=3)).result()[0]
    found = reply.choices[0].logprobs
    assert len(found.tokens) == len(expected.token_ids)
    assert found.token_logprobs == pytest.approx([x.logprob for x in expected.logprobs], rel=1e-5)
    for token_id, token, offset, top in zip(
        expected.token_ids, found.tokens, found.text_offset, found.top_logprobs, strict=True
    ):
        character = server.engine.tokenizer.decode([token_id])
        if character == "\ufffd":
            assert re.fullmatch(r"bytes:\\x[89a-f][0-9a-f]", token)
        else:
            assert token == character
            assert token == reply.choices[0].text[offset]
        assert token in top  # greedy: the chosen one is among the most likely
        assert list(top.values()) == sorted(top.values(), reverse=True)
    assert all(a <= b for a, b in pairwise(found.text_offset))


def test_the_text_ends_before_a_stop_string_and_so_do_its_logprobs(client):
    options = {"prompt": "hello", "max_tokens": 30, "logprobs": 0, **GREEDY}
    free = client.completions.create(**options).choices[0]
    at = next(i for i in free.logprobs.text_offset if i > 3 and free.text[i : i + 2].isascii())
    stop = free.text[at : at + 2]
    at = free.text.index(stop)
    stopped = client.completions.create(stop=["never there", stop], **options).choices[0]
    assert (stopped.text, stopped.finish_reason) == (free.text[:at], "stop")
    kept = [token for token, offset in zip(free.logprobs.tokens, free.logprobs.text_offset, strict=True)
            if offset < at]  # fmt: skip
    assert stopped.logprobs.tokens == kept
    chunks = client.completions.create(stop=stop, stream=True, **options)
    pieces = [chunk.choices[0] for chunk in chunks]
    assert "".join(piece.text for piece in pieces) == free.text[:at]
    assert [t for piece in pieces if piece.logprobs for t in piece.logprobs.tokens] == kept


def test_answers_follow_schemas_and_patterns(client):
    pytest.importorskip("xgrammar", reason='needs the extra "grammar"')
    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3}
    options = {"model": "tiny", "messages": CHAT, "max_completion_tokens": 40}
    wanted = {"type": "json_schema", "json_schema": {"name": "letters", "schema": schema, "strict": True}}
    for seed in range(3):
        reply = client.chat.completions.create(response_format=wanted, seed=seed, **options)
        assert set(json.loads(reply.choices[0].message.content)) <= {"a", "b"}
    reply = client.chat.completions.create(response_format={"type": "json_object"}, seed=1, **options)
    assert reply.choices[0].message.content.startswith("{")
    reply = client.completions.create(
        model="tiny", prompt="hello", max_tokens=20, extra_body={"regex": "(yes|no)!"}
    )
    assert reply.choices[0].text in ("yes!", "no!")


def test_what_is_ours_beside_openais_fields(server, client):
    beams = {"num_beams": 3, "length_penalty": 0.5, "return_token_ids": True}
    reply = client.completions.create(model="tiny", prompt="hello", max_tokens=6, n=2, extra_body=beams)
    request = Request(prompt="hello", max_new_tokens=6, num_beams=3, n=2, length_penalty=0.5)
    assert [tuple(c.token_ids) for c in reply.choices] == [
        a.token_ids for a in server.engine.submit(request).result()
    ]
    base = {"temperature": 1.3, "seed": 2}
    plain = server.engine.generate(["hello"], max_new_tokens=25, stop_token_ids=(), **base)[0]
    for name, value in (("top_k", 3), ("min_p", 0.5), ("repetition_penalty", 3.0), ("top_p", 0.3),
                        ("presence_penalty", -2.0), ("frequency_penalty", -2.0)):  # fmt: skip
        expected = server.engine.generate(
            ["hello"], max_new_tokens=25, stop_token_ids=(), **base, **{name: value}
        )[0]
        assert expected.token_ids != plain.token_ids, name  # else it would tell nothing
        more = {name: value, "stop_token_ids": [], "return_token_ids": True, "lookup": 4}
        reply = client.completions.create(
            model="tiny", prompt="hello", max_tokens=25, **base, extra_body=more
        )
        assert tuple(reply.choices[0].token_ids) == expected.token_ids, name
    longer = {"num_beams": 3, "length_penalty": -3.0, "early_stopping": "never", "return_token_ids": True}
    reply = client.completions.create(model="tiny", prompt="hello", max_tokens=20, extra_body=longer)
    request = Request(
        prompt="hello", max_new_tokens=20, num_beams=3, length_penalty=-3.0, early_stopping="never"
    )
    assert tuple(reply.choices[0].token_ids) == server.engine.submit(request).result()[0].token_ids


def test_embeddings_are_the_encoders(server, client):
    texts = ["hello", "a longer text", *(f"text {i}" for i in range(9))]
    expected = server.engine.embed(texts).numpy()
    for encoding in ("float", "base64", None):  # the client asks for base64 itself where nothing is said
        options = {} if encoding is None else {"encoding_format": encoding}
        reply = client.embeddings.create(model="tiny", input=texts, **options)
        vectors = [
            np.frombuffer(base64.b64decode(d.embedding), "<f4")
            if encoding == "base64" else d.embedding for d in reply.data
        ]  # fmt: skip
        np.testing.assert_allclose(np.asarray(vectors), expected, atol=1e-5)
        assert [d.index for d in reply.data] == list(range(len(texts)))
    assert reply.usage.prompt_tokens == sum(map(len, texts))


def test_models_are_chosen_by_name(server, client):
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("other").max_model_len == 256
    found = {}
    for name in ("tiny", "other"):
        reply = client.completions.create(model=name, prompt="hello", max_tokens=8, temperature=0)
        engine = server.service.models[name].engine
        assert reply.choices[0].text == engine.generate(["hello"], max_new_tokens=8)[0].text
        found[name] = reply.choices[0].text
    assert found["tiny"] != found["other"]
    with pytest.raises(openai.NotFoundError, match="there is 'tiny', 'other'") as caught:
        client.models.retrieve("third")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"max_tokens": 300}, "max_tokens", "has 5 tokens and 300 are asked for.* positions for 251 more"),
        ({"prompt": "x" * 300}, "prompt", "has 299 tokens.* are 256|300"),
        ({"prompt": ""}, None, "the source is empty"),
        ({"prompt": []}, "prompt", "must be a text or token ids or a list"),
        ({"prompt": [[1], [2, "x"]]}, "prompt", "must be a text or token ids or a list"),
        ({"prompt": [999]}, None, "vocabulary is 0 to 257"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"n": 2, "temperature": 0}, None, "greedy answers would all be equal"),
        ({"n": 9}, None, "at most 4"),
        ({"n": 500}, None, "at most 128 at a time"),
        ({"suffix": "x"}, "suffix", "does not fill in"),
        ({"echo": True}, "echo", "no part of the answer"),
        ({"logprobs": 21}, None, "at most 20"),
        ({"stop": ["x"] * 17}, "stop", "16"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"extra_body": {"nonsense": 1}}, "nonsense", "allowed are .*temperature"),
        ({"extra_body": {"regex": "(("}}, None, "not a regular expression"),
        ({"extra_body": {"num_beams": 2}, "temperature": 1}, None, "beam search"),
        ({"extra_body": {"lookup": 4, "n": 2}}, None, "lookup=4"),
    ],
)
def test_wrong_requests_say_what_is_allowed(client, given, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "hello"} | given)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'system', 'developer'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages.0.content.0.image_url", "no such parameter"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "go together"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
         None, "'not'"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "prompt", "positions"),
    ],
)  # fmt: skip
def test_wrong_chats_say_what_is_allowed(client, given, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": CHAT} | given)
    assert caught.value.param == param


def test_harmless_and_neutral_fields_change_nothing(client):
    expected = client.completions.create(prompt="hello", max_tokens=5, **GREEDY).choices[0].text
    reply = client.completions.create(
        prompt="hello", max_tokens=5, **GREEDY, user="someone", echo=False, best_of=1, suffix=None,
        logit_bias={}, extra_body={"metadata": {"a": "b"}, "store": False},
    )  # fmt: skip
    assert reply.choices[0].text == expected


def test_many_clients_at_once(server):
    """More than the engine's batch: each gets its own answer, and the event loop goes on turning."""
    prompts = [f"prompt {'x' * i}" for i in range(24)]
    expected = [answer.text for answer in server.engine.generate(prompts, max_new_tokens=10)]

    async def ask(client, prompt, streams):
        options = {"model": "tiny", "prompt": prompt, "max_tokens": 10, "temperature": 0}
        if not streams:
            return (await client.completions.create(**options)).choices[0].text
        stream = await client.completions.create(**options, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def main():
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60
        ) as client:
            return await asyncio.gather(*(ask(client, p, i % 2) for i, p in enumerate(prompts)))

    assert asyncio.run(main()) == expected
    until(lambda: not server.service.works)
    assert server.service.models["tiny"].gate.n_open == 0
    assert math.isfinite(server.service.models["tiny"].gate.retry_after_s)
