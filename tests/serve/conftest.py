"""One server that the tests of this folder share, where they change nothing."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.serve.running import LIKE_T5GEMMA, Running, make_engine, serving
from twofold.serve import ServeSettings


@pytest.fixture(scope="session")
def server(byte_tokenizer: Any) -> Iterator[Running]:
    """Two models, no keys, and Vertex AI's routes."""
    models = {"tiny": make_engine(byte_tokenizer), "other": make_engine(byte_tokenizer, **LIKE_T5GEMMA)}
    with serving(models, ServeSettings(predict_route="/predict", health_route="/healthz")) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Running) -> openai.OpenAI:
    return server.openai()


@pytest.fixture(scope="session")
def http(server: Running) -> Iterator[httpx.Client]:
    with server.http() as found:
        yield found
