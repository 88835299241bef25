import json
from dataclasses import replace

import pytest
import torch

from tests.models.tiny import build, pair_config, stack
from twofold.infer import Completion
from twofold.infer.files import Answer, Line
from twofold.infer.journal import Journal, fingerprint, settings_path

SETTINGS = {"model": "pair", "stop": ("a", "b"), "temperature": 0.5}
LINES = [Line(number=number, prompt="p", id=f"id {number}", n_bytes=10 * number) for number in range(1, 6)]


def answer(line):
    if line.number == 2:
        return Answer(line=line, error="no ☃ good")
    completion = Completion(
        text=f"ä{line.number}", token_ids=(1, 2), finish_reason="stop", num_source_tokens=3
    )
    return Answer(line=line, completions=(completion,))


def run(path, n, *, settings=SETTINGS, lines=LINES, resume=False):
    """Takes the next `n` lines; returns the journal."""
    rest = iter(lines)
    with Journal(path, settings, rest, resume=resume) as journal:
        for _, line in zip(range(n), rest, strict=False):
            journal.write(answer(line))
    return journal


@pytest.fixture
def whole(tmp_path):
    run(tmp_path / "whole.jsonl", 5)
    return (tmp_path / "whole.jsonl").read_bytes()


def test_what_is_written(tmp_path, whole):
    records = [json.loads(line) for line in whole.decode().splitlines()]
    assert records[0] == {
        "line": 1,
        "id": "id 1",
        "text": "ä1",
        "token_ids": [1, 2],
        "finish_reason": "stop",
        "num_source_tokens": 3,
    }
    assert records[1] == {"line": 2, "id": "id 2", "error": "no ☃ good"}
    assert json.loads((tmp_path / "whole.jsonl.settings.json").read_text()) == {
        **SETTINGS,
        "stop": ["a", "b"],
    }


def test_a_line_is_in_the_file_once_it_is_written(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    with Journal(path, SETTINGS, iter(LINES), resume=False) as journal:
        journal.write(answer(LINES[0]))
        assert path.read_bytes().endswith(b"}\n")


def test_cut_anywhere_and_resumed_it_is_the_same(tmp_path, whole):
    """At every byte, as if the machine had gone down there."""
    path = tmp_path / "out.jsonl"
    run(path, 0)
    for n_bytes in range(len(whole) + 1):
        path.write_bytes(whole[:n_bytes])
        journal = run(path, 5, resume=True)
        assert path.read_bytes() == whole, n_bytes
        assert (journal.n_lines, journal.n_errors) == (5, 1)
        n_done = whole[:n_bytes].count(b"\n")
        assert journal.n_input_bytes == sum(10 * number for number in range(1, n_done + 1))


def test_a_full_disk_is_named_and_room_continues_it(tmp_path, whole, full_disk_after):
    """In the middle of line 3, and again at closing."""
    path = tmp_path / "out.jsonl"
    n_bytes = whole.index(b"id 3")
    with full_disk_after(n_bytes), pytest.raises(OSError, match=r"File too large: .*out\.jsonl"):
        run(path, 5)
    assert path.read_bytes() == whole[:n_bytes]
    run(path, 5, resume=True)
    assert path.read_bytes() == whole


def test_resume_without_a_file_starts_it(tmp_path, whole):
    path = tmp_path / "out.jsonl"
    settings_path(path).write_text("left by a file that was removed")
    run(path, 5, resume=True)
    assert path.read_bytes() == whole


def test_an_input_that_grew_is_continued(tmp_path, whole):
    path = tmp_path / "out.jsonl"
    run(path, 5, lines=LINES[:3])
    run(path, 5, resume=True)
    assert path.read_bytes() == whole


def refused(path, error, match, **options):
    before = path.read_bytes()
    with pytest.raises(error, match=match):
        run(path, 5, **options)
    assert path.read_bytes() == before


def test_a_file_that_is_there_is_left_alone(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path, 3)
    refused(path, FileExistsError, r"out.jsonl exists; continue it with resume \(--resume\)")
    changed = {**SETTINGS, "temperature": 0.7, "top_k": 3}
    match = "other settings: temperature was 0.5, now 0.7; top_k was None, now 3. Resume with the same"
    refused(path, ValueError, match, settings=changed, resume=True)
    other = [replace(LINES[0], id=None), *LINES[1:]]
    refused(path, ValueError, "line 1 answers id 'id 1', and the input has None", lines=other, resume=True)
    refused(path, ValueError, "answers to more lines than the input's 2", lines=LINES[:2], resume=True)
    settings_path(path).write_text("{")
    refused(path, ValueError, "settings.json is not JSON", resume=True)
    settings_path(path).unlink()
    refused(path, FileNotFoundError, "settings.json is missing", resume=True)


@pytest.mark.parametrize("content", [b"text\n", b"[]\n", b'{"line": 2}\n', b'{"text": "other"}\n', b"\0\n"])
def test_a_file_that_holds_something_else_is_left_alone(tmp_path, content):
    path = tmp_path / "out.jsonl"
    run(path, 0)
    path.write_bytes(content)
    refused(path, ValueError, "line 1 is not the answer to line 1", resume=True)


def test_models_are_told_apart():
    config = pair_config(stack())
    model = build(config)
    mark = fingerprint(model)
    assert fingerprint(build(config)) == mark
    assert fingerprint(build(config, seed=1)) != mark
    assert fingerprint(build(pair_config(stack(rms_norm_eps=1e-5)))) != mark
    with torch.no_grad():
        model.decoder.embed_tokens.weight[0, 0] += 1e-3
    assert fingerprint(model) != mark
    assert fingerprint(build(config).bfloat16()) != mark
