"""Names become tasks: local ones, the harness's, suites and files; what cannot be had is said."""

import json
import sys

import pytest

from tests.evaluate.tasks.cases import CASES, Case, write
from twofold.evaluate import tasks
from twofold.evaluate.tasks import registry

FILE = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Colour of {{{{thing}}}}:"
doc_to_target: label
doc_to_choice: [red, blue]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def data(tmp_path):
    for name in ("piqa", "gsm8k", "sst2", "squad"):
        write(tmp_path, CASES[name])
    return tmp_path


@pytest.fixture
def hub(monkeypatch):
    """The harness's registry without the hub: loading says what was asked for."""

    class Manager:
        def __init__(self):
            self.task_index = dict.fromkeys(["piqa", "mmlu", "hellaswag", "winogrande", "boolq", "gsm8k"])
            self.asked = []

        def load(self, names):
            self.asked += names
            raise ConnectionError("offline")

    manager = Manager()
    monkeypatch.setattr(registry, "_registry", lambda: manager)
    return manager


def test_local_tasks_come_in_order_and_once(data):
    found = tasks.resolve(["sst2", "gsm8k", "sst2", "piqa"], data)
    assert [task.task_name for task in found] == ["sst2", "gsm8k", "piqa"]
    assert [task.get_config("num_fewshot") for task in found] == [None, 5, None]


def test_local_is_everything_that_the_folder_serves(data):
    assert [task.task_name for task in tasks.resolve(["local"], data)] == ["piqa", "gsm8k", "squad", "sst2"]
    with pytest.raises(ValueError, match="'local' names the tasks of a data folder, and there is none"):
        tasks.resolve(["local"])


def test_a_local_group_is_there_once_and_whole(data):
    members = tasks.LOCAL["bbh_zeroshot"].members
    files = {
        file: '{"examples": [{"input": "x", "target": "y"}]}'
        for member in members
        for file in tasks.LOCAL[member].files
    }
    write(data, Case(files))
    found = tasks.resolve(["local"], data)
    assert [getattr(item, "task_name", None) for item in found] == ["piqa", "gsm8k", "squad", "sst2", None]
    assert [task.task_name for task in found[-1].get_all_tasks()] == list(members)
    (data / next(iter(files))).unlink()
    assert len(tasks.resolve(["local"], data)) == 4


def test_a_suite_brings_its_shots(data, monkeypatch):
    monkeypatch.setitem(tasks.SUITES, "small", {"piqa": 3, "gsm8k": 8, "sst2": None})
    found = tasks.resolve(["small"], data)
    assert [task.get_config("num_fewshot") for task in found] == [3, 8, None]


def test_suites_are_the_harness_s_names_and_the_paper_s_shots():
    index = registry._registry().task_index
    for suite in tasks.SUITES.values():
        assert set(suite) <= set(index)
    pt = tasks.SUITES["pt"]
    wanted = {
        "mmlu": 5,
        "hellaswag": 10,
        "arc_challenge": 25,
        "triviaqa": 5,
        "nq_open": 5,
        "mbpp": 3,
        "gsm8k": 5,
        "minerva_math500": 4,
    }
    assert {name: shots for name, shots in pt.items() if shots is not None} == wanted
    assert len(pt) == 21
    assert len(tasks.SUITES["it"]) == 9
    assert set(tasks.SUITES["superglue"]) == {"copa", "wic", "wsc", "sglue_rte", "multirc", "cb", "boolq"}


def test_a_task_without_its_file_comes_from_the_hub(data, hub, caplog):
    (data / "benchmarks/piqa-train.jsonl.gz").unlink()
    with pytest.raises(ValueError, match=r"'piqa' needs its data set from the Hugging Face hub.*offline"):
        tasks.resolve(["piqa"], data)
    assert hub.asked == ["piqa"]
    assert "piqa-train.jsonl.gz does not exist; the hub is used" in caplog.text


def test_without_a_folder_the_hub_is_asked(hub):
    with pytest.raises(ValueError, match="'gsm8k' needs its data set"):
        tasks.resolve(["gsm8k"])
    assert hub.asked == ["gsm8k"]


def test_a_missing_file_is_named(data, hub):
    (data / "benchmarks/squad.jsonl.gz").unlink()
    with pytest.raises(ValueError, match=r"'squad' reads .*squad\.jsonl\.gz, which does not exist"):
        tasks.resolve(["squad"], data)
    with pytest.raises(ValueError, match="'squad' reads local files; give their folder"):
        tasks.resolve(["squad"])


def test_an_unknown_name_lists_close_ones(data, hub):
    with pytest.raises(ValueError, match=r"no task is named 'winograd'; close are winogrande.*Local.*suites"):
        tasks.resolve(["winograd"], data)


def test_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match=r"data folder .*nowhere does not exist"):
        tasks.resolve(["piqa"], tmp_path / "nowhere")


def test_an_own_task_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [{"thing": "sky", "label": 1}, {"thing": "blood", "label": 0}]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "colours.yaml").write_text(FILE.format(data=tmp_path / "colours.jsonl"))
    (task,) = tasks.resolve([str(tmp_path / "colours.yaml")])
    assert task.task_name == "colours"
    task.build_all_requests(limit=1)
    assert [instance.args for instance in task.instances] == [
        ("Colour of sky:", " red"),
        ("Colour of sky:", " blue"),
    ]
    with pytest.raises(ValueError, match=r"task file .*other\.yaml does not exist"):
        tasks.resolve([str(tmp_path / "other.yaml")])


def test_what_stands_for_a_task():
    assert tasks.main_metric("arc_easy") == ("acc_norm", 1)
    assert tasks.main_metric("scitldr") == ("rougeL", 100)
    assert tasks.main_metric("gsm8k") == ("exact_match,strict-match", 1)
    assert tasks.main_metric("bbh_zeroshot") == ("exact_match,flexible-extract", 1)
    with pytest.raises(ValueError, match="no metric is known to stand for 'triviaqa'"):
        tasks.main_metric("triviaqa")


def test_without_lm_eval(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r'pip install "twofold\[eval\]"'):
        tasks.resolve(["piqa"], data)
