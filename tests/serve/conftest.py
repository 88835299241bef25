"""One server that the tests of this folder share, where they change nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import twofold
from tests.serve.running import LIKE_T5GEMMA, Running, make_engine, make_text_model, serving
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


@pytest.fixture(scope="session")
def saved_pair(byte_tokenizer: Any, tmp_path_factory: Any) -> Path:
    """A folder with a tiny model, for processes that load one."""
    path = tmp_path_factory.mktemp("models") / "pair"
    twofold.save(make_text_model(byte_tokenizer), path)
    return path
