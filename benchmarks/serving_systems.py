"""The systems of the serving benchmark, each started once and offered one load after another."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from inference_cases import Arrival
from serving_client import Address, Reply, offer, post
from serving_engine import offer_in_process, open_engine, prompts

START_S = 300.0
_HERE = Path(__file__).parent

NAMES = ("server", "engine", "transformers", "transformers_batched")
"""`twofold serve`; the engine from Python; `generate` of transformers behind the same API, one request at a time, and
in static batches."""


class System(Protocol):
    """Something that answers."""

    def offer(self, arrivals: Sequence[Arrival]) -> list[Reply]:
        """A reply for each."""
        ...

    def close(self) -> None:
        """Let go of processor and memory."""
        ...


def open_system(name: str, spec: dict[str, Any]) -> System:
    """Start a system and wait until it is ready.

    Args:
        name: one of `NAMES`.
        spec: `pair`, a folder; `vocab_size`, `precision`, `rows`, `threads`; `apart`: in a process of its own. In
            this one, small models are ready sooner.
    """
    if name == "engine":
        return EngineApart(spec) if spec["apart"] else EngineHere(spec)
    return Http(ServerApart(name, spec) if spec["apart"] else ServerHere(name, spec), spec["vocab_size"])


def completion(prompt: Sequence[int], new: int) -> bytes:
    """What is sent for one arrival: greedy, exactly so many tokens, as a stream."""
    body = {
        "prompt": list(prompt),
        "max_tokens": new,
        "temperature": 0.0,
        "stop_token_ids": [],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return post("/v1/completions", body)


class Server(Protocol):
    """Something that listens."""

    address: Address
    pid: int

    def close(self) -> None:
        """Stop it."""
        ...


class Http:
    """A server and its clients."""

    def __init__(self, server: Server, vocab_size: int) -> None:
        self.server = server
        self._vocab_size = vocab_size

    def offer(self, arrivals: Sequence[Arrival]) -> list[Reply]:
        """See `System`."""
        sources = prompts(arrivals, self._vocab_size)
        requests = [completion(ids, one.new) for ids, one in zip(sources, arrivals, strict=True)]
        return asyncio.run(offer(self.server.address, arrivals, requests))

    def close(self) -> None:
        """See `System`."""
        self.server.close()


class ServerApart:
    """In a process of its own."""

    def __init__(self, name: str, spec: dict[str, Any]) -> None:
        self.address = Address(free_port())
        common = ["--port", str(self.address.port), "--precision", spec["precision"]]
        common += ["--threads", str(spec["threads"])]
        if name == "server":
            command = ["-m", "twofold.cli", "serve", spec["pair"], *common, "--batch-size", str(spec["rows"])]
        else:
            rows = spec["rows"] if name == "transformers_batched" else 1
            command = [str(_HERE / "serving_peer.py"), spec["pair"], *common, "--rows", str(rows)]
        threads = {"OMP_NUM_THREADS": str(spec["threads"])}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | threads,
        )
        self.pid = self._process.pid
        wait_until_ready(self.address, lambda: self._process.poll() is None)

    def close(self) -> None:
        """See `Server`."""
        self._process.kill()
        self._process.wait()


class ServerHere:
    """In a thread of this process."""

    def __init__(self, name: str, spec: dict[str, Any]) -> None:
        import uvicorn

        self.address, self.pid = Address(free_port()), os.getpid()
        # log_config=None: uvicorn would close all handlers of the process, and absl its stream with them.
        config = uvicorn.Config(
            _app(name, spec), port=self.address.port, log_config=None, log_level="critical"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_until_ready(self.address, self._thread.is_alive)

    def close(self) -> None:
        """See `Server`."""
        self._server.should_exit = True
        self._thread.join(START_S)


class EngineHere:
    """In this process."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._engine = open_engine(spec)
        self._vocab_size = spec["vocab_size"]

    def offer(self, arrivals: Sequence[Arrival]) -> list[Reply]:
        """See `System`."""
        return offer_in_process(self._engine, arrivals, prompts(arrivals, self._vocab_size))

    def close(self) -> None:
        """See `System`."""
        self._engine.close(cancel=True)


class EngineApart:
    """In a process of its own."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(_HERE / "serving_engine.py"), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(spec["threads"])},
        )
        self._answer()

    def offer(self, arrivals: Sequence[Arrival]) -> list[Reply]:
        """See `System`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(arrivals) + "\n")
        self._process.stdin.flush()
        return [Reply(**fields) for fields in self._answer()]

    def close(self) -> None:
        """See `System`."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine's process ended with status {self._process.wait()}")
        return json.loads(line)


def _app(name: str, spec: dict[str, Any]) -> Any:
    if name == "server":
        from twofold.serve import create_app

        return create_app({"model": open_engine(spec)})
    from serving_peer import create_peer

    rows = spec["rows"] if name == "transformers_batched" else 1
    return create_peer(Path(spec["pair"]), spec["precision"], rows=rows)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(address: Address, is_alive: Any) -> None:
    """Poll /ready.

    Raises:
        RuntimeError: it ended, or took too long.
    """
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(f"http://{address.host}:{address.port}/ready", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if not is_alive() or time.monotonic() > deadline:
                raise RuntimeError(
                    f"the server on port {address.port} does not get ready: {error}"
                ) from error
            time.sleep(0.1)
