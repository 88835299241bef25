"""Rows of every format become the examples that they are; what is broken is named by file and line."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from twofold.evaluate.superglue.data import HUB, Missing, Source
from twofold.evaluate.superglue.tasks import TASKS

RTE = "index\tsentence1\tsentence2\tlabel\n"
ROWS = {
    "boolq": {"passage": "Snow is cold.", "question": "is snow cold", "label": 1},
    "cb": {"premise": "It may rain.", "hypothesis": "it rains", "label": 2},
    "copa": {"premise": "He fell.", "question": "cause", "choice1": "Ice.", "choice2": "Tea.", "label": 0},
    "multirc": {"paragraph": "Ann ate.", "question": "Who ate?", "answer": "Ann", "label": 1},
    "rte": {"premise": "A cat sat.", "hypothesis": "It sat.", "label": 0},
    "wic": {"word": "run", "sentence1": "We run.", "sentence2": "A run.", "label": 0},
    "wsc": {
        "text": "It fell when it broke.",
        "span1_text": "It",
        "span2_text": "it",
        "span2_index": 3,
        "label": 1,
    },
}
TEXTS = {
    "boolq": ["boolq passage: Snow is cold. question: is snow cold?"],
    "cb": ["cb premise: It may rain. hypothesis: it rains"],
    "copa": [
        "copa premise: He fell. question: What was the cause? answer: Ice.",
        "copa premise: He fell. question: What was the cause? answer: Tea.",
    ],
    "multirc": ["multirc paragraph: Ann ate. question: Who ate? answer: Ann"],
    "rte": ["rte premise: A cat sat. hypothesis: It sat."],
    "wic": ["wic word: run sentence1: We run. sentence2: A run."],
    "wsc": ["wsc text: It fell when *it* broke. pronoun: it noun: It"],
}


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that cannot be reached; counts who asks."""
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def texts_of(example):
    return [str(text) for text in example.texts]


@pytest.mark.parametrize("name", TASKS)
def test_the_seven_tasks(name):
    example = TASKS[name].example(ROWS[name], "here")
    assert texts_of(example) == TEXTS[name]
    assert example.label == ROWS[name]["label"]
    assert TASKS[name].num_logits == (1 if name == "copa" else 3 if name == "cb" else 2)


def test_label_order_is_the_hubs():
    assert {name: task.labels for name, task in TASKS.items()} == {
        "boolq": ("no", "yes"),
        "cb": ("entailment", "contradiction", "neutral"),
        "copa": ("choice1", "choice2"),
        "multirc": ("no", "yes"),
        "rte": ("entailment", "not_entailment"),
        "wic": ("no", "yes"),
        "wsc": ("no", "yes"),
    }


def test_effects_and_pronouns_of_two_words():
    row = ROWS["copa"] | {"question": "effect"}
    assert "question: What happened as a result? answer: Tea." in texts_of(TASKS["copa"].example(row, ""))[1]
    row = ROWS["wsc"] | {"span2_text": "it broke.", "span2_index": 3}
    assert texts_of(TASKS["wsc"].example(row, ""))[0].startswith("wsc text: It fell when *it broke.* pronoun")


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("rte", {"label": 2}, "rte has the labels 0 to 1 .entailment, not_entailment., got 2"),
        ("rte", {"label": -1}, "got -1"),
        ("rte", {"label": None}, "needs 'label' of type int, got NoneType"),
        ("cb", {"premise": 3}, "needs 'premise' of type str, got int"),
        ("copa", {"question": "why"}, "a cause or an effect, got 'why'"),
        ("wsc", {"span2_index": 5}, "span2_index 5 with 'it' lies outside of the text's 5 words"),
    ],
)
def test_rows_that_cannot_be_used(name, change, problem):
    with pytest.raises(ValueError, match=f"x.jsonl, line 7: .*{problem}"):
        TASKS[name].example(ROWS[name] | change, "x.jsonl, line 7")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def request(passage: str, question: str, answer: str) -> str:
    query = f"Snow -- {passage}\nQuestion: {question}?\nAnswer:"
    return json.dumps({"query": query, "choices": ["yes", "no"], "gold": ["yes", "no"].index(answer)}) + "\n"


def test_boolq_of_requests_and_of_rows_is_read_alike(tmp_path):
    """Requests have a title, a question mark and an index; the dev set has a bool."""
    write(
        tmp_path / "boolq-train.jsonl.gz",
        request("Cold -- it is.", "is it", "yes") + request("B", "is b", "no"),
    )
    rows = [
        {"passage": "Cold.", "question": "is it", "answer": True},
        {"passage": "C", "question": "c", "answer": False},
    ]
    write(tmp_path / "boolq-validation.jsonl", "\n".join(map(json.dumps, rows)))
    found = Source(tmp_path).splits("boolq")
    assert [(texts_of(one), one.label) for one in found.train] == [
        (["boolq passage: Cold -- it is. question: is it?"], 1),
        (["boolq passage: B question: is b?"], 0),
    ]
    assert [(texts_of(one), one.label) for one in found.dev] == [
        (["boolq passage: Cold. question: is it?"], 1),
        (["boolq passage: C question: c?"], 0),
    ]


def test_rte_of_glue_keeps_its_quotes(tmp_path):
    write(
        tmp_path / "rte/train.tsv", RTE + '0\tHe said "no\tHe spoke.\tentailment\n1\ta\tb\tnot_entailment\n'
    )
    write(tmp_path / "rte/dev.tsv.gz", RTE + "0\tc\td\tnot_entailment\n")
    found = Source(tmp_path).splits("rte")
    assert [texts_of(one) for one in found.train] == [
        ['rte premise: He said "no hypothesis: He spoke.'],
        ["rte premise: a hypothesis: b"],
    ]
    assert [one.label for one in (*found.train, *found.dev)] == [0, 1, 1]
    assert found.origin == str(tmp_path)


def test_wic_of_two_files(tmp_path):
    for split, answer in (("train", "T"), ("dev", "F")):
        write(tmp_path / f"benchmarks/wic/{split}.data.txt.gz", f"run\tV\t1-1\tWe run {split} .\tA run .\n")
        write(tmp_path / f"benchmarks/wic/{split}.gold.txt.gz", f"{answer}\n")
    found = Source(tmp_path).splits("wic")
    assert texts_of(found.dev[0]) == ["wic word: run sentence1: We run dev . sentence2: A run ."]
    assert (found.train[0].label, found.dev[0].label) == (1, 0)
    assert found.origin == str(tmp_path / "benchmarks")


def test_files_with_the_hubs_rows_serve_every_task(tmp_path):
    for name, row in ROWS.items():
        other = {key: f"other {value}" if key == "premise" else value for key, value in row.items()}
        other |= (
            {}
            if "premise" in row
            else {"question": "other"}
            if "question" in row
            else {"label": row["label"]}
        )
        write(tmp_path / f"super_glue-{name}-train.jsonl", json.dumps(row | {"idx": 0}))
        write(tmp_path / f"super_glue-{name}-validation.jsonl", json.dumps(other) if other != row else "")
    for name in ("boolq", "cb", "copa", "multirc", "rte"):
        assert texts_of(Source(tmp_path).splits(name).train[0]) == TEXTS[name]
    with pytest.raises(ValueError, match="wsc has 1 training and 0 dev examples; give both some"):
        Source(tmp_path).splits("wsc")


def test_no_dev_example_is_trained_on(tmp_path):
    write(
        tmp_path / "rte/train.tsv",
        RTE + "0\ta\tb\tentailment\n1\tc\td\tentailment\n2\te\tf\tnot_entailment\n",
    )
    write(tmp_path / "rte/dev.tsv", RTE + "0\tc\td\tnot_entailment\n")
    found = Source(tmp_path).splits("rte")
    assert [texts_of(one)[0][-1] for one in found.train] == ["b", "f"]
    assert found.n_shared == 1


BROKEN = [
    ("rte/train.tsv", RTE + "0\ta\tb\tentailment\n1\ta\tentailment\n", "line 3: rte needs four columns"),
    ("rte/train.tsv", RTE + "0\ta\tb\tmaybe\n", "line 2: rte needs .*not_entailment.*maybe"),
    ("boolq-train.jsonl", request("A", "a", "yes") + '{"query": \n', "line 2: not JSON"),
    ("boolq-train.jsonl", "[1]\n", "line 1: must be a JSON object, got list"),
    ("boolq-train.jsonl", '{"query": "A", "choices": ["yes", "no"], "gold": 0}\n', "line 1: boolq needs a query"),
    ("boolq-train.jsonl", request("A", "a", "yes").replace('"gold": 0', '"gold": 2'), "'gold', 0 or 1, got 2"),
    ("boolq-train.jsonl", '{"passage": "A", "question": "a", "answer": "yes"}\n', "line 1: .*true or false, got 'yes'"),
    ("boolq-train.jsonl", '{"passage": "A", "answer": true}\n', "line 1: boolq needs 'question'"),
    ("wic/train.data.txt", "run\tV\t1-1\tWe run .\n", "train.data.txt, line 1: wic needs five columns"),
    ("wic/train.gold.txt", "X\n", "train.gold.txt, line 1: wic needs T or F, got 'X'"),
    ("wic/train.gold.txt", "T\nF\n", "train.data.txt has 1 lines and .*train.gold.txt 2"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "text", "problem"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_line_is_named(file, text, problem, tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / f"boolq-{split}.jsonl", request(split, "a", "yes"))
    for split in ("train", "dev"):
        write(tmp_path / f"rte/{split}.tsv", RTE + f"0\t{split}\tb\tentailment\n")
        write(tmp_path / f"wic/{split}.data.txt", f"run\tV\t1-1\tWe run {split} .\tA run .\n")
        write(tmp_path / f"wic/{split}.gold.txt", "T\n")
    name = file[:3].replace("boo", "boolq")
    Source(tmp_path).splits(name)
    write(tmp_path / file, text)
    with pytest.raises(ValueError, match=problem) as caught:
        Source(tmp_path).splits(name)
    assert str(tmp_path) in str(caught.value)


def test_broken_bytes_are_named(tmp_path):
    write(tmp_path / "rte/dev.tsv", RTE + "0\tc\td\tnot_entailment\n")
    (tmp_path / "rte/train.tsv").write_bytes(RTE.encode() + b"0\t\xff\tb\tentailment\n")
    with pytest.raises(ValueError, match=r"train.tsv, line 2: not UTF-8"):
        Source(tmp_path).splits("rte")
    (tmp_path / "rte/train.tsv").unlink()
    (tmp_path / "rte/train.tsv.gz").write_bytes(gzip.compress(RTE.encode() * 9)[:-10])
    with pytest.raises(ValueError, match=r"train.tsv.gz is a broken .gz file"):
        Source(tmp_path).splits("rte")


def test_what_the_folder_lacks_is_asked_of_the_hub_once(no_hub, tmp_path):
    write(tmp_path / "super_glue-cb-validation.jsonl", json.dumps(ROWS["cb"]))
    source = Source(tmp_path)
    with pytest.raises(Missing, match="has no train split of cb, and the hub cannot be reached"):
        source.splits("cb")
    with pytest.raises(Missing, match="has no train and validation split of wsc, and the hub cannot be"):
        source.splits("wsc")
    assert no_hub == [(HUB, "cb", "train")]


def test_the_hub_gives_both_splits(monkeypatch, tmp_path):
    """A local dev set is not mixed with the hub's training split."""
    write(tmp_path / "super_glue-cb-validation.jsonl", json.dumps(ROWS["cb"]))
    hub = {"train": [ROWS["cb"]], "validation": [ROWS["cb"] | {"premise": "Dew.", "label": 0}]}
    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(load_dataset=lambda _path, _name, split: hub[split])
    )
    found = Source(tmp_path).splits("cb")
    assert (texts_of(found.train[0]), found.origin) == (TEXTS["cb"], HUB)
    assert (texts_of(found.dev[0]), found.dev[0].label) == (["cb premise: Dew. hypothesis: it rains"], 0)


def test_without_the_datasets_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "twofold\[eval\]"; or give a folder'):
        Source(None).splits("cb")
    with pytest.raises(
        Missing, match=r"no train and validation split of cb, and the hub needs the datasets package"
    ):
        Source(tmp_path).splits("cb")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Source(tmp_path / "none")
