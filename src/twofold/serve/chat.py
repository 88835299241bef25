"""/v1/chat/completions: conversations, answered."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from twofold.infer import Completion, Delta, Request
from twofold.serve.completions import by_choice, is_news, wants_usage, whole_delta
from twofold.serve.errors import bad_request
from twofold.serve.guard import facts
from twofold.serve.prompts import constraint_of, conversation, engine_request, first_seed, needs_grammar
from twofold.serve.replies import ERRORS, STREAMED, ChatReply, usage
from twofold.serve.schemas import ChatRequest
from twofold.serve.service import Served, Service
from twofold.serve.settings import ServeSettings
from twofold.serve.stream import reply
from twofold.serve.token_text import Reported, TokenReport, TokenTexts
from twofold.serve.work import Arrived, Work


def chat_router(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/chat/completions", response_model=ChatReply, responses=STREAMED | ERRORS)
    async def create_chat_completion(body: ChatRequest, request: HttpRequest) -> Response:
        """Answer a conversation, written with the model's chat template."""
        served = service.model(body.model)
        facts(request.scope).update(model=served.name, stream=bool(body.stream))
        work = await service.open(
            served,
            facts(request.scope),
            body.n_rows,
            lambda: [chat_request(served, service.settings, body)],
            needs_grammar=needs_grammar(body, body.response_format),
        )
        return await reply(work, ChatWriter(work, body), is_streamed=bool(body.stream))

    return router


def chat_request(served: Served, settings: ServeSettings, body: ChatRequest) -> Request:
    """Errors as in `prompts.engine_request`."""
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", param="top_logprobs")
    return engine_request(
        served,
        settings,
        conversation(body.messages),
        body,
        new_tokens=body.max_completion_tokens or body.max_tokens,
        default_new_tokens=settings.default_new_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        seed=first_seed(body),
        constraint=constraint_of(served, body, body.response_format),
    )


class ChatWriter:
    """What OpenAI's API says of chat completions."""

    def __init__(self, work: Work, body: ChatRequest) -> None:
        self._work, self._body = work, body
        self._texts = work.served.token_texts
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": work.served.name,
        }
        self._reports: dict[int, TokenReport] = {}

    def whole(self, answers: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        """See `stream.Writer`."""
        choices = []
        (completions,) = answers
        for index, completion in enumerate(completions):
            message = {"role": "assistant", "content": completion.text, "refusal": None}
            choices.append({"message": message, **self._choice(index, whole_delta(index, completion))})
        return {**self._head, "choices": choices, "usage": usage(self._work)}

    def first(self) -> list[dict[str, Any]]:
        """See `stream.Writer`."""
        opening = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self._event([{"index": index, **opening}]) for index in range(self._body.n or 1)]

    def more(self, arrived: Arrived) -> list[dict[str, Any]]:
        """See `stream.Writer`."""
        events = []
        for index, delta in by_choice(arrived, self._body.n or 1):
            content = {"content": delta.text} if delta.text else {}
            choice = {"delta": content, **self._choice(index, delta)}
            if is_news(choice, delta.text):
                events.append(self._event([choice]))
        return events

    def last(self) -> list[dict[str, Any]]:
        """See `stream.Writer`."""
        return [self._event([], usage(self._work))] if wants_usage(self._body) else []

    def _event(self, choices: list[Any], used: dict[str, int] | None = None) -> dict[str, Any]:
        event = {**self._head, "choices": choices}
        return event | {"usage": used} if wants_usage(self._body) else event

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        found: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": delta.finish_reason}
        if self._body.logprobs:
            report = self._reports.setdefault(index, TokenReport(self._texts))
            found["logprobs"] = _logprobs(report.take(delta), self._texts)
        if self._body.return_token_ids:
            found["token_ids"] = list(delta.token_ids)
        return found


def _logprobs(tokens: Sequence[Reported], texts: TokenTexts) -> dict[str, Any] | None:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": texts.text(token_id),
            "logprob": logprob,
            "bytes": list(texts.bytes(token_id)),
        }

    if not tokens:
        return None
    content = [
        {**entry(token.token_id, token.logprob), "top_logprobs": [entry(*other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}
