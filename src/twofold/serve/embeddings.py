"""/v1/embeddings: the encoder's output, averaged over a text's tokens."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from twofold.data.tokenize import encode
from twofold.serve.errors import bad_request
from twofold.serve.guard import facts
from twofold.serve.replies import ERRORS, EmbeddingReply
from twofold.serve.schemas import EmbeddingRequest
from twofold.serve.service import Served, Service

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
        most = service.settings.max_prompt_tokens
        data: list[dict[str, Any]] = []
        n_tokens = 0
        async with service.beside(served, len(texts)) as run:
            for start in range(0, len(texts), _GROUP):
                group = texts[start : start + _GROUP]
                vectors, n = await run(lambda group=group: _embed(served, group, most))
                n_tokens += n
                for index, vector in enumerate(vectors, start=start):
                    value = _encoded(vector) if body.encoding_format == "base64" else vector.tolist()
                    data.append({"object": "embedding", "index": index, "embedding": value})
        used = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": used})

    return router


def _embed(served: Served, texts: list[str], most: int | None) -> tuple[np.ndarray[Any, Any], int]:
    lengths = [len(encode(served.engine.tokenizer, text)) for text in texts]
    if most is not None and max(lengths) > most:
        raise bad_request(
            f"a text has {max(lengths)} tokens, this server's max_prompt_tokens are {most}; shorten or split it",
            param="input",
            code="context_length_exceeded",
        )
    return served.engine.embed(texts).numpy(), sum(lengths)


def _encoded(vector: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
