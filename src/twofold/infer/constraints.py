"""Answers that follow a JSON schema or a regular expression, through the package xgrammar.

Of the two libraries that were tried, xgrammar takes schemas that refer to themselves, several stop tokens and
vocabularies padded beyond the tokenizer, and compiles a schema for 49k tokens in milliseconds; outlines-core makes
one automaton of schema and vocabulary, so it can do neither recursion nor a second stop token. Both read their tokens
from a list of bytes, which is made here: special tokens, which leave no text behind, are never allowed.

xgrammar leaves out what it does not know of a schema, or warns on stderr. So what it is not known to follow is refused
here. A stop token is allowed as soon as the text is complete; an answer cut off by `max_new_tokens` is not.

Letters: V vocabulary, W words of 32 bits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from twofold.data.tokenize import encode

Schema = Mapping[str, Any] | str
"""As an object, or as its JSON."""

_ANNOTATIONS = frozenset(
    "$schema $id $comment title description default examples deprecated readOnly writeOnly format".split()
)
_DEFINITIONS = frozenset(("$defs", "definitions"))
_BY_TYPE = {
    "object": frozenset(("properties", "required", "additionalProperties")),
    "array": frozenset(("items", "prefixItems", "minItems", "maxItems")),
    "string": frozenset(("minLength", "maxLength", "pattern")),
    "integer": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    "number": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    "boolean": frozenset[str](),
    "null": frozenset[str](),
}
_WHOLE = ("$ref", "anyOf", "enum", "const")
"""Each says all of its schema, so that nothing else may stand beside it."""
_PYTHON_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
    "null": type(None),
}  # fmt: skip


_NO_CHARACTER = re.compile(
    rb"[\xc0\xc1\xf5-\xff]|\xe0[\x80-\x9f]|\xed[\xa0-\xbf]|\xf0[\x80-\x8f]|\xf4[\x90-\xbf]", re.DOTALL
)
"""Bytes that look like the beginning of a character and are none, such as halves of surrogate pairs."""
_LEADS = (0xE0, 0xED, 0xF0, 0xF4)
"""First bytes after which not every continuation makes a character."""
_NOT_IN_JSON = re.compile(r'"|\\\\|\\x(?:22|5c)|\\u00(?:22|5c)', re.IGNORECASE)
"""In a pattern: characters that JSON escapes, which xgrammar would write as they are."""


class Grammars:
    """Makes constraints for one tokenizer; a schema or pattern that comes again is not compiled again.

    Args:
        tokenizer: of transformers, whose text is that of its tokens one after another.
        vocab_size: V of the model's logits, which may be more than the tokenizer has.
        stop_token_ids: those with which requests end.

    Raises:
        ImportError: xgrammar is missing.
        ValueError: no stop tokens, or a tokenizer that puts something between tokens.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, stop_token_ids: Sequence[int]) -> None:
        xgrammar = _import_xgrammar()
        if not stop_token_ids:
            raise ValueError(
                "a constrained answer ends with a stop token, and there are none; name at least one"
            )
        tokens = [
            b"" if _NO_CHARACTER.search(token) else token for token in _token_bytes(tokenizer, vocab_size)
        ]
        self._utf8 = Utf8(tokens)
        # xgrammar allows most control characters within the strings of JSON, where they must be escaped. On one line
        # there is no other place for them.
        without_control = [b"" if any(byte < 32 for byte in token) else token for token in tokens]
        self._text, self._json = (
            xgrammar.GrammarCompiler(
                xgrammar.TokenizerInfo(
                    vocabulary,
                    xgrammar.VocabType.RAW,
                    vocab_size=vocab_size,
                    stop_token_ids=list(stop_token_ids),
                ),
                max_threads=1,
            )
            for vocabulary in (tokens, without_control)
        )

    def json_schema(self, schema: Schema) -> Grammar:
        """JSON that is valid against a schema, on one line as `json.dumps` writes it; properties come in the schema's
        order, and no others where it names some.

        Raises:
            ValueError: the schema is invalid, or says something that cannot be followed.
        """
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise ValueError(f"the schema is not JSON: {error}") from error
        self._check_schema(schema, "#")
        text = json.dumps(schema)
        return self._grammar(text, lambda: self._json.compile_json_schema(text, any_whitespace=False))

    def regex(self, pattern: str) -> Grammar:
        """Text that matches a pattern from its first to its last character.

        Args:
            pattern: as Python's `re` takes it, without lookaround, back references, flags, names of groups and word
                boundaries. A dot may be a newline; \\d and \\w are ASCII, \\s knows the spaces of Unicode.

        Raises:
            ValueError: the pattern is invalid, or has something that cannot be followed.
        """
        _check_pattern(pattern)
        return self._grammar(pattern, lambda: self._text.compile_regex(pattern))

    def _grammar(self, text: str, compile: Callable[[], Any]) -> Grammar:
        try:
            compiled = compile()
        except RuntimeError as error:
            # The library puts a time and a place in its source before the reason.
            reason = re.sub(r"^\[[\d:]+\] \S+: ", "", str(error).strip()) or "it cannot be compiled"
            raise ValueError(f"cannot follow {text[:200]!r}: {reason}") from error
        return Grammar(_import_xgrammar().GrammarMatcher(compiled), self._utf8)

    def _check_schema(self, schema: Any, where: str) -> None:
        """Refuse what would not be followed, in a schema and all schemas in it."""
        if schema is True:
            return
        if not isinstance(schema, Mapping):
            raise ValueError(f"{where} must be a schema, that is an object, got {str(schema)[:80]}")
        keys = set(schema) - _ANNOTATIONS - _DEFINITIONS
        for name in _DEFINITIONS & set(schema):
            for key, part in _members(schema[name], f"{where}/{name}"):
                self._check_schema(part, f"{where}/{name}/{key}")
        if whole := [name for name in _WHOLE if name in keys]:
            _refuse(keys - {whole[0], "type"}, where, f"beside {whole[0]!r}")
            self._check_whole(schema, whole[0], where)
            return
        kind = schema.get("type")
        kinds = kind if isinstance(kind, list) else [kind]
        if kind is not None and not (kinds and all(isinstance(k, str) and k in _BY_TYPE for k in kinds)):
            raise ValueError(f"{where}/type must be one of {', '.join(_BY_TYPE)}, got {kind!r}")
        allowed = _BY_TYPE[kind] if isinstance(kind, str) else frozenset[str]()
        _refuse(keys - {"type"} - allowed, where, f"with type {kind!r}")
        if kind == "object":
            self._check_object(schema, where)
        elif kind == "array":
            items = schema.get("items", True)
            if items is not False:
                self._check_schema(items, f"{where}/items")
            for i, part in enumerate(schema.get("prefixItems", ())):
                self._check_schema(part, f"{where}/prefixItems/{i}")
        elif "pattern" in schema:
            _refuse(keys & {"minLength", "maxLength"}, where, "beside 'pattern'")
            self._check_json_pattern(schema["pattern"], where)

    def _check_json_pattern(self, pattern: Any, where: str) -> None:
        self.regex(pattern)  # xgrammar warns of some things here that it refuses elsewhere
        if _NOT_IN_JSON.search(re.sub(r"\[\^(?:\\.|[^\]\\])*\]", "", pattern)):
            raise ValueError(
                f"{where}/pattern {pattern!r} asks for quotes or backslashes, which JSON writes in another way; leave "
                "them out"
            )

    def _check_whole(self, schema: Mapping[str, Any], name: str, where: str) -> None:
        value, kind = schema[name], schema.get("type")
        if name == "anyOf":
            _refuse({"type"} & set(schema), where, "beside 'anyOf'")
            for i, part in enumerate(value):
                self._check_schema(part, f"{where}/anyOf/{i}")
        elif kind is not None and name in ("enum", "const"):
            for member in value if name == "enum" else [value]:
                if not isinstance(member, _PYTHON_TYPES.get(kind, ())) or (
                    isinstance(member, bool) != (kind == "boolean")
                ):
                    raise ValueError(f"{where}/{name} has {member!r}, which is not of type {kind!r}")

    def _check_object(self, schema: Mapping[str, Any], where: str) -> None:
        properties = dict(_members(schema.get("properties", {}), f"{where}/properties"))
        for name, part in properties.items():
            self._check_schema(part, f"{where}/properties/{name}")
        unknown = [name for name in schema.get("required", ()) if name not in properties]
        if unknown:
            raise ValueError(f"{where}/required names {unknown}, which are not in its properties; add them")
        others = schema.get("additionalProperties", False)
        if others is not False and properties:
            # A name could come twice, once with a value of the wrong type, and JSON readers take the last.
            raise ValueError(
                f"{where} has both properties and additionalProperties; set additionalProperties to false"
            )
        if others is not False:
            self._check_schema(others, f"{where}/additionalProperties")


class Utf8:
    """Which tokens make no character after what came before; xgrammar lets some of them pass as one.

    Args:
        tokens: V, the bytes of each.
    """

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = tokens
        self._wrong_V = {
            lead: torch.tensor(
                [_NO_CHARACTER.match(bytes([lead]) + token[:1]) is not None for token in tokens]
            )
            for lead in _LEADS
        }

    def wrong_after(self, byte: int) -> Tensor | None:
        """bool [V] on the CPU, or None where there are none."""
        return self._wrong_V.get(byte)


class Grammar:
    """A `Constraint`: where an answer stands in a grammar. Made by `Grammars`; may be used for many requests."""

    def __init__(self, matcher: Any, utf8: Utf8, last_byte: int = 0) -> None:
        self._matcher, self._utf8, self._last_byte = matcher, utf8, last_byte

    def apply(self, logits_V: Tensor) -> Tensor:
        """See `Constraint`."""
        n_vocab = len(self._utf8.tokens)
        words_W = torch.full((-(-n_vocab // 32),), -1, dtype=torch.int32)
        self._matcher.fill_next_token_bitmask(words_W[None])
        bits_WB = words_W[:, None] >> torch.arange(32, dtype=torch.int32) & 1
        forbidden_V = bits_WB.flatten()[:n_vocab] == 0
        wrong_V = self._utf8.wrong_after(self._last_byte)
        if wrong_V is not None:
            forbidden_V |= wrong_V
        return logits_V.masked_fill(forbidden_V.to(logits_V.device), -torch.inf)

    def advance(self, token_id: int) -> None:
        """See `Constraint`.

        Raises:
            ValueError: the token is not allowed here.
        """
        if not self._matcher.accept_token(token_id):
            raise ValueError(f"token {token_id} is not allowed here by the grammar")
        self._last_byte = self._utf8.tokens[token_id][-1]

    def fork(self) -> Grammar:
        """See `Constraint`."""
        return Grammar(self._matcher.fork(), self._utf8, self._last_byte)


def _import_xgrammar() -> Any:
    try:
        import xgrammar
    except ImportError as error:
        raise ImportError(
            'answers by JSON schema or regular expression need the package xgrammar: pip install "twofold[grammar]"'
        ) from error
    return xgrammar


def _token_bytes(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """What each token adds to the text; nothing for special tokens and places without a token.

    Raises:
        ValueError: the text of several tokens is something else than theirs in a row.
    """
    found: list[bytes] = list(
        _import_xgrammar()
        .TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size, stop_token_ids=[0])
        .decoded_vocab
    )
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for token_id in special | set(tokenizer.all_special_ids):
        if token_id < vocab_size:
            found[token_id] = b""
    ordinary = [i for i, token in enumerate(found) if token and token.isascii()]
    probe = ordinary[:: max(1, len(ordinary) // 64)]
    probe += [int(i) for i in encode(tokenizer, " a . b , c ! it 's") if i < vocab_size]
    expected = b"".join(found[i] for i in probe).decode()
    text = tokenizer.decode(probe, skip_special_tokens=True)
    # Some decoders drop a space at the very start.
    if not ordinary or text.lstrip(" ") != expected.lstrip(" "):
        raise ValueError(
            "this tokenizer's text is not that of its tokens one after another (it adds or removes spaces), so its "
            "answers cannot be held to a grammar; set clean_up_tokenization_spaces=False if that is what it does"
        )
    return found


def _check_pattern(pattern: Any) -> None:
    """Refuse what Python does not take, and anchors other than around the whole: xgrammar leaves them out."""
    if not isinstance(pattern, str):
        raise ValueError(f"a pattern must be a string, got {type(pattern).__name__}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    inner = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "", pattern, flags=re.DOTALL)
    inner = inner.removeprefix("^").removesuffix("$")
    has_choice = "|" in re.sub(r"\([^()]*\)", "", inner)
    if "^" in inner or "$" in inner or (has_choice and pattern.strip("^$") != pattern):
        raise ValueError(
            f"{pattern!r} has ^ or $ in its middle or beside a choice; the whole text is matched in any case, so "
            "leave them out"
        )


def _members(value: Any, where: str) -> Sequence[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be an object, got {str(value)[:80]}")
    return list(value.items())


def _refuse(keys: set[str], where: str, why: str) -> None:
    if keys:
        raise ValueError(
            f"{where} has {', '.join(sorted(map(repr, keys)))}, which cannot be followed {why}; say it in another "
            "way, or check answers for it yourself"
        )
