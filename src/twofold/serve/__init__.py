"""Serving over HTTP: OpenAI's API, Vertex AI's container contract, metrics. Needs the extra `serve`."""

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError(
        'serving needs FastAPI, uvicorn and prometheus-client: pip install "twofold[serve]"'
    ) from error

from twofold.serve.app import Extension, create_app
from twofold.serve.errors import ApiError
from twofold.serve.service import Served, Service
from twofold.serve.settings import ServeSettings

__all__ = ["ApiError", "Extension", "ServeSettings", "Served", "Service", "create_app"]
