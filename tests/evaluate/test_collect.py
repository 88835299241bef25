"""What is there is used, what is missing is made, and nothing is overwritten unasked."""

import json
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

import twofold
from tests.evaluate.examples import evaluation, one_stack, result
from tests.models.tiny import build, pair_config, stack
from twofold.evaluate import Evaluation
from twofold.evaluate import collect as collect_module
from twofold.evaluate.collect import Comparison, collect, named_models
from twofold.evaluate.cost import Cost
from twofold.evaluate.latency import LatencySettings, Lengths
from twofold.infer.bench import EndedError

SETTINGS = LatencySettings(batch_size=2, runs=1, threads=1)


@pytest.fixture
def folders(tmp_path, byte_tokenizer):
    """A stack and a pair on disk."""
    made = {}
    side = stack(vocab_size=258, max_position_embeddings=256)
    for name, config in (("stack", one_stack(pair_config(side))), ("pair", pair_config(side))):
        model = build(config)
        model.tokenizer = byte_tokenizer
        twofold.save(model, tmp_path / "models" / name, format="twofold")
        made[name] = str(tmp_path / "models" / name)
    return made


def made_up(name: str, path: str, **changes) -> Evaluation:
    random = np.random.default_rng(len(name))
    lengths = {"source_tokens": 12.0, "target_tokens": 3.0}
    tasks = [result("a", random.random(60) < 0.5, **lengths), result("b", random.random(40), **lengths)]
    kind = "decoder-only" if "stack" in name else "encoder-decoder"
    return evaluation(name, tasks, path=path, kind=kind, **changes)


@pytest.fixture
def files(folders, tmp_path):
    """Their evaluations."""
    for name, path in folders.items():
        made_up(name, path).save(tmp_path / f"{name}.json")
    return {name: str(tmp_path / f"{name}.json") for name in folders}


@pytest.fixture
def evaluated(monkeypatch):
    """Stands in for `twofold.evaluate.run`: the calls it got."""
    calls = []

    def evaluate(contender, tasks, **options):
        calls.append((contender.name, tuple(tasks), options))
        return made_up(contender.name, contender.path)

    module = ModuleType("twofold.evaluate.run")
    module.evaluate = evaluate
    monkeypatch.setitem(sys.modules, "twofold.evaluate.run", module)
    return calls


@pytest.fixture
def timed(monkeypatch):
    """Measures in this process; the calls it got."""
    calls = []
    inside = collect_module.measure_latency

    def measure(path, settings, wanted, **options):
        calls.append((path, list(wanted)))
        return inside(path, settings, wanted, **options)

    monkeypatch.setattr(collect_module, "measure_latency", measure)
    monkeypatch.setattr("twofold.evaluate.latency.run_apart", lambda work, *arguments: work(*arguments))
    return calls


def test_models_are_evaluated_and_timed_once(folders, tmp_path, evaluated, timed):
    comparison = Comparison(models=folders, tasks=("a", "b"), limit=60, chat=True, latency=SETTINGS)
    found = collect(comparison, tmp_path / "out")
    assert [(name, tasks) for name, tasks, _ in evaluated] == [("stack", ("a", "b")), ("pair", ("a", "b"))]
    options = evaluated[0][2]
    assert (options["limit"], options["chat"], options["batch_size"], options["precision"]) == (
        60,
        True,
        2,
        "float32",
    )
    assert options["cache"] == tmp_path / "out" / "answers"
    assert [len(wanted) for _, wanted in timed] == [3, 3]
    assert all(entry.latency_s["median"] > 0 and entry.flops > 0 for entry in found.entries)
    assert {entry.name: entry.kind for entry in found.entries} == {
        "stack": "decoder-only",
        "pair": "encoder-decoder",
    }
    assert Evaluation.load(tmp_path / "out" / "evaluations" / "pair.json").model == "pair"
    again = collect(comparison, tmp_path / "out")
    assert again == found
    assert (len(evaluated), len(timed)) == (2, 2)
    collect(comparison, tmp_path / "out", force=True)
    assert (len(evaluated), len(timed)) == (4, 4)


def test_an_interrupted_run_goes_on(folders, tmp_path, evaluated, timed, monkeypatch):
    comparison = Comparison(models=folders, tasks=("a", "b"), latency=SETTINGS)
    inside = collect_module.measure_latency

    def interrupted(path, *arguments, **options):
        if path == folders["pair"]:
            raise KeyboardInterrupt
        return inside(path, *arguments, **options)

    monkeypatch.setattr(collect_module, "measure_latency", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(comparison, tmp_path / "out")
    monkeypatch.setattr(collect_module, "measure_latency", inside)
    collect(comparison, tmp_path / "out")
    assert (len(evaluated), [path for path, _ in timed]) == (2, [folders["stack"], folders["pair"]])


def test_another_model_comes_in_addition(files, folders, tmp_path, timed):
    out = tmp_path / "out"
    collect(Comparison(models={"stack": files["stack"]}, latency=SETTINGS), out)
    found = collect(Comparison(models=files, latency=SETTINGS), out)
    assert len(found.entries) == 2
    assert [path for path, _ in timed] == [folders["stack"], folders["pair"]]
    written = json.loads((out / "comparison.json").read_text())
    assert written["models"] == files


def test_only_missing_lengths_are_timed(files, tmp_path, timed):
    out = tmp_path / "out"
    one = {"stack": files["stack"]}
    collect(Comparison(models=one, latency=SETTINGS), out)
    collect(Comparison(models=one, latency=SETTINGS, reference=Lengths(9, 4)), out)
    assert [wanted for _, wanted in timed] == [
        [((12, 3), 1), ((12, 16), 1), ((12, 16), 2)],
        [((9, 4), 1), ((9, 4), 2)],
    ]
    assert len(Cost.load(out / "costs" / "stack.json").latency.timings) == 5


def test_another_comparison_is_not_overwritten(files, tmp_path):
    out = tmp_path / "out"
    quiet = Comparison(models=files, is_measured=False, latency=SETTINGS)
    collect(quiet, out)
    before = {file: file.read_bytes() for file in out.rglob("*.json")}
    with pytest.raises(FileExistsError, match=r"another comparison: limit was None, now 5\. .*--force"):
        collect(replace(quiet, limit=5), out)
    with pytest.raises(FileExistsError, match=r"stack was .*stack.json, now .*pair.json"):
        collect(replace(quiet, models={"stack": files["pair"]}), out)
    assert {file: file.read_bytes() for file in out.rglob("*.json")} == before
    collect(replace(quiet, limit=5), out, force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty and holds no comparison"):
        collect(quiet, tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_what_a_forced_run_left_behind_is_not_trusted(folders, tmp_path, evaluated, timed):
    """The pair's files are from before the force, with another limit."""
    out = tmp_path / "out"
    settings = {"tasks": ("a",), "latency": SETTINGS, "is_measured": False}
    collect(Comparison(models=folders, limit=5, **settings), out)
    collect(Comparison(models={"stack": folders["stack"]}, limit=6, **settings), out, force=True)
    collect(Comparison(models=folders, limit=6, **settings), out)
    assert [(name, options["limit"]) for name, _, options in evaluated] == [
        ("stack", 5), ("pair", 5), ("stack", 6), ("pair", 6),
    ]  # fmt: skip


def test_a_run_that_came_to_nothing_does_not_hold_its_folder(folders, tmp_path, evaluated):
    with pytest.raises(ValueError, match="on no task"):
        collect(Comparison(models=folders, is_measured=False), tmp_path / "out")
    assert collect(Comparison(models=folders, tasks=("a",), is_measured=False), tmp_path / "out").entries


def test_unequal_settings_are_seen_before_anything_is_timed(files, tmp_path, timed):
    made_up("other", "x", settings={"limit": 3}).save(tmp_path / "other.json")
    models = files | {"other": str(tmp_path / "other.json")}
    with pytest.raises(ValueError, match="limit: stack has 200, other has 3"):
        collect(Comparison(models=models, latency=SETTINGS), tmp_path / "out")
    assert timed == []


def test_without_measuring_there_are_flops(files, tmp_path, timed):
    found = collect(Comparison(models=files, is_measured=False), tmp_path / "out")
    assert timed == []
    assert all(entry.flops and entry.latency_s is None for entry in found.entries)


def test_an_evaluation_whose_model_is_gone(files, tmp_path):
    made_up("lost", "/nowhere/lost").save(tmp_path / "lost.json")
    models = files | {"lost": str(tmp_path / "lost.json")}
    with pytest.raises(ValueError, match=r"lost: its model /nowhere/lost cannot be opened .*--no-measure"):
        collect(Comparison(models=models, latency=SETTINGS), tmp_path / "out")
    said = []
    found = collect(Comparison(models=models, is_measured=False), tmp_path / "quiet", say=said.append)
    assert found.entry("lost").flops is None
    assert found.entry("pair").flops > 0
    assert any("lost: no costs" in text for text in said)


def test_tasks(files, folders, tmp_path, evaluated):
    found = collect(Comparison(models=files, tasks=("b",), is_measured=False), tmp_path / "one")
    assert (found.tasks, found.left_out) == (("b",), ("a",))
    with pytest.raises(ValueError, match="was not evaluated on c"):
        collect(Comparison(models=files, tasks=("c",), is_measured=False), tmp_path / "two")
    with pytest.raises(ValueError, match="stack is to be evaluated, on no task"):
        collect(Comparison(models=folders, is_measured=False), tmp_path / "three")
    # A suite's name is no task of its results.
    found = collect(Comparison(models=folders, tasks=("suite",), is_measured=False), tmp_path / "four")
    assert found.tasks == ("a", "b")


def test_a_process_that_was_ended_names_its_model(files, tmp_path, monkeypatch):
    def ended(*_, **__):
        raise EndedError("its process was ended by the system")

    monkeypatch.setattr(collect_module, "measure_latency", ended)
    with pytest.raises(ValueError, match=r"stack could not be timed: its process was ended .* lower --batch"):
        collect(Comparison(models=files, latency=SETTINGS), tmp_path / "out")


def test_timings_of_another_machine_are_not_mixed(files, tmp_path, timed):
    out = tmp_path / "out"
    one = Comparison(models={"stack": files["stack"]}, latency=SETTINGS)
    collect(one, out)
    kept = out / "costs" / "stack.json"
    kept.write_text(kept.read_text().replace('"cores": ', '"cores": 9'))
    with pytest.raises(ValueError, match=r"stack was timed before .*--force"):
        collect(replace(one, reference=Lengths(9, 4)), out)


def test_names(files, tmp_path):
    pair, other = files["pair"], str(tmp_path / "models" / "llama-3.2-1b")
    assert named_models([pair, other, "hub/name", "mine=x.gguf", "a/b.Q4.gguf"]) == {
        "pair": pair, "llama-3.2-1b": other, "name": "hub/name", "mine": "x.gguf", "b.Q4": "a/b.Q4.gguf",
    }  # fmt: skip
    (tmp_path / "k=v").mkdir()
    assert list(named_models([str(tmp_path / "k=v")])) == ["k=v"]
    with pytest.raises(ValueError, match="a/x and b/x are both named 'x'"):
        named_models(["a/x", "b/x"])
    with pytest.raises(ValueError, match="'k=v' cannot name a model"):
        Comparison(models=named_models([str(tmp_path / "k=v")]))
    with pytest.raises(ValueError, match="no model is named 'nobody'; the baseline is one of a"):
        Comparison(models={"a": "a"}, baseline="nobody")
    with pytest.raises(ValueError, match="no models given"):
        Comparison(models={})
    renamed = collect(Comparison(models={"new": pair}, is_measured=False), tmp_path / "out")
    assert renamed.baseline == "new"
