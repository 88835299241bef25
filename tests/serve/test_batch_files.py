"""The lines of OpenAI's batch format, and files of outcomes that can be continued after any stop."""

import json
from itertools import islice

import pytest

from twofold.serve.batch_files import Outcome, read_batch_lines
from twofold.serve.batch_journal import BatchJournal

SETTINGS = {"model": "pair", "input": "in.jsonl"}


def asking(custom_id, **changes):
    row = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "p"}}
    return json.dumps(row | changes).encode() + b"\n"


INPUT = [asking(f"id {number}") for number in range(1, 9)]


def outcome(line):
    """Lines 3, 4 and 7 fail."""
    if line.number in (3, 4, 7):
        return Outcome(line=line, status_code=400, request_id="r", body={"error": {"message": "no ☃"}})
    body = {"text": "ä", "usage": {"prompt_tokens": 9, "completion_tokens": 2}}
    return Outcome(line=line, status_code=200, request_id=f"r{line.number}", body=body)


def run(folder, n=None, *, settings=SETTINGS, raw=INPUT, resume=False):
    """Takes the next `n` lines; returns the journal."""
    paths = folder / "out.jsonl", folder / "errors.jsonl"
    with BatchJournal(*paths, settings, read_batch_lines(raw), resume=resume) as journal:
        for line in islice(journal.rest, n):
            journal.write(outcome(line))
    return journal


def contents(folder):
    return (folder / "out.jsonl").read_bytes(), (folder / "errors.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("raw", "custom_id", "error"),
    [
        (asking("a", body={"prompt": "p", "stream": False}), "a", None),
        (b"\xef\xbb\xbf" + asking("a"), "a", None),
        (b"{\n", None, "not JSON in UTF-8"),
        (b"\n", None, "the line is empty"),
        (asking("a", method="GET"), "a", "method: Input should be 'POST'"),
        (asking("a", url="/v1/files"), "a", "url: Input should be '/v1/completions', '/v1/chat/completions' or"),
        (asking("a", body="text"), "a", "body: Input should be a valid dictionary"),
        (asking("a", extra=1), "a", "extra: Extra inputs are not permitted"),
        (asking(7), None, "custom_id: Input should be a valid string"),
        (asking(""), "", "custom_id: String should have at least 1 character"),
        (asking("a", body={"stream": True}), "a", "body.stream is true"),
    ],
)  # fmt: skip
def test_lines_are_checked(raw, custom_id, error):
    (line,) = read_batch_lines([raw])
    assert (line.number, line.custom_id, line.n_bytes) == (1, custom_id, len(raw))
    if error is None:
        assert (line.error, line.url, line.body["prompt"]) == (None, "/v1/completions", "p")
    else:
        assert error in line.error
        assert line.body is None


def test_ids_are_taken_once():
    lines = list(read_batch_lines([asking("a"), asking("b"), asking("a")]))
    assert [line.error is None for line in lines] == [True, True, False]
    assert "custom_id 'a' is that of line 1 already" in lines[2].error


def test_what_is_written(tmp_path):
    journal = run(tmp_path, raw=[*INPUT[:3], b"{\n"])
    answers, errors = ([json.loads(line) for line in part.splitlines()] for part in contents(tmp_path))
    assert answers[0] == {
        "id": "batch_req_1",
        "custom_id": "id 1",
        "response": {
            "status_code": 200,
            "request_id": "r1",
            "body": {"text": "ä", "usage": {"prompt_tokens": 9, "completion_tokens": 2}},
        },
        "error": None,
    }
    assert [record["custom_id"] for record in answers] == ["id 1", "id 2"]
    body = {"error": {"message": "no ☃"}}
    assert errors[0]["response"] == {"status_code": 400, "request_id": "r", "body": body}
    assert (journal.n_lines, journal.n_errors) == (4, 2)


def test_a_line_without_a_response_has_an_error(tmp_path):
    (line,) = read_batch_lines([b"{\n"])
    found = Outcome(line=line)
    assert found.to_json() == {
        "id": "batch_req_1",
        "custom_id": None,
        "response": None,
        "error": {"code": "invalid_line", "message": line.error},
    }
    assert found.error == line.error
    assert not found.is_ok


def test_the_file_of_errors_comes_with_the_first(tmp_path):
    run(tmp_path, 2)
    assert not (tmp_path / "errors.jsonl").exists()
    run(tmp_path, 1, resume=True)
    assert (tmp_path / "errors.jsonl").exists()


@pytest.mark.parametrize("n_done", range(9))
def test_resumed_it_is_the_same(tmp_path, n_done):
    for name in ("whole", "part"):
        (tmp_path / name).mkdir()
    run(tmp_path / "whole")
    run(tmp_path / "part", n_done)
    for path in tmp_path.glob("part/*.jsonl"):
        with open(path, "ab") as half:
            half.write(b'{"id": "batch_req_')
    journal = run(tmp_path / "part", resume=True)
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")
    assert (journal.n_lines, journal.n_errors) == (8, 3)
    assert journal.n_input_bytes == sum(map(len, INPUT[:n_done]))


@pytest.mark.parametrize("file", ["out.jsonl", "errors.jsonl"])
@pytest.mark.parametrize("n_lost", [1, 2, 3])
def test_one_file_may_lose_its_end(tmp_path, file, n_lost):
    run(tmp_path)
    whole = contents(tmp_path)
    path = tmp_path / file
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-n_lost]))
    run(tmp_path, resume=True)
    assert contents(tmp_path) == whole


def test_what_is_not_its_own_is_left_alone(tmp_path):
    run(tmp_path)
    whole = contents(tmp_path)
    with pytest.raises(FileExistsError, match="--resume"):
        run(tmp_path)
    with pytest.raises(ValueError, match="model was 'pair', now 'other'"):
        run(tmp_path, settings=SETTINGS | {"model": "other"}, resume=True)
    with pytest.raises(ValueError, match="have more lines than the input's 5"):
        run(tmp_path, raw=INPUT[:5], resume=True)
    with pytest.raises(ValueError, match="line 2 is the outcome of 'id 2', and line 2 of the input is 'x'"):
        run(tmp_path, raw=[INPUT[0], asking("x"), *INPUT[2:]], resume=True)
    with pytest.raises(ValueError, match="cannot both go to"):
        BatchJournal(tmp_path / "a", tmp_path / "a", SETTINGS, iter(()), resume=False)
    assert contents(tmp_path) == whole
    (tmp_path / "out.jsonl").unlink()
    with pytest.raises(FileExistsError, match=r"errors.jsonl exists"):
        run(tmp_path, resume=True)
    (tmp_path / "out.jsonl").write_text('{"line": 1}\n')
    with pytest.raises(ValueError, match="line 1 is no outcome of a batch"):
        run(tmp_path, resume=True)
