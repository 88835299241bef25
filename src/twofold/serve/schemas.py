"""What clients may send. Field names and ranges are OpenAI's; what is ours beside them is marked so.

Three kinds of fields beside those that are followed: harmless ones that change no answer are taken and ignored; known
ones that we cannot follow are refused unless they are neutral (null, false, empty); unknown ones are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

_UNSUPPORTED: Mapping[str, str] = {
    "tools": "tools are not supported; describe the answer you want with response_format instead",
    "tool_choice": "tools are not supported",
    "tool_calls": "tools are not supported; write what they gave into the text",
    "functions": "functions are not supported; describe the answer you want with response_format instead",
    "function_call": "functions are not supported",
    "logit_bias": "logit_bias is not supported",
    "suffix": "suffix is not supported: the model does not fill in between two texts",
    "echo": "echo is not supported: the prompt is read by the encoder and is no part of the answer",
    "best_of": "best_of is not supported; ask for n answers, or for num_beams",
    "audio": "only text is supported",
    "modalities": "only text is supported",
    "prediction": "prediction is not supported; lookup speeds up answers that repeat their source",
    "reasoning_effort": "reasoning_effort is not supported",
    "web_search_options": "web search is not supported",
    "dimensions": "embeddings come in the encoder's width only",
}
MOST = 4096
"""Members of a list: checking many of them would hold up the event loop."""
_MOST_IDS = 2**20
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
    "best_of": (1,),
}


class Body(BaseModel):
    """A JSON object without unknown fields, and without guesses at what a value of another type may mean."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        found = dict(given)
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name, why in _UNSUPPORTED.items():
            if name in found and name not in known:
                value = found.pop(name)
                if value not in (None, False, [], {}) and value not in _NEUTRAL.get(name, ()):
                    raise PydanticCustomError("unsupported", "{why}", {"why": why, "param": name})
        unknown = [name for name in found if name not in known]
        if unknown:
            allowed = ", ".join(sorted(known))
            raise PydanticCustomError(
                "unknown_parameter",
                "there is no such parameter; allowed are {allowed}",
                {"allowed": allowed, "param": str(unknown[0])},
            )
        return found


def _one_of(kinds: Iterable[str], is_right: Callable[[Any], bool]) -> BeforeValidator:
    """One message for a union, instead of one for each of its parts."""

    def check(given: Any) -> Any:
        if given is not None and not is_right(given):
            raise PydanticCustomError("wrong_type", "must be {kinds}", {"kinds": " or ".join(kinds)})
        return given

    return BeforeValidator(check)


def _is_list(given: Any, kind: type, most: int = MOST) -> bool:
    return isinstance(given, list) and len(given) <= most and set(map(type, given)) <= {kind}


def _is_ids(given: Any) -> bool:
    return bool(given) and _is_list(given, int, _MOST_IDS)


def _is_prompt(given: Any) -> bool:
    if isinstance(given, str) or _is_ids(given):
        return True
    return bool(given) and (_is_list(given, str) or (_is_list(given, list) and all(map(_is_ids, given))))


def _is_stop(given: Any) -> bool:
    return isinstance(given, str) or _is_list(given, str, 16)


# Of the types that a value may have pydantic tries all: each should fail at the first member, not at every one.
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Prompt = Annotated[
    str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)],
    _one_of(["a text", "token ids", f"a list of at most {MOST} of either"], _is_prompt),
]
Text = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=512)]
Stop = Annotated[
    StopText | list[StopText],
    _one_of(["a text", "a list of at most 16 texts"], _is_stop),
]
Harmless = Annotated[Any, Field(description="Taken, and without effect.")]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class StreamOptions(Body):
    """How a stream is sent."""

    include_usage: bool | None = None
    """A last event has the numbers of tokens."""
    include_obfuscation: Harmless = None


class Generation(Body):
    """What completions and chat have in common."""

    model: str | None = None
    """One of those under /v1/models; the server's first if not given."""
    n: Count | None = None
    """Answers to each prompt."""
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    """0: greedy. Default 1, as in OpenAI's API; with `num_beams` 0."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    """Answer i to prompt p draws with `seed + p * n + i`: the same on every machine. Not given: another each time."""
    stop: Stop | None = None
    """The text ends before the first of these."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: Count | None = None
    """Ours: only the k most likely tokens."""
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    """Ours: only tokens at least this share as likely as the most likely one."""
    repetition_penalty: float | None = Field(default=None, gt=0.0, le=10.0)
    """Ours: divides the logits of tokens already written."""
    num_beams: Count | None = None
    """Ours: above 1, beam search; no sampling settings then."""
    length_penalty: float | None = Field(default=None, ge=-10.0, le=10.0)
    """Ours: power of the length by which beams are ranked."""
    early_stopping: bool | Literal["never"] | None = None
    """Ours: when beam search ends, as in transformers."""
    stop_token_ids: Annotated[TokenIds, Field(max_length=64)] | None = None
    """Ours: in place of the model's end tokens; empty: only the number of tokens ends an answer."""
    lookup: int | None = Field(default=None, ge=0, le=64)
    """Ours: guess so many tokens at a time from the source; same answers, faster where they repeat it."""
    regex: str | None = Field(default=None, max_length=4096)
    """Ours: answers match this pattern as a whole."""
    return_token_ids: bool | None = None
    """Ours: choices have `token_ids` too."""
    user: Harmless = None
    metadata: Harmless = None
    store: Harmless = None
    service_tier: Harmless = None
    safety_identifier: Harmless = None
    prompt_cache_key: Harmless = None

    @model_validator(mode="after")
    def _streams(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options", "needs stream to be true", {"param": "stream_options"}
            )
        return self

    @property
    def n_rows(self) -> int:
        """Samples or beams of each prompt."""
        return max(self.n or 1, self.num_beams or 1)


class CompletionRequest(Generation):
    """A text, continued."""

    prompt: Prompt
    max_tokens: Count | None = None
    """Default 16, as in OpenAI's API."""
    logprobs: int | None = Field(default=None, ge=0)
    """Report each token's log-probability, and those of so many of the most likely ones."""

    @property
    def prompts(self) -> list[str | list[int]]:
        """One by one."""
        given: Any = self.prompt
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]
        return list(given)


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is another name of `system`."""
    content: Annotated[
        str | list[TextPart],
        _one_of(
            ["a text", "a list of {type: 'text', text: ...}"],
            lambda g: isinstance(g, str) or _is_list(g, dict),
        ),
    ]
    name: Harmless = None
    refusal: Harmless = None
    annotations: Harmless = None

    @property
    def text(self) -> str:
        """All of it."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class JsonSchema(Body):
    """A schema that answers follow."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """Without effect: schemas are always followed."""


class ResponseFormat(Body):
    """What an answer is."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None
    """With type json_schema."""

    @model_validator(mode="after")
    def _consistent(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "json_schema", "type 'json_schema' and json_schema go together: give both, or neither"
            )
        return self


class ChatRequest(Generation):
    """A conversation, answered."""

    messages: list[Message] = Field(min_length=1, max_length=MOST)
    max_completion_tokens: Count | None = None
    """Not given: the server's default, or less where there is no room for it."""
    max_tokens: Count | None = None
    """The older name."""
    logprobs: bool | None = None
    """Report each token's log-probability."""
    top_logprobs: int | None = Field(default=None, ge=0)
    """With `logprobs`: and those of so many of the most likely ones."""
    response_format: ResponseFormat | None = None
    parallel_tool_calls: Harmless = None
    verbosity: Harmless = None


class EmbeddingRequest(Body):
    """Texts, as vectors."""

    input: Annotated[
        str | Annotated[list[Text], Field(min_length=1)],
        _one_of(
            ["a text", f"a list of at most {MOST} texts"], lambda g: isinstance(g, str) or _is_list(g, str)
        ),
    ]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    """`base64`: of float32 numbers, the lowest byte first."""
    user: Harmless = None


class TokenizeRequest(Body):
    """A text or a conversation; exactly one of them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST)] | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_of", "give prompt or messages: exactly one of them")
        return self


class DetokenizeRequest(Body):
    """Token ids, back to text."""

    model: str | None = None
    tokens: Annotated[TokenIds, Field(max_length=_MOST_IDS)]
