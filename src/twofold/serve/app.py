"""The server as an ASGI app: what it is made of, and nothing global."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from twofold.infer import Engine
from twofold.serve.chat import chat_router
from twofold.serve.completions import completions_router
from twofold.serve.embeddings import embeddings_router
from twofold.serve.errors import add_handlers
from twofold.serve.guard import Guard
from twofold.serve.models import health_router, models_router
from twofold.serve.reference import reference_router
from twofold.serve.service import Service
from twofold.serve.settings import ServeSettings
from twofold.serve.tokenize import tokenize_router
from twofold.serve.vertex import vertex_router

Extension = Callable[[FastAPI, Service], None]
"""Adds routes. They need a key as all others, except under paths that it adds to `service.public_paths`."""


def create_app(
    models: Mapping[str, Engine],
    settings: ServeSettings | None = None,
    *,
    extensions: Sequence[Extension] = (),
) -> FastAPI:
    """A server over engines.

    Args:
        models: engines by the names that clients use; the first answers where a request names none. They start
            with the app, and are closed with it.
        settings: limits and keys.
        extensions: called in turn, at the end.

    Returns:
        The app; `app.state.service` is its `Service`.

    Raises:
        ValueError: no model, or one without a tokenizer.
    """
    service = Service(models, settings or ServeSettings())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.close()

    app = FastAPI(
        title="twofold",
        version=version("twofold"),
        description="Encoder-decoder language models behind OpenAI's API.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    app.add_middleware(Guard, service=service)
    add_handlers(app)
    for make_router in (
        completions_router, chat_router, embeddings_router, models_router, tokenize_router, health_router
    ):  # fmt: skip
        app.include_router(make_router(service))
    if service.settings.predict_route is not None:
        app.include_router(vertex_router(service, service.settings.predict_route))
    app.include_router(reference_router(app))
    for extend in extensions:
        extend(app, service)
    app.openapi = lambda: _document(app, service)  # type: ignore[method-assign]
    service.paths = frozenset(app.openapi()["paths"])
    return app


def _document(app: FastAPI, service: Service) -> dict[str, Any]:
    """The OpenAPI document, made once: wrong requests get 400 here, where FastAPI says 422; and where a key goes."""
    if app.openapi_schema is None:
        found = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        for path in found["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            found["components"]["schemas"].pop(name, None)
        if service.settings.key_hashes:
            found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            found["security"] = [{"key": []}]
        app.openapi_schema = found
    return app.openapi_schema
