"""What the server answers, for its OpenAPI document, and the parts that several answers share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

if TYPE_CHECKING:
    from twofold.serve.work import Work

FinishReason = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """As OpenAI's API writes errors."""

    error: ErrorDetail


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """One entry per token of the text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None


class CompletionReply(BaseModel):
    """Continuations; with `stream` they come in pieces of the same form."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class AssistantMessage(BaseModel):
    """A reply."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatTop(BaseModel):
    """A token that was likely."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(ChatTop):
    """A token of the text."""

    top_logprobs: list[ChatTop]


class ChatLogprobs(BaseModel):
    """One entry per token of the text."""

    content: list[ChatToken]
    refusal: None = None


class ChatChoice(BaseModel):
    """One reply."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = None


class ChatReply(BaseModel):
    """Replies; with `stream` they come as OpenAI's chat.completion.chunk."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Embedding(BaseModel):
    """One text's vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingReply(BaseModel):
    """Vectors, in the order of the texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelReply(BaseModel):
    """One model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    """Tokens of prompt and answer together, or of each where they are counted apart."""


class ModelList(BaseModel):
    """All models of this server."""

    object: Literal["list"]
    data: list[ModelReply]


class TokenizeReply(BaseModel):
    """What the model reads."""

    count: int
    tokens: list[int]
    """The encoder's."""
    prefix_tokens: list[int]
    """With which the decoder starts."""
    max_model_len: int


class DetokenizeReply(BaseModel):
    """A text."""

    prompt: str


class StateReply(BaseModel):
    """How the server is."""

    status: str


class Prediction(BaseModel):
    """One instance's answer."""

    text: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_new_tokens: int


class PredictReply(BaseModel):
    """Vertex AI's form."""

    predictions: list[list[Prediction] | Prediction]


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "The request is wrong, or too much for the model."},
    401: {"model": ErrorReply, "description": "No key that the server knows."},
    404: {"model": ErrorReply, "description": "There is no such model."},
    408: {"model": ErrorReply, "description": "The request came too slowly."},
    413: {"model": ErrorReply, "description": "The body is too large."},
    429: {"model": ErrorReply, "description": "Too many requests; see Retry-After."},
    500: {"model": ErrorReply, "description": "The server failed."},
    503: {"model": ErrorReply, "description": "The server shuts down or is too busy; see Retry-After."},
    504: {"model": ErrorReply, "description": "The answer took too long."},
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream` as server-sent events, the last of which is [DONE].",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


def usage(work: Work) -> dict[str, int]:
    """Of all answers together."""
    return {
        "prompt_tokens": work.num_prompt_tokens,
        "completion_tokens": work.num_new_tokens,
        "total_tokens": work.num_prompt_tokens + work.num_new_tokens,
    }
