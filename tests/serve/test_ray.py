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
from twofold.serve import ray_batch
from twofold.serve.opening import EngineOptions
from twofold.serve.ray_serve import application

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


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_batch_goes_on_on_a_cluster(cluster, run, saved_pair, tmp_path, monkeypatch):
    """Begun by one process and resumed by two workers, it has the answers of one process, in their order."""
    monkeypatch.setattr(ray_batch, "LINES_TOGETHER", 3)
    raw = [asking(number) for number in range(1, 21)]
    raw[4], raw[9] = b"{\n", asking(10).replace(b'"text 10"', b"7")
    inputs = tmp_path / "in.jsonl"
    inputs.write_bytes(b"".join(raw))
    command = ["batch", saved_pair, inputs, "--seed", 3]
    assert run(*command, "-o", tmp_path / "whole.jsonl")[0] == 1
    for part in ("", ".errors"):
        lines = (tmp_path / f"whole{part}.jsonl").read_bytes().splitlines(keepends=True)
        (tmp_path / f"out{part}.jsonl").write_bytes(b"".join(lines[:3] if not part else lines[:0]))
    settings = (tmp_path / "whole.jsonl.settings.json").read_bytes()
    (tmp_path / "out.jsonl.settings.json").write_bytes(settings)
    status, printed, err = run(*command, "-o", tmp_path / "out.jsonl", "--resume", "--ray", 2, "--json")
    assert status == 1, err
    assert json.loads(printed)["resumed_after"] == 3
    whole, found = records(tmp_path / "whole.jsonl"), records(tmp_path / "out.jsonl")
    assert [record["custom_id"] for record in found] == [record["custom_id"] for record in whole]
    for ours, theirs in zip(found, whole, strict=True):
        assert ours["response"]["body"]["choices"] == theirs["response"]["body"]["choices"]
    whole, found = records(tmp_path / "whole.errors.jsonl"), records(tmp_path / "out.errors.jsonl")
    assert [record["id"] for record in found] == ["batch_req_5", "batch_req_10"]
    assert found[0] == whole[0]
    assert found[1]["response"]["body"] == whole[1]["response"]["body"]


def test_workers_need_room(cluster):
    options = EngineOptions(model="pair", threads=1)
    with pytest.raises(ValueError, match=r"5 workers with 1 CPUs each need 5, the cluster has 4"):
        next(ray_batch.answer_on_ray("pair", options, iter(()), n_workers=5))


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
    with pytest.raises(
        ValueError, match=r"modell: Extra inputs are not permitted; arguments are model, name"
    ):
        application({"model": "pair", "modell": "x"})
    with pytest.raises(ValueError, match="num_replicas: Input should be greater than or equal to 1"):
        application({"model": "pair", "num_replicas": "0"})
