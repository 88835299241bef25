"""/v1/embeddings: the encoder's output, averaged over a text's tokens."""

from __future__ import annotations

import asyncio
import base64
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from twofold.data.tokenize import encode
from twofold.serve.errors import bad_request
from twofold.serve.guard import facts
from twofold.serve.prompts import refuse_endless
from twofold.serve.replies import ERRORS, EmbeddingReply
from twofold.serve.schemas import EmbeddingRequest
from twofold.serve.service import Served, Service
from twofold.serve.settings import ServeSettings

_GROUP = 8
"""Texts that are encoded between two looks at whether the client still waits."""


def embeddings_router(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/embeddings", response_model=EmbeddingReply, responses=ERRORS)
    async def create_embedding(body: EmbeddingRequest, request: HttpRequest) -> Response:
        """Turn texts into vectors of the encoder's width."""
        served = service.model(body.model)
        texts = [body.input] if isinstance(body.input, str) else body.input
        facts(request.scope).update(model=served.name, texts=len(texts))
        data: list[dict[str, Any]] = []
        n_tokens = 0
        async with service.beside(served, len(texts)) as run:
            for start in range(0, len(texts), _GROUP):
                group = texts[start : start + _GROUP]
                vectors, n = await run(partial(_embed, served, service.settings, group, body.encoding_format))
                n_tokens += n
                data += (
                    {"object": "embedding", "index": index, "embedding": vector}
                    for index, vector in enumerate(vectors, start=start)
                )
        used = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        reply = {"object": "list", "data": data, "model": served.name, "usage": used}
        return await asyncio.to_thread(JSONResponse, reply)  # many numbers, which take time to write

    return router


def _embed(
    served: Served, settings: ServeSettings, texts: list[str], encoding: str | None
) -> tuple[list[list[float] | str], int]:
    """Vectors as they are sent, and the number of tokens read."""
    for text in texts:
        refuse_endless(served, settings, [text])
    lengths = [len(encode(served.engine.tokenizer, text)) for text in texts]
    most = settings.max_prompt_tokens
    if most is not None and max(lengths) > most:
        raise bad_request(
            f"a text has {max(lengths)} tokens, this server's max_prompt_tokens are {most}; shorten or split it",
            param="input",
            code="context_length_exceeded",
        )
    vectors = served.engine.embed(texts).numpy()
    if encoding == "base64":
        return [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors], sum(lengths)
    return vectors.tolist(), sum(lengths)
