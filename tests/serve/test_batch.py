"""`twofold batch`: what a server would answer, in files that can be continued."""

import json
import re

import pytest

import twofold
from twofold.infer import Request
from twofold.serve.batch import Batches, batch_app, seeded
from twofold.serve.batch_files import BatchLine
from twofold.serve.batch_journal import BatchJournal

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def pair(tmp_path, text_model):
    twofold.save(text_model(), tmp_path / "pair")
    return tmp_path / "pair"


def asking(number, url="/v1/completions", **body):
    body = {"prompt": f"some text {number}", "max_tokens": 6, "temperature": 0} | body
    if url != "/v1/completions":
        body.pop("prompt")
        body = {"messages": CHAT} | body if "chat" in url else {"input": ["one", "two"]}
    return {"custom_id": f"id {number}", "method": "POST", "url": url, "body": body}


LINES = [
    asking(1),
    asking(2, "/v1/chat/completions"),
    asking(3, "/v1/embeddings"),
    asking(4, prompt="long " * 100),
    asking(5, model="other"),
    asking(6, temperature=1.5),
    asking(7, n=2, temperature=1.5, model="pair"),
    {"custom_id": "id 8"},
    asking(9, temperature=1.5, seed=5),
]


@pytest.fixture
def inputs(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def records(path):
    return {record["custom_id"]: record for record in map(json.loads, path.read_text().splitlines())}


def texts(path):
    """Of the answers, by id: all but what names the moment."""
    return {
        name: [choice.get("text") or choice["message"]["content"] for choice in body["choices"]]
        for name, body in ((name, record["response"]["body"]) for name, record in records(path).items())
        if "choices" in body
    }


def test_lines_get_what_a_server_answers(run, pair, inputs, tmp_path):
    out, errors = tmp_path / "out.jsonl", tmp_path / "out.errors.jsonl"
    status, printed, err = run("batch", pair, inputs, "-o", out, "--json")
    assert status == 1
    answered, failed = records(out), records(errors)
    assert list(answered) == [f"id {number}" for number in (1, 2, 3, 6, 7, 9)]
    assert list(failed) == [f"id {number}" for number in (4, 5, 8)]

    engine = twofold.Engine(twofold.load(pair), device="cpu")
    plain, chat = engine.generate(["some text 1", CHAT], max_new_tokens=6)
    found = texts(out)
    assert found["id 1"] == [plain.text]
    assert found["id 2"] == [chat.text]
    assert len(found["id 7"]) == 2
    embedded = answered["id 3"]["response"]["body"]["data"]
    assert embedded[1]["embedding"] == pytest.approx(engine.embed(["one", "two"])[1].tolist(), abs=1e-6)
    assert answered["id 1"]["response"]["status_code"] == 200
    assert answered["id 1"]["response"]["request_id"]

    assert failed["id 4"]["response"]["status_code"] == 400
    assert "tokens" in failed["id 4"]["response"]["body"]["error"]["message"]
    assert failed["id 5"]["response"]["status_code"] == 404
    assert failed["id 8"]["error"]["code"] == "invalid_line"
    for number in (4, 5, 8):
        assert f"line {number} failed: " in err
    summary = json.loads(printed)
    n_tokens = sum(r["response"]["body"]["usage"].get("completion_tokens", 0) for r in answered.values())
    assert n_tokens > 20
    assert {name: summary[name] for name in ("lines", "failed", "resumed_after", "tokens", "out", "errors")} == {
        "lines": 9, "failed": 3, "resumed_after": 0, "tokens": n_tokens, "out": str(out), "errors": str(errors),
    }  # fmt: skip


def test_stopped_and_resumed_it_answers_the_same(run, pair, inputs, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run("batch", pair, inputs, "-o", whole)[0] == 1
    write = BatchJournal.write

    def interrupted(journal, outcome):
        if outcome.line.number == 6:
            raise KeyboardInterrupt
        write(journal, outcome)

    with monkeypatch.context() as patch:
        patch.setattr(BatchJournal, "write", interrupted)
        status, _, err = run("batch", pair, inputs, "-o", out)
    assert status == 130
    assert f"{out} has the answers to the first 5 lines; go on with: twofold batch {pair}" in err
    status, _, err = run("batch", pair, inputs, "-o", out)
    assert status == 2
    assert "exists; continue it with resume (--resume)" in err
    status, printed, err = run("batch", pair, inputs, "-o", out, "--resume", "--batch-size", "3", "--json")
    assert status == 1
    assert "going on after line 5" in err
    assert json.loads(printed)["resumed_after"] == 5
    assert texts(out) == texts(whole)
    assert list(records(out)) == list(records(whole))
    errors = (tmp_path / f"{name}.errors.jsonl" for name in ("out", "whole"))
    assert [list(records(path)) for path in errors] == [["id 4", "id 5", "id 8"]] * 2
    status, _, err = run("batch", pair, inputs, "-o", out, "--resume", "--seed", "1")
    assert status == 2
    assert "seed was 0, now 1" in err


def test_strict_stops_before_the_first_line_that_fails(run, pair, inputs, tmp_path):
    out = tmp_path / "out.jsonl"
    status, _, err = run("batch", pair, inputs, "-o", out, "--strict", "--name", "other")
    assert status == 2
    assert "line 4: status 400" in err
    assert list(records(out)) == ["id 1", "id 2", "id 3"]
    lines = [json.loads(line) for line in inputs.read_text().splitlines()]
    lines[3] = asking(4)
    inputs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, _, err = run("batch", pair, inputs, "-o", out, "--strict", "--name", "other", "--resume")
    assert "line 7: status 404" in err  # 5 calls the model by its name
    assert list(records(out)) == [f"id {number}" for number in range(1, 7)]


def test_a_model_that_fails_ends_the_run(run, pair, tmp_path, monkeypatch):
    """After some lines; what a single line breaks is noted, and the others are answered."""
    inputs, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    inputs.write_text(
        "".join(json.dumps(asking(number, max_tokens=number)) + "\n" for number in range(1, 41))
    )
    submit = twofold.Engine.submit

    def failing(engine, request):
        if request.max_new_tokens == 3 or request.max_new_tokens > 20:
            raise MemoryError("no memory left")
        return submit(engine, request)

    with monkeypatch.context() as patch:
        patch.setattr(twofold.Engine, "submit", failing)
        status, _, err = run("batch", pair, inputs, "-o", out)
    assert status == 2
    assert "10 lines in a row, up to 30, failed through no fault of theirs: status 500" in err
    assert "has the answers to the first 29 lines" in err
    assert list(records(tmp_path / "out.errors.jsonl")) == [f"id {n}" for n in (3, *range(21, 30))]
    assert list(records(out)) == [f"id {n}" for n in range(1, 21) if n != 3]


@pytest.mark.parametrize("bytes_left", [900, 1700])
def test_a_full_disk_ends_the_run_and_room_continues_it(
    run, pair, inputs, tmp_path, full_disk_after, bytes_left
):
    """In the middle of a line."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run("batch", pair, inputs, "-o", whole, "--backend", "torch")[0] == 1
    with full_disk_after(bytes_left):
        status, _, err = run("batch", pair, inputs, "-o", out, "--backend", "torch")
    assert status == 2
    assert "File too large" in err
    assert str(out) in err
    n_lines = int(re.search(r"has the answers to the first (\d+) lines; go on with: twofold batch", err)[1])
    assert 0 < n_lines < len(LINES)
    assert out.stat().st_size <= bytes_left
    status, _, err = run("batch", pair, inputs, "-o", out, "--backend", "torch", "--resume")
    assert status == 1
    assert f"going on after line {n_lines}" in err
    assert texts(out) == texts(whole)
    assert list(records(out)) == list(records(whole))


def test_lines_without_a_seed_get_their_own():
    line = BatchLine(number=3, url="/v1/completions", body={"prompt": "p"})
    assert seeded(line, 7) == {"prompt": "p", "seed": 7 + 3 * 2**20}
    assert line.body == {"prompt": "p"}
    for body in ({"seed": 0}, {"seed": 4}):
        assert seeded(BatchLine(number=3, url="/v1/completions", body=body), 7) == body
    assert seeded(BatchLine(number=3, url="/v1/embeddings", body={"input": "a"}), 7) == {"input": "a"}


def test_a_window_of_lines_is_open_at_most(text_model):
    engine = twofold.Engine(text_model(), device="cpu", batch_size=2)
    app = batch_app("pair", engine)
    taken = []

    def lines():
        for number in range(1, 601):
            taken.append(number)
            yield BatchLine(number=number, url="/v1/completions", body={"prompt": "p", "max_tokens": 9})

    batches = Batches(app)
    answers = batches.answer(lines())
    assert [next(answers).line.number for _ in range(3)] == [1, 2, 3]
    assert len(taken) == 258
    answers.close()
    assert app.state.service.n_open == 0
    answered = app.state.service.metrics.requests.labels("/v1/completions", "200")
    assert answered._value.get() < 50  # the others were given up
    assert engine.submit(Request(prompt="p", max_new_tokens=1)).result()
    batches.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(Request(prompt="p"))
