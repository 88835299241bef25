"""Local files are read as far as they are wanted, and what is broken in them is named."""

import gzip
import json
from itertools import islice

import pytest

from tests.evaluate.tasks.cases import CASES, Case, write
from twofold.evaluate import tasks
from twofold.evaluate.tasks import lines
from twofold.evaluate.tasks.lines import Docs, json_lines

PIQA = "benchmarks/piqa-validation.jsonl.gz"
GOOD = {"goal": "Sit", "sol1": "here", "sol2": "there", "label": 0}


def docs(file, **changes):
    settings = {"name": str(file), "rows": lambda: json_lines(file), "fields": {"a": int}, "make": dict}
    return Docs(**(settings | changes))


def test_reads_no_further_than_asked(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n\n{"a": 2}\nbroken\n')
    found = docs(file)
    assert found[1] == {"a": 2}
    assert [doc["a"] for doc in islice(found, 2)] == [1, 2]
    assert len(found) == 3
    assert list(found.features) == ["a"]
    assert found.map(lambda doc: {"b": doc["a"] + 1})[0] == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4: not JSON"):
        list(found)


def test_a_limited_run_parses_what_it_needs(tmp_path, monkeypatch):
    """Few-shot examples are not read when none are wanted."""
    case = CASES["piqa"]
    many = {name: content * 500 for name, content in case.files.items()}
    (task,) = tasks.resolve(["piqa"], write(tmp_path, Case(many)))
    parsed = []
    monkeypatch.setattr(
        lines.json, "loads", lambda text: parsed.append(text) or json.JSONDecoder().decode(text)
    )
    task.build_all_requests(limit=20)
    assert len(task.instances) == 40
    assert len(parsed) < 50
    assert len(task.eval_docs) == 1000
    assert len(parsed) < 50


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object, got list"),
        (json.dumps({**GOOD, "label": 2}), "'label' must be one of 0, 1, got '2'"),
        (json.dumps({**GOOD, "goal": None}), "'goal' must be of type str, got 'None'"),
        (json.dumps({"goal": "Sit", "label": 0, "sol1": "here"}), "no field 'sol2'; it has"),
    ],
)
def test_a_broken_line_is_named(line, message, tmp_path):
    case = Case({**CASES["piqa"].files, PIQA: f"{json.dumps(GOOD)}\n\n{line}\n"})
    (task,) = tasks.resolve(["piqa"], write(tmp_path, case))
    with pytest.raises(ValueError, match=r"piqa-validation\.jsonl\.gz, line 3: ") as caught:
        task.build_all_requests()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (
            "arc_easy",
            {"query": "Question: a\nAnswer:", "choices": ["A"], "gold": 0},
            "cannot read the choices",
        ),
        (
            "openbookqa",
            {"query": "Question: q\n A. a\n B. b\nAnswer:", "choices": ["A", "B"], "gold": 2},
            "cannot read the choices",
        ),
        (
            "commonsense_qa",
            {"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"},
            "'answerKey' must be one of",
        ),
        (
            "commonsense_qa",
            {"question": "q", "choices": {"text": ["a"]}, "answerKey": "B"},
            "no field 'choices.label'",
        ),
        (
            "squad",
            {"query": "Background: x\n", "answers_text": ["x"]},
            "must have a line 'Title: ...' in front",
        ),
        (
            "squad",
            {"query": "Title: x\ny", "answers_text": []},
            "'answers_text' must be a list that is not empty",
        ),
        ("drop", {"passage": "p", "question": "q", "answers": [[]]}, "'answers' must be lists of strings"),
        ("scitldr", {"source": ["x"], "target": []}, "'target' must be a list that is not empty"),
        ("nq_open", {"question": "q", "answer": []}, "'answer' must be a list that is not empty"),
    ],
)
def test_a_line_that_makes_no_example_is_named(name, line, message, tmp_path):
    (file,) = tasks.LOCAL[name].test.files
    case = Case({**CASES[name].files, file: [line]})
    with pytest.raises(ValueError, match=r"\.jsonl\.gz, line 1: ") as caught:
        tasks.resolve([name], write(tmp_path, case))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run\tV\t0-0\tRun fast .", "must be 5 columns with a T or F"),
        ("run\tV\t9-0\tRun fast .\tI run .", "there is no word 9 in 'Run fast .'"),
        ("run\tV\tx\tRun fast .\tI run .", "invalid literal for int"),
    ],
)
def test_a_broken_line_of_wic_is_named(line, message, tmp_path):
    case = Case({**CASES["wic"].files, "benchmarks/wic/dev.data.txt.gz": f"{line}\n{line}\n"})
    with pytest.raises(ValueError, match=r"dev\.data\.txt\.gz, line 1: ") as caught:
        tasks.resolve(["wic"], write(tmp_path, case))
    assert message in str(caught.value)


def test_a_broken_shot_is_named(tmp_path):
    case = CASES["boolq"]
    files = {
        **case.files,
        "benchmarks/boolq-train.jsonl.gz": [{"query": "no title", "choices": ["yes", "no"], "gold": 0}],
    }
    (task,) = tasks.resolve(["boolq"], write(tmp_path, Case(files)))
    task.set_config("num_fewshot", 1)
    with pytest.raises(ValueError, match=r"boolq-train\.jsonl\.gz, line 1: cannot read the passage"):
        task.build_all_requests()


def test_files_that_belong_together_are_equally_long(tmp_path):
    case = CASES["multi30k_de_en"]
    files = {**case.files, "translation/multi30k/test_2016_flickr.en.gz": "A dog.\n"}
    (task,) = tasks.resolve(["multi30k_de_en"], write(tmp_path, Case(files)))
    with pytest.raises(ValueError, match=r"test_2016_flickr\.de\.gz, line 2 has no partner"):
        task.build_all_requests()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "is a broken .gz file"),
        (gzip.compress(b'{"goal": "\xff"}\n'), "line 1: not UTF-8"),
        (gzip.compress(json.dumps(GOOD).encode() * 999)[:-20], "is a broken .gz file"),
        (gzip.compress(b"\n"), "has no examples"),
    ],
    ids=[
        "plain",
        "not-utf8",
        "cut",
        "empty",
    ],  # a gzip file has its second in it, and workers of a run must agree on names
)
def test_a_broken_file_is_named(content, message, tmp_path):
    write(tmp_path, CASES["piqa"])
    (tmp_path / PIQA).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        tasks.resolve(["piqa"], tmp_path)
    assert "piqa-validation.jsonl.gz" in str(caught.value)


@pytest.mark.parametrize("content", ["[1]", "{}", '{"examples"'])
def test_bbh_files_have_examples(content, tmp_path):
    case = Case({"benchmarks/bbh/snarks.json.gz": content})
    with pytest.raises(
        ValueError, match=r'snarks\.json\.gz must be a JSON object with a list under "examples"'
    ):
        tasks.resolve(["bbh_zeroshot_snarks"], write(tmp_path, case))
