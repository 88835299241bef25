"""Several workers on a Ray cluster, which here is this machine: batches by Ray Data, replicas by Ray Serve."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

import twofold
from twofold.serve.batch import Batches, batch_app
from twofold.serve.batch_files import read_batch_lines
from twofold.serve.opening import EngineOptions

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


def asking(number):
    row = {"custom_id": f"id {number}", "method": "POST", "url": "/v1/completions"}
    body = {"prompt": f"text {number}", "max_tokens": 1 + number % 4, "temperature": 1.2}
    return json.dumps(row | {"body": body}).encode() + b"\n"


def test_batches_keep_their_order(cluster, saved_pair, monkeypatch):
    from twofold.serve import ray_batch

    monkeypatch.setattr(ray_batch, "LINES_TOGETHER", 3)
    raw = [asking(number) for number in range(1, 21)]
    raw[4], raw[9] = b"{\n", asking(10).replace(b'"text 10"', b"7")
    options = EngineOptions(model=str(saved_pair), threads=1, batch_size=4)
    batches = Batches(batch_app("pair", options.engine()), seed=3)
    expected = list(batches.answer(read_batch_lines(raw)))
    batches.close()
    found = list(ray_batch.answer_on_ray("pair", options, read_batch_lines(raw), n_workers=2, seed=3))
    assert [outcome.line.custom_id for outcome in found] == [outcome.line.custom_id for outcome in expected]
    assert [outcome.status_code for outcome in found] == [outcome.status_code for outcome in expected]
    assert [outcome.status_code for outcome in found if not outcome.is_ok] == [None, 400]
    for ours, theirs in zip(found, expected, strict=True):
        if ours.is_ok:
            assert ours.body["choices"] == theirs.body["choices"]
    with pytest.raises(ValueError, match=r"5 workers with 1 CPUs each need 5, the cluster has 4"):
        list(ray_batch.answer_on_ray("pair", options, iter(()), n_workers=5))


GREEDY = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address(cluster, saved_pair, port):
    """Of two replicas; deployed once for all tests that only ask."""
    from ray import serve

    from twofold.serve.ray_serve import application

    serve.start(http_options={"host": "127.0.0.1", "port": port})
    deploy(application({"model": str(saved_pair), "num_replicas": "2"}))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def deploy(app):
    from ray import serve

    serve.run(app, name="twofold", route_prefix="/", logging_config={"log_level": "ERROR"})


def post(address, path, body):
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=60)


def text_of(address, prompt, *, stream):
    """The whole answer."""
    with post(address, "/v1/completions", {"prompt": prompt, "stream": stream, **GREEDY}) as response:
        if not stream:
            return json.load(response)["choices"][0]["text"]
        events = [line.removeprefix(b"data: ") for line in response.read().splitlines() if line]
    assert events[-1] == b"[DONE]"
    return "".join(choice["text"] for event in events[:-1] for choice in json.loads(event)["choices"])


@pytest.fixture(scope="module")
def greedy(saved_pair):
    prompts = [f"prompt {number}" for number in range(8)]
    answers = twofold.Engine(twofold.load(saved_pair), device="cpu").generate(prompts, max_new_tokens=12)
    return {prompt: answer.text for prompt, answer in zip(prompts, answers, strict=True)}


def births(address):
    """When each replica began to count, which tells them apart."""
    found = set()
    for _ in range(20):
        with urllib.request.urlopen(address + "/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        found |= {line for line in lines if line.startswith("twofold_new_tokens_created")}
    return found


def test_two_replicas_answer(address, greedy):
    with ThreadPoolExecutor(8) as pool:
        for stream in (False, True):
            found = pool.map(lambda prompt: text_of(address, prompt, stream=stream), greedy)  # noqa: B023
            assert list(found) == list(greedy.values())
    assert len(births(address)) == 2
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(address, "/v1/completions", {"prompt": 7})
    assert refused.value.code == 400
    assert "prompt" in json.load(refused.value)["error"]["message"]


def test_streams_flow(address):
    """What a replica writes is passed on at once."""
    started = time.monotonic()
    body = {"prompt": "p", "stream": True, **GREEDY, "max_tokens": 200, "stop_token_ids": []}
    with post(address, "/v1/completions", body) as response:
        times = [time.monotonic() - started for line in response if line.startswith(b"data: {")]
    assert len(times) > 50
    assert times[0] < 0.7 * times[-1]


@pytest.mark.slow
def test_a_redeployment_loses_no_request(address, saved_pair, greedy):
    from twofold.serve.ray_serve import application

    is_over, before = threading.Event(), births(address)

    def ask(number):
        """One after another; returns how many were answered, all of them as they should be."""
        prompts, n = list(greedy), 0
        while not is_over.is_set():
            prompt = prompts[(number + n) % len(prompts)]
            assert text_of(address, prompt, stream=n % 2 == 0) == greedy[prompt]
            n += 1
        return n

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, number) for number in range(4)]
        try:
            deploy(application({"model": str(saved_pair), "num_replicas": 2, "batch_size": 5}))
        finally:
            is_over.set()
        assert min(future.result() for future in asking) > 2
    assert not births(address) & before


def test_arguments_are_checked():
    from twofold.serve.ray_serve import application

    with pytest.raises(
        ValueError, match=r"modell: Extra inputs are not permitted; arguments are model, name"
    ):
        application({"model": "pair", "modell": "x"})
    with pytest.raises(ValueError, match="num_replicas: Input should be greater than or equal to 1"):
        application({"model": "pair", "num_replicas": "0"})
