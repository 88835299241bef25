"""Files and texts through `twofold generate`; what the answers are is tested in tests/infer."""

import io
import json
import os
import pty
import subprocess
import sys
from contextlib import suppress
from itertools import islice

import pytest

import twofold
from twofold.infer import Request, Sampling
from twofold.infer.files import answer_lines, read_lines


@pytest.fixture
def pair(tmp_path, text_model):
    twofold.save(text_model(), tmp_path / "pair")
    return tmp_path / "pair"


@pytest.fixture
def inputs(tmp_path):
    """Nine lines, of which the fourth is no JSON, the sixth is empty and the eighth too long."""
    rows = [{"text": "some text " * number, "id": f"id {number}"} for number in range(1, 8)]
    lines = [json.dumps(row) for row in rows]
    lines[3], lines[5] = "{", ""
    lines += [
        json.dumps({"text": "long " * 100}),
        json.dumps({"messages": [{"role": "user", "content": "hi"}]}),
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


SAMPLED = ["--max-new-tokens", "5", "--temperature", "1.5", "--seed", "7"]


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def test_every_line_is_answered_in_its_place(run, pair, inputs, tmp_path):
    path = tmp_path / "out.jsonl"
    status, out, err = run(
        "generate", pair, "-f", inputs, "-o", path, *SAMPLED, "--json", "--batch-size", "2"
    )
    assert status == 1
    template = Request(prompt="", max_new_tokens=5, sampling=Sampling(temperature=1.5, seed=7))
    engine = twofold.Engine(twofold.load(pair), device="cpu")
    with open(inputs, "rb") as raw:
        expected = [answer.to_json() for answer in answer_lines(engine, read_lines(raw), template)]
    found = records(path.read_text())
    assert found == expected
    assert [r["line"] for r in found if "error" in r] == [4, 6, 8]
    for number in (4, 6, 8):
        assert f"line {number} skipped:" in err
    summary = json.loads(out)
    n_tokens = sum(len(record.get("token_ids", ())) for record in found)
    assert {name: summary[name] for name in ("lines", "skipped", "resumed_after", "tokens", "out")} == {
        "lines": 9, "skipped": 3, "resumed_after": 0, "tokens": n_tokens, "out": str(path),
    }  # fmt: skip
    status, _, err = run("generate", "nowhere", "-f", inputs, "-o", path)
    assert status == 2
    assert "exists; continue it with resume (--resume)" in err


@pytest.mark.parametrize("n_done", [0, 3, 7])
def test_interrupted_and_resumed_it_is_the_same(run, pair, inputs, tmp_path, monkeypatch, n_done):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run("generate", pair, "-f", inputs, "-o", whole, *SAMPLED)[0] == 1
    command = ["generate", pair, "-f", inputs, "-o", path, *SAMPLED]

    def interrupted(*arguments, **options):
        yield from islice(answer_lines(*arguments, **options), n_done)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("twofold.cli.generate.answer_lines", interrupted)
        status, _, err = run(*command)
    assert status == 130
    assert f"has the answers to the first {n_done} lines; go on with: twofold generate {pair}" in err
    assert err.rstrip().endswith("--resume")
    with open(path, "ab") as half:
        half.write(b'{"line": ')
    status, _, err = run(*command, "--resume", "--batch-size", "3")
    assert status == 1
    assert path.read_bytes() == whole.read_bytes()
    assert ("going on after line" in err) == (n_done > 0)
    status, out, _ = run(*command, "--resume", "--json")
    assert status == 1  # lines that were skipped before count as well
    assert json.loads(out)["resumed_after"] == 9
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (["--top-k", "3"], "top_k was None, now 3"),
        (["--stop", "x", "--stop", "y"], "stop was [], now ['x', 'y']"),
        (["--chat"], "chat was False, now True"),
    ],
)
def test_other_settings_do_not_continue_a_file(run, pair, inputs, tmp_path, changes, match):
    path = tmp_path / "out.jsonl"
    run("generate", pair, "-f", inputs, "-o", path, *SAMPLED)
    before = path.read_bytes()
    status, _, err = run("generate", pair, "-f", inputs, "-o", path, *SAMPLED, *changes, "--resume")
    assert status == 2
    assert match in err
    assert path.read_bytes() == before


def test_other_weights_do_not_continue_a_file(run, pair, inputs, tmp_path):
    path = tmp_path / "out.jsonl"
    run("generate", pair, "-f", inputs, "-o", path, *SAMPLED)
    model = twofold.load(pair)
    model.lm_head.out_proj.weight.data[0] += 1
    for file in pair.iterdir():
        file.unlink()
    pair.rmdir()
    twofold.save(model, pair)
    status, _, err = run("generate", pair, "-f", inputs, "-o", path, *SAMPLED, "--resume")
    assert status == 2
    assert "weights was" in err


def test_strict_stops_at_the_first_bad_line_and_goes_on_once_it_is_mended(run, pair, inputs, tmp_path):
    path = tmp_path / "out.jsonl"
    command = ["generate", pair, "-f", inputs, "-o", path, *SAMPLED, "--strict"]
    status, _, err = run(*command)
    assert status == 2
    assert "line 4: not JSON" in err
    assert "has the answers to the first 3 lines" in err
    assert [record["line"] for record in records(path.read_text())] == [1, 2, 3]
    lines = inputs.read_text().splitlines()
    good = '{"text": "mended"}'
    inputs.write_text("\n".join([*lines[:3], good, lines[4], good, lines[6]]) + "\n")
    assert run(*command, "--resume")[0] == 0
    assert [record["line"] for record in records(path.read_text())] == list(range(1, 8))


def test_from_standard_input_to_standard_output(run, pair, monkeypatch):
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "one", "id": 5}\n{"text": "two"}\n'))
    )
    status, out, err = run("generate", pair, "-f", "-", "--max-new-tokens", "3")
    assert status == 0, err
    assert [(record["line"], record.get("id")) for record in records(out)] == [(1, 5), (2, None)]


OPTIONS = {
    "top_k": 2,
    "top_p": 0.3,
    "min_p": 0.9,
    "repetition_penalty": 5.0,
    "frequency_penalty": -9.0,
    "presence_penalty": -9.0,
    "seed": 3,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_sampling_options_reach_the_request(run, pair, name):
    common = {"temperature": 1.2}
    option = [f"--{name.replace('_', '-')}", OPTIONS[name]]
    command = ["generate", pair, "hello", "--json", "--max-new-tokens", "12", "--temperature", "1.2"]
    status, out, err = run(*command, *option)
    assert status == 0, err
    engine = twofold.Engine(twofold.load(pair), device="cpu")
    with_it, without = (
        engine.generate(["hello"], max_new_tokens=12, **common, **options)[0]
        for options in ({name: OPTIONS[name]}, {})
    )
    assert with_it != without  # else it would tell nothing
    assert records(out)[0] == {"line": 1, **with_it.to_json()}


def test_other_options_reach_the_request(run, pair):
    engine = twofold.Engine(twofold.load(pair), device="cpu")
    sampling = Sampling(temperature=1.2)
    free = engine.generate(["hello"], max_new_tokens=12, temperature=1.2)[0].text
    stop = next(char for char in free[2:] if char.isascii() and char.isprintable() and char not in "- ")
    status, out, err = run(
        "generate", pair, "hello", "--json", "--max-new-tokens", "12", "--temperature", "1.2", "-n", "2",
        "--stop", "never there", "--stop", stop, "--logprobs", "1",
    )  # fmt: skip
    assert status == 0, err
    request = Request(
        prompt="hello", max_new_tokens=12, sampling=sampling, n=2, stop=("never there", stop), logprobs=1
    )
    answers = records(out)[0]["answers"]
    assert answers == [c.to_json() for c in engine.submit(request).result()]
    assert len(answers[0]["text"]) < len(free)
    options = "--num-beams 3 -n 2 --length-penalty 0.5 --max-new-tokens 4 --chat --json"
    status, out, err = run("generate", pair, "hello", *options.split())
    assert status == 0, err
    chat = [{"role": "user", "content": "hello"}]
    request = Request(prompt=chat, max_new_tokens=4, n=2, num_beams=3, length_penalty=0.5)
    assert records(out)[0]["answers"] == [c.to_json() for c in engine.submit(request).result()]


def test_answers_by_schema_and_pattern(run, pair, inputs, tmp_path):
    pytest.importorskip("xgrammar", reason='needs the extra "grammar"')
    schema, path = tmp_path / "schema.json", tmp_path / "out.jsonl"
    schema.write_text('{"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3}')
    command = ["generate", pair, "-f", inputs, "-o", path, *SAMPLED, "--max-new-tokens", "30"]
    assert run(*command, "--json-schema", schema)[0] == 1
    for record in records(path.read_text()):
        if "error" not in record:
            found = json.loads(record["text"])
            assert 1 <= len(found) <= 3
            assert set(found) <= {"a", "b"}
    status, _, err = run(*command, "--regex", "a+", "--resume")
    assert status == 2
    assert "json_schema was '{" in err
    assert "regex was None, now 'a+'" in err
    status, out, _ = run("generate", pair, "hello", "--regex", "(yes|no)!")
    assert status == 0
    assert out.strip() in ("yes!", "no!")
    status, _, err = run("generate", pair, "hello", "--regex", "a", "--json-schema", schema)
    assert status == 2
    assert "give one of them" in err


def test_texts_are_printed_as_they_are(run, pair, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    status, out, _ = run("generate", pair, "hello", "you", "--max-new-tokens", "40")
    assert status == 0
    found = twofold.Engine(twofold.load(pair), device="cpu").generate(["hello", "you"], max_new_tokens=40)
    assert out == "".join(completion.text + "\n" for completion in found)


def test_one_text_is_streamed_to_a_terminal(pair):
    """In a process of its own, whose standard output is a terminal."""
    ours, theirs = pty.openpty()
    code = "from twofold.cli import main; main()"
    command = [sys.executable, "-c", code, "generate", str(pair), "hello", "--max-new-tokens", "20"]
    result = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    assert result.returncode == 0, result.stderr
    written = b""
    with suppress(OSError):  # where everything is read, and nobody writes any more
        while read := os.read(ours, 10_000):
            written += read
    os.close(ours)
    written = written.removesuffix(b"\x1b[0m")  # of colorama, which PyTorch starts where it is installed
    completion = twofold.Engine(twofold.load(pair), device="cpu").generate(["hello"], max_new_tokens=20)[0]
    assert written.replace(b"\r\n", b"\n").decode() == completion.text + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a text", "-f", "in.jsonl"], "exactly one of them"),
        (["a text", "--resume"], "name it with --out"),
        (["a text", "-n", "2"], "n=2 greedy answers"),
        (["a text", "--max-new-tokens", "256"], "max_position_embeddings of 256"),
        (["a text", "--num-beams", "9"], "9"),
        (["a text", "--top-p", "2"], "top_p"),
        (["", "--json"], "line 1: the source is empty"),
        (["-f", "nothing.jsonl"], "nothing.jsonl"),
    ],
)
def test_what_cannot_run_writes_nothing(run, pair, tmp_path, monkeypatch, arguments, message):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    status, out, err = run("generate", pair, *arguments)
    assert status == 2
    assert message in " ".join(err.split())
    assert out == ""
    assert list(folder.iterdir()) == []


def test_engine_options_reach_the_engine(run, pair, monkeypatch):
    from twofold.cli import generate as generate_module

    got = {}

    def noting(model, **options):
        got.update(options)
        return twofold.Engine(model, **options)

    monkeypatch.setattr(generate_module, "Engine", noting)
    options = "--backend torch --precision bfloat16 --threads 1 --batch-size 3 --lookup 4"
    status, out, err = run("generate", pair, "hello", "--max-new-tokens", "4", "--json", *options.split())
    assert status == 0, err
    assert got == {"backend": "torch", "precision": "bfloat16", "threads": 1, "batch_size": 3}
    assert len(records(out)[0]["token_ids"]) == 4
    for option, message in (
        ("--backend", "unknown backend 'fast'"),
        ("--precision", "unknown precision 'fast'"),
    ):
        status, _, err = run("generate", pair, "hello", option, "fast")
        assert status == 2
        assert message in err
