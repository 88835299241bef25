"""/v1/completions: texts, continued."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from twofold.infer import Completion, Delta, Request
from twofold.serve.guard import facts
from twofold.serve.prompts import constraint_of, engine_request, first_seed, needs_grammar
from twofold.serve.replies import ERRORS, STREAMED, CompletionReply, usage
from twofold.serve.schemas import CompletionRequest
from twofold.serve.service import Served, Service
from twofold.serve.settings import ServeSettings
from twofold.serve.stream import reply
from twofold.serve.token_text import Reported, TokenReport, TokenTexts, joined
from twofold.serve.work import Arrived, Work

_DEFAULT_NEW_TOKENS = 16


def completions_router(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/completions", response_model=CompletionReply, responses=STREAMED | ERRORS)
    async def create_completion(body: CompletionRequest, request: HttpRequest) -> Response:
        """Continue a text, or several."""
        served = service.model(body.model)
        facts(request.scope).update(model=served.name, stream=bool(body.stream))
        work = await service.open(
            served,
            facts(request.scope),
            len(body.prompts) * body.n_rows,
            lambda: completion_requests(served, service.settings, body),
            needs_grammar=needs_grammar(body),
        )
        return await reply(work, CompletionWriter(work, body), is_streamed=bool(body.stream))

    return router


def completion_requests(served: Served, settings: ServeSettings, body: CompletionRequest) -> list[Request]:
    """One for each prompt. Errors as in `prompts.engine_request`."""
    constraint, seed = constraint_of(served, body), first_seed(body)
    return [
        engine_request(
            served,
            settings,
            prompt,
            body,
            number=number,
            new_tokens=body.max_tokens,
            default_new_tokens=_DEFAULT_NEW_TOKENS,
            logprobs=body.logprobs,
            seed=seed,
            constraint=constraint,
        )
        for number, prompt in enumerate(body.prompts)
    ]


class CompletionWriter:
    """What OpenAI's API says of completions. Choice i of prompt p has the index `p * n + i`."""

    def __init__(self, work: Work, body: CompletionRequest) -> None:
        self._work, self._body, self._n = work, body, body.n or 1
        self._texts = work.served.token_texts
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": work.served.name,
        }
        self._reports: dict[int, TokenReport] = {}

    def whole(self, answers: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        """See `stream.Writer`."""
        choices = [
            self._choice(prompt * self._n + index, whole_delta(index, completion))
            for prompt, completions in enumerate(answers)
            for index, completion in enumerate(completions)
        ]
        return {**self._head, "choices": choices, "usage": usage(self._work)}

    def first(self) -> list[dict[str, Any]]:
        """See `stream.Writer`."""
        return []

    def more(self, arrived: Arrived) -> list[dict[str, Any]]:
        """See `stream.Writer`."""
        choices = (self._choice(index, delta) for index, delta in by_choice(arrived, self._n))
        return [self._event([choice]) for choice in choices if is_news(choice, choice["text"])]

    def last(self) -> list[dict[str, Any]]:
        """See `stream.Writer`."""
        return [self._event([], usage(self._work))] if wants_usage(self._body) else []

    def _event(self, choices: list[Any], used: dict[str, int] | None = None) -> dict[str, Any]:
        event = {**self._head, "choices": choices}
        return event | {"usage": used} if wants_usage(self._body) else event

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        found: dict[str, Any] = {"index": index, "text": delta.text, "logprobs": None}
        found["finish_reason"] = delta.finish_reason
        if self._body.logprobs is not None:
            report = self._reports.setdefault(index, TokenReport(self._texts))
            found["logprobs"] = _logprobs(report.take(delta), self._texts)
        if self._body.return_token_ids:
            found["token_ids"] = list(delta.token_ids)
        return found


def whole_delta(index: int, completion: Completion) -> Delta:
    """An answer as a single delta."""
    return Delta(
        index=index,
        text=completion.text,
        token_ids=completion.token_ids,
        logprobs=completion.logprobs,
        finish_reason=completion.finish_reason,
    )


def by_choice(arrived: Arrived, n: int) -> list[tuple[int, Delta]]:
    """What has come of each choice, as one delta, in the order of choices."""
    numbered = sorted(((prompt * n + delta.index, delta) for prompt, delta in arrived), key=lambda x: x[0])
    return [
        (index, joined([delta for _, delta in group]))
        for index, group in groupby(numbered, key=lambda x: x[0])
    ]


def is_news(choice: dict[str, Any], text: str) -> bool:
    """It says something: a token that has no text yet does not."""
    return bool(text or choice["finish_reason"] or choice["logprobs"] or choice.get("token_ids"))


def wants_usage(body: CompletionRequest | Any) -> bool:
    """Streams end with the numbers of tokens."""
    return bool(body.stream_options and body.stream_options.include_usage)


def _logprobs(tokens: Sequence[Reported], texts: TokenTexts) -> dict[str, Any] | None:
    if not tokens:
        return None
    return {
        "tokens": [texts.text(token.token_id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{texts.text(other): value for other, value in token.top} for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }
