"""/playground/attribution: which words of the source each word of an answer looked at."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from twofold.data.tokenize import encode
from twofold.serve.errors import bad_request
from twofold.serve.guard import facts
from twofold.serve.prompts import conversation, n_free, read_prompt, refuse_endless
from twofold.serve.replies import ERRORS
from twofold.serve.schemas import Body, Message, TokenIds
from twofold.serve.service import Served, Service

_MOST_WEIGHTS = 2**22
"""Of tokens, computed for one reply: 17 MB, and as nested lists of Python numbers eight times that."""

Numbers = list[Any] | str
"""Nested lists, or base64 of float32 with the lowest byte first."""
Chosen = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=4096)]


class AttributionRequest(Body):
    """A prompt, as a text or a conversation, and an answer, as a text or token ids."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    answer: str | None = None
    answer_token_ids: TokenIds | None = None
    """As they were generated."""
    layers: Chosen | None = None
    """Of the decoder, from 0. Not given: all."""
    heads: Chosen | None = None
    """Of each layer, likewise."""
    keep: Literal["mean", "layers", "heads", "all"] = "mean"
    """What is not averaged: nothing, layers, heads, or both."""
    encoding_format: Literal["float", "base64"] = "float"
    """`base64`: of float32 numbers, the lowest byte first, in the order of `shape`."""

    @model_validator(mode="after")
    def _one_of_each(self) -> AttributionRequest:
        for one, other in (("prompt", "messages"), ("answer", "answer_token_ids")):
            if (getattr(self, one) is None) == (getattr(self, other) is None):
                raise PydanticCustomError(
                    "one_of", "give {one} or {other}: exactly one of them", {"one": one, "other": other}
                )
        return self


class Words(BaseModel):
    """A text, and its words by characters: [first, one after the last]."""

    text: str
    words: list[tuple[int, int]]


class AttributionReply(BaseModel):
    """Where the attention of each answer word went. `weights` over all source words, `sink`, `own` and `elsewhere`
    add up to 1."""

    object: Literal["attribution"]
    model: str
    num_layers: int
    """Of the decoder."""
    num_heads: int
    """Of each layer."""
    source: Words
    """What the model read, the chat template included."""
    answer: Words
    shape: tuple[int, int, int, int]
    """Layers and heads, 1 where they are averaged; answer words; source words."""
    weights: Numbers
    """[layers][heads][answer words][source words]."""
    sink: Numbers
    """[layers][heads][answer words]: on the first source token and on special tokens."""
    own: Numbers
    """Likewise: on the decoder's own tokens; 0 where cross-attention is a sub-layer of its own."""
    elsewhere: Numbers
    """Likewise: on source tokens of no word, as line breaks."""


def attribution_router(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["playground"])

    @router.post("/playground/attribution", response_model=AttributionReply, responses=ERRORS)
    async def create_attribution(body: AttributionRequest, request: HttpRequest) -> Response:
        """Tell which words of the source each word of an answer looked at, by the decoder's attention."""
        served = service.model(body.model)
        facts(request.scope).update(model=served.name)
        async with service.beside(served, 1) as run:
            # Written in the thread, too: a million numbers as JSON take a second.
            reply: Response = await run(lambda: JSONResponse(_reply(service, served, body)))
        return reply

    return router


def _reply(service: Service, served: Served, body: AttributionRequest) -> dict[str, Any]:
    engine = served.engine
    prompt = body.prompt if body.prompt is not None else conversation(body.messages or [])
    answer = body.answer if body.answer is not None else body.answer_token_ids or []
    refuse_endless(
        served,
        service.settings,
        [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt],
    )
    if isinstance(answer, str):
        refuse_endless(served, service.settings, [answer])
    source, prefix = read_prompt(served, prompt)
    n_free(served, service.settings, source, prefix)
    config = engine.model.config.decoder
    n_answer = len(encode(engine.tokenizer, answer)) if isinstance(answer, str) else len(answer)
    n_maps = 1
    if body.keep in ("layers", "all"):
        n_maps *= config.num_hidden_layers if body.layers is None else len(body.layers)
    if body.keep in ("heads", "all"):
        n_maps *= config.num_attention_heads if body.heads is None else len(body.heads)
    if n_maps * n_answer * len(source) > _MOST_WEIGHTS:
        raise bad_request(
            f"{n_maps} maps of {n_answer} answer tokens by {len(source)} source tokens are more than the "
            f"{_MOST_WEIGHTS:,} weights of one reply; ask for fewer layers or heads at a time, or keep='mean'",
            param="keep",
        )
    found = engine.attribute(prompt, answer, layers=body.layers, heads=body.heads, keep=body.keep)
    is_base64 = body.encoding_format == "base64"
    return {
        "object": "attribution",
        "model": served.name,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "source": {"text": found.source_text, "words": found.source_words},
        "answer": {"text": found.answer_text, "words": found.answer_words},
        "shape": list(found.weights.shape),
        **{
            name: _numbers(getattr(found, name), is_base64)
            for name in ("weights", "sink", "own", "elsewhere")
        },
    }


def _numbers(values: Tensor, is_base64: bool) -> Numbers:
    if not is_base64:
        numbers: list[Any] = values.tolist()
        return numbers
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()
