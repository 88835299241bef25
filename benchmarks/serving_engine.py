"""The engine of the serving benchmark without a server: the same requests at the same times, from Python.

    python benchmarks/serving_engine.py SPEC

Prints a line of JSON once it is ready, and one for each load that comes as a line on its input.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from inference_cases import Arrival
from serving_client import Reply

import twofold
from twofold.infer import Delta, Engine
from twofold.infer.timing import make_engine, random_ids, request_of, resident_bytes


def prompts(arrivals: Sequence[Arrival], vocab_size: int) -> list[list[int]]:
    """The same for every system."""
    return [random_ids(vocab_size, 1, one.source, seed=i)[0] for i, one in enumerate(arrivals)]


def open_engine(spec: dict[str, Any]) -> Engine:
    """As `twofold serve` opens it."""
    return make_engine(
        twofold.load(Path(spec["pair"]), dtype=torch.float32),
        precision=spec["precision"],
        batch_size=spec["rows"],
        threads=spec["threads"],
    )


def offer_in_process(
    engine: Engine, arrivals: Sequence[Arrival], prompts: Sequence[list[int]]
) -> list[Reply]:
    """Hand requests in at their times, to an engine that works in its own thread."""
    engine.start()
    started = time.perf_counter()
    replies, handles = [], []
    for arrival, prompt in zip(arrivals, prompts, strict=True):
        due = started + arrival.at_s
        time.sleep(max(0.0, due - time.perf_counter()))
        replies.append(Reply(due_s=arrival.at_s))
        handles.append(engine.submit(request_of(prompt, engine.model.config, arrival.new)))
        handles[-1].listen(partial(_take, replies[-1], due))
    for handle in handles:
        handle.result()
    return replies


def _take(reply: Reply, due: float, delta: Delta | None) -> None:
    now = time.perf_counter() - due
    if delta is None:
        reply.status, reply.is_whole, reply.done_s = 200, True, now
        return
    reply.n_tokens += len(delta.token_ids)
    if delta.text:
        reply.times_s.append(now)
        reply.first_s = reply.times_s[0]


def main() -> None:
    spec = json.loads(sys.argv[1])
    engine = open_engine(spec)
    print(json.dumps({"ready_bytes": resident_bytes()}), flush=True)
    for line in sys.stdin:
        arrivals = [Arrival(*fields) for fields in json.loads(line)]
        replies = offer_in_process(engine, arrivals, prompts(arrivals, spec["vocab_size"]))
        print(json.dumps([asdict(reply) for reply in replies]), flush=True)


if __name__ == "__main__":
    main()
