"""/v1/models, and whether the server lives and takes requests."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from twofold.serve.metrics import CONTENT_TYPE
from twofold.serve.replies import ERRORS, ModelList, ModelReply, StateReply
from twofold.serve.service import Served, Service

_UNHEALTHY: dict[int | str, dict[str, Any]] = {503: {"model": StateReply, "description": "Not now."}}


def models_router(service: Service) -> APIRouter:
    """What can be asked."""
    router = APIRouter(tags=["OpenAI"])

    @router.get("/v1/models", response_model=ModelList, responses={401: ERRORS[401]})
    async def list_models() -> Response:
        """All models of this server."""
        data = [_reply(served) for served in service.models.values()]
        return JSONResponse({"object": "list", "data": data})

    @router.get(
        "/v1/models/{name:path}", response_model=ModelReply, responses={k: ERRORS[k] for k in (401, 404)}
    )
    async def retrieve_model(name: str) -> Response:
        """One model."""
        return JSONResponse(_reply(service.model(name)))

    return router


def health_router(service: Service) -> APIRouter:
    """For what watches the server."""
    router = APIRouter(tags=["operation"])

    def state(is_good: bool, bad: str) -> Response:
        return JSONResponse({"status": "ok" if is_good else bad}, 200 if is_good else 503)

    @router.get("/health", response_model=StateReply, responses=_UNHEALTHY)
    async def health() -> Response:
        """The engines work; 503: start the server anew."""
        return state(service.is_alive, "an engine has stopped")

    @router.get("/ready", response_model=StateReply, responses=_UNHEALTHY)
    async def ready() -> Response:
        """New requests are taken; 503: send them elsewhere."""
        return state(service.is_ready, "draining" if service.is_draining else "an engine has stopped")

    @router.get("/metrics", response_class=Response, responses={401: ERRORS[401]})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    if service.settings.health_route not in (None, "/health", "/ready"):
        router.get(service.settings.health_route, response_model=StateReply, responses=_UNHEALTHY)(ready)
        service.public_paths.add(service.settings.health_route)
    return router


def max_model_len(served: Served) -> int:
    """Positions for prompt and answer together, or for the longer of them where they are counted apart."""
    config = served.engine.model.config
    decoder = config.decoder.max_position_embeddings
    if config.decoder_positions == "continue":
        return decoder
    return max(decoder, config.encoder.max_position_embeddings)


def _reply(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "twofold",
        "max_model_len": max_model_len(served),
    }
