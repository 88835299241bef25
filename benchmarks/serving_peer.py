"""What the serving benchmark compares with: `generate` of transformers behind the same API.

    python benchmarks/serving_peer.py MODEL --port 8000 --rows 1

A few lines, as one writes them first: a queue, and a thread that takes up to `rows` requests from it, pads them, and
writes until the longest answer is there. One row is one request at a time; more is static batching.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from inference_contenders import System, Transformers, seq2seq_model
from pydantic import BaseModel
from torch import Tensor


class Asked(BaseModel):
    """As much of OpenAI's completions as the benchmark sends."""

    prompt: list[int]
    max_tokens: int
    stream: bool


class Waiting:
    """A request in the queue; `pieces` takes its tokens, and None at the end. Used across threads."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.n_written = 0
        self.pieces: asyncio.Queue[int | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def take(self, token_id: int) -> None:
        """A token; what a batch writes beyond the answer's own length is dropped."""
        if self.n_written < self.asked.max_tokens:
            self.n_written += 1
            self._put(token_id)
            if self.n_written == self.asked.max_tokens:
                self._put(None)

    def _put(self, piece: int | None) -> None:
        self._loop.call_soon_threadsafe(self.pieces.put_nowait, piece)


class Streamer:
    """Takes what `generate` writes, all rows of a step together."""

    def __init__(self, batch: Sequence[Waiting]) -> None:
        self._batch = batch
        self._is_first = True

    def put(self, ids: Tensor) -> None:
        """See transformers. What comes first is the decoder's start."""
        if not self._is_first:
            for waiting, token_id in zip(self._batch, ids.flatten().tolist(), strict=True):
                waiting.take(token_id)
        self._is_first = False

    def end(self) -> None:
        """See transformers."""


def create_peer(folder: Path, precision: str, *, rows: int) -> FastAPI:
    """The server.

    Args:
        folder: of a T5Gemma checkpoint with its tokenizer.
        precision: a dtype's name.
        rows: requests that are answered together.
    """
    from transformers import AutoTokenizer

    system = System("transformers", precision)
    model = Transformers(seq2seq_model(folder, system), system)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    requests: queue.Queue[Waiting] = queue.Queue()
    threading.Thread(target=_work, args=(model, requests, rows), daemon=True).start()
    app = FastAPI()

    @app.get("/ready")
    async def ready() -> str:
        return "ok"

    @app.post("/v1/completions")
    async def completions(asked: Asked) -> StreamingResponse:
        waiting = Waiting(asked)
        requests.put(waiting)
        return StreamingResponse(_events(waiting, tokenizer), media_type="text/event-stream")

    return app


def _work(model: Transformers, requests: queue.Queue[Waiting], rows: int) -> None:
    while True:
        batch = [requests.get()]
        while len(batch) < rows and not requests.empty():
            batch.append(requests.get_nowait())
        longest = max(waiting.asked.max_tokens for waiting in batch)
        model.generate([waiting.asked.prompt for waiting in batch], longest, streamer=Streamer(batch))


async def _events(waiting: Waiting, tokenizer: Any) -> AsyncIterator[str]:
    while (token_id := await waiting.pieces.get()) is not None:
        yield _event({"choices": [{"index": 0, "text": tokenizer.decode([token_id]), "finish_reason": None}]})
    yield _event({"choices": [], "usage": {"completion_tokens": waiting.n_written}})
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps({'object': 'text_completion', **content})}\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    app = create_peer(options.model, options.precision, rows=options.rows)
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
