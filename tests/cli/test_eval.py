"""`twofold eval` on a tiny checkpoint and a task file over a few lines of JSON."""

import json
import sys
from types import SimpleNamespace

import pytest

import twofold
from twofold.cli import eval as eval_cli
from twofold.evaluate import Evaluation
from twofold.evaluate.superglue import Grid, Tuning

LINES = [
    {"question": "The sky is", "choices": ["blue", "green"], "answer": 0},
    {"question": "x" * 300, "choices": ["blue", "green"], "answer": 1},
    {"question": "Coal is", "choices": ["blue", "black"], "answer": 1},
]


@pytest.fixture
def here(tmp_path, text_model, monkeypatch):
    """A folder with a model and a task of the harness."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr(eval_cli.out, "width", 120)
    twofold.save(text_model(), tmp_path / "tiny")
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(line) for line in LINES))
    (tmp_path / "colours.yaml").write_text(
        f"""task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path}/lines.jsonl"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )

    def resolve(names, data):
        """Stands for the names of tasks, which are tested for themselves."""
        from lm_eval.tasks import TaskManager

        loaded = TaskManager(include_defaults=False).load([str(tmp_path / f"{name}.yaml") for name in names])
        return list(loaded["tasks"].values())

    def main_metric(name):
        raise ValueError(name)

    stand_in = SimpleNamespace(resolve=resolve, main_metric=main_metric)
    monkeypatch.setitem(sys.modules, "twofold.evaluate.tasks", stand_in)
    return tmp_path


def test_a_table_a_file_and_one_json_object(here, run):
    out = here / "results.json"
    arguments = ("eval", here / "tiny", "--tasks", "colours", "--backend", "torch", "-o", out, "--json")
    status, printed, err = run(*arguments, "--cache", here / "cache")
    assert status == 0, err
    *table, last = printed.splitlines()
    found = Evaluation.load(out)
    score = found.tasks["colours"]
    row = next(line for line in table if "colours" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "colours", "acc", f"{score.value:.4f} ± {score.error:.4f}", "3", "1",
    ]  # fmt: skip
    assert "evaluating tiny (encoder-decoder) on colours" in err
    assert "colours: 1 of 3 examples are longer than the model can read" in err
    assert json.loads(last)["tasks"]["colours"]["value"] == score.value
    assert found.command.startswith("twofold eval ")
    assert found.settings["precision"] == "float32"
    assert list((here / "cache").iterdir())

    status, _, err = run(*arguments)
    assert (status, "results.json exists; choose another name" in err) == (2, True)
    status, _, err = run(*arguments, "--force", "--limit", 1)
    assert status == 0, err
    assert Evaluation.load(out).tasks["colours"].n == 1


def test_superglue_is_a_protocol_of_its_own(here, run, monkeypatch):
    seen = {}

    def protocol(contender, **options):
        seen.update(options, model=contender.name)
        return Evaluation.load(here / "before.json")

    status, _, err = run(
        "eval", here / "tiny", "--tasks", "colours", "-o", here / "before.json", "--limit", 1
    )
    assert status == 0, err
    stand_in = SimpleNamespace(run=protocol, TASKS={"rte": None}, Grid=Grid, Tuning=Tuning)
    monkeypatch.setitem(sys.modules, "twofold.evaluate.superglue", stand_in)
    monkeypatch.setattr("twofold.evaluate.superglue", stand_in, raising=False)
    out = here / "glue.json"
    status, printed, err = run(
        "eval", here / "tiny", "--superglue", "--tasks", "rte,cb", "--limit", 4, "-o", out, "--limit-train", 8,
        "--grid", "lr=1e-5 batch=2 dropout=0", "--epochs", 3, "--precision", "bfloat16",
    )  # fmt: skip
    assert status == 0, err
    assert seen.pop("say")
    assert seen == {
        "model": "tiny", "out": out, "data": None, "resume": False, "limit_train": 8, "limit_dev": 4,
        "tasks": ["rte", "cb"], "grid": Grid(learning_rates=(1e-5,), batch_sizes=(2,), dropout_rates=(0.0,)),
        "tuning": Tuning(epochs=3, precision="bfloat16"),
    }  # fmt: skip
    assert "colours" in printed


def test_what_cannot_be_asked(here, run):
    model = here / "tiny"
    for arguments, message in [
        ((), "no task: name some with --tasks, or a list with --suite (pt, it, superglue, local)"),
        (("--suite", "all"), "--suite takes pt, it, superglue, local; got 'all'"),
        (("--tasks", "colours", "--precision", "fp8"), "--precision takes float32, bfloat16, int8, int4"),
        (("--tasks", "colours", "--backend", "onnx"), "--backend takes auto, torch, openvino"),
        (("--tasks", "colours", "--resume"), "--resume is for --superglue"),
        (("--superglue",), "give it a file with --out"),
        (("--tasks", "colours", "--epochs", 3), "--epochs is for --superglue"),
    ]:
        status, _, err = run("eval", model, *arguments)
        assert status == 2
        assert message in err
