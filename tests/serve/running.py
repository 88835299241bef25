"""A server on this machine over tiny models, reached by real HTTP."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
from fastapi import FastAPI

from tests.models.tiny import build, pair_config, stack
from twofold import EncoderDecoder, Engine
from twofold.serve import ServeSettings, Service, create_app
from twofold.serve.run import Server, make_server, open_socket

LIKE_T5GEMMA = {
    "layout": "separate", "reads": "final", "cross_rope": False, "decoder_positions": "restart",
    "decoder_start": "bos",
}  # fmt: skip
WAIT_S = 20.0
"""For what must happen soon, on a machine that has other things to do."""


@dataclass
class Running:
    """A server that answers."""

    url: str
    app: FastAPI
    server: Server

    @property
    def service(self) -> Service:
        return self.app.state.service

    @property
    def engine(self) -> Engine:
        return next(iter(self.service.models.values())).engine

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | options)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(**{"base_url": self.url, "timeout": WAIT_S} | options)


def make_text_model(tokenizer: Any, **changes: Any) -> EncoderDecoder:
    """A tiny random pair that reads bytes."""
    settings = {
        "layout": "merged", "reads": "aligned", "cross_rope": True, "decoder_positions": "continue",
        "decoder_start": "last_source_token", "bos_token_id": 256, "eos_token_ids": (257,), "pad_token_id": 257,
    }  # fmt: skip
    n_positions = changes.pop("max_position_embeddings", 256)
    model = build(
        pair_config(stack(vocab_size=258, max_position_embeddings=n_positions), **settings | changes)
    )
    model.tokenizer = tokenizer
    return model


def make_engine(tokenizer: Any, *, pause_s: float = 0.0, batch_size: int = 4, **changes: Any) -> Engine:
    """Over such a model; each step takes `pause_s` longer, so that a test can look in."""
    engine = Engine(
        make_text_model(tokenizer, **changes), device="cpu", backend="torch", batch_size=batch_size
    )
    if pause_s:
        step = engine.loop.backend.step

        def slow(*arguments: Any) -> Any:
            time.sleep(pause_s)
            return step(*arguments)

        engine.loop.backend.step = slow  # type: ignore[method-assign]
    return engine


@contextmanager
def serving(
    models: dict[str, Engine], settings: ServeSettings | None = None, *, extensions: Any = ()
) -> Iterator[Running]:
    """Until the end of the block; then everything must be over."""
    app = create_app(models, settings, extensions=extensions)
    listener = open_socket("127.0.0.1", 0, stall_timeout_s=app.state.service.settings.stall_timeout_s)
    server = make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", app, server)
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()
    for served in app.state.service.models.values():
        assert_empty(served.engine)


def until(is_so: Callable[[], Any], wait_s: float = WAIT_S) -> None:
    """Wait for it, but not for ever."""
    end = time.monotonic() + wait_s
    while not is_so():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def assert_empty(engine: Engine) -> None:
    """Nothing runs, waits or holds memory."""
    scheduler = engine.loop.scheduler
    found = (scheduler.used_bytes, scheduler.used_rows, scheduler.n_waiting, scheduler.n_running)
    assert found == (0, 0, 0, 0)
    assert engine.loop.is_idle
