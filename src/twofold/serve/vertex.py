"""Vertex AI's contract for containers: instances and parameters in, predictions out.

https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from twofold.infer import Completion, Request
from twofold.serve.guard import facts
from twofold.serve.prompts import constraint_of, conversation, engine_request, first_seed, needs_grammar
from twofold.serve.replies import ERRORS, PredictReply
from twofold.serve.schemas import MOST, Body, Count, Generation, Message, Text
from twofold.serve.service import Served, Service
from twofold.serve.settings import ServeSettings

_OTHER_NAMES = {
    "maxOutputTokens": "max_tokens",
    "topP": "top_p",
    "topK": "top_k",
    "stopSequences": "stop",
    "candidateCount": "n",
}
"""Of the same parameters, in Google's own models."""


class Instance(Body):
    """What one answer is to; exactly one of both."""

    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, given: Any) -> Any:
        return {"prompt": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one(self) -> Instance:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_of", "give a text, {prompt: ...} or {messages: [...]}")
        return self


class Parameters(Generation):
    """How all of them are answered, as in /v1/completions; Google's names (maxOutputTokens, topP, ...) do too."""

    max_tokens: Count | None = None
    """Not given: the server's default, or less where there is no room for it."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if given.get("stream"):
            raise PydanticCustomError("stream", "predictions are not streamed; use /v1/chat/completions")
        return {_OTHER_NAMES.get(name, name): value for name, value in given.items()}


class PredictRequest(Body):
    """Vertex AI's form."""

    instances: list[Instance] = Field(min_length=1, max_length=MOST)
    parameters: Parameters | None = None


def vertex_router(service: Service, route: str) -> APIRouter:
    """The route for predictions."""
    router = APIRouter(tags=["Vertex AI"])

    @router.post(route, response_model=PredictReply, responses=ERRORS)
    async def predict(body: PredictRequest, request: HttpRequest) -> Response:
        """Answer each instance; several answers (`n`) as a list."""
        asked = body.parameters or Parameters()
        served = service.model(asked.model)
        facts(request.scope).update(model=served.name, instances=len(body.instances))
        work = await service.open(
            served,
            facts(request.scope),
            len(body.instances) * asked.n_rows,
            lambda: _requests(served, service.settings, body.instances, asked),
            needs_grammar=needs_grammar(asked),
        )
        try:
            answers = await work.completions()
        finally:
            work.close()
        prepared = [handle.prepared for handle in work.handles]
        found = [
            [_prediction(completion, len(p.source_ids) + len(p.prefix_ids)) for completion in completions]
            for completions, p in zip(answers, prepared, strict=True)
        ]
        return JSONResponse({"predictions": [one[0] if len(one) == 1 else one for one in found]})

    return router


def _requests(
    served: Served, settings: ServeSettings, instances: list[Instance], asked: Parameters
) -> list[Request]:
    constraint, seed = constraint_of(served, asked), first_seed(asked)
    return [
        engine_request(
            served,
            settings,
            conversation(instance.messages) if instance.messages else instance.prompt or "",
            asked,
            number=number,
            new_tokens=asked.max_tokens,
            default_new_tokens=settings.default_new_tokens,
            logprobs=None,
            seed=seed,
            constraint=constraint,
        )
        for number, instance in enumerate(instances)
    ]


def _prediction(completion: Completion, num_prompt_tokens: int) -> dict[str, Any]:
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "num_prompt_tokens": num_prompt_tokens,
        "num_new_tokens": len(completion.token_ids),
    }
