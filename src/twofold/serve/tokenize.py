"""/tokenize and /detokenize: what the model reads of a text or conversation."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from twofold.infer.limits import check_ids
from twofold.serve.models import max_model_len
from twofold.serve.prompts import conversation, read_prompt
from twofold.serve.replies import ERRORS, DetokenizeReply, TokenizeReply
from twofold.serve.schemas import DetokenizeRequest, TokenizeRequest
from twofold.serve.service import Served, Service


def tokenize_router(service: Service) -> APIRouter:
    """Both routes."""
    router = APIRouter(tags=["tokens"])

    @router.post("/tokenize", response_model=TokenizeReply, responses=ERRORS)
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids as encoder and decoder get them."""
        served = service.model(body.model)
        async with service.beside(served, 1) as run:
            return JSONResponse(await run(lambda: _tokens(served, body)))

    @router.post("/detokenize", response_model=DetokenizeReply, responses=ERRORS)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Text of token ids, special tokens included."""
        served = service.model(body.model)
        async with service.beside(served, 1) as run:
            return JSONResponse(await run(lambda: _text(served, body)))

    return router


def _tokens(served: Served, body: TokenizeRequest) -> dict[str, Any]:
    if body.messages is not None:
        source, prefix = read_prompt(served, conversation(body.messages))
    else:
        assert body.prompt is not None
        source, prefix = read_prompt(served, body.prompt)
    return {
        "count": len(source) + len(prefix),
        "tokens": source,
        "prefix_tokens": prefix,
        "max_model_len": max_model_len(served),
    }


def _text(served: Served, body: DetokenizeRequest) -> dict[str, Any]:
    check_ids(served.engine.model.config, body.tokens, "the request")
    return {"prompt": served.engine.tokenizer.decode(body.tokens, skip_special_tokens=False)}
