import json

import pytest
import yaml

from tests.train.conftest import one_thread  # noqa: F401
from tests.train.test_loop import StopAfter
from tests.train.tiny_run import recipe
from twofold.cli import train as module
from twofold.cli.console import note, print_json
from twofold.cli.train import train_command


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe(tmp_path, steps=3).model_dump(mode="json")))
    return path


def test_it_says_what_it_does_and_where_the_result_lies(recipe_file, tmp_path, capsys):
    train_command(recipe_file, ["steps=2"], resume=False, json=True)
    printed = capsys.readouterr()
    summary = json.loads(printed.out.splitlines()[-1])
    assert summary["finished"] is True
    assert summary["step"] == 2
    assert summary["model"] == str(tmp_path / "run" / "model")
    assert set(summary) == {
        "finished",
        "step",
        "best_step",
        "loss",
        "held_out_loss",
        "tokens",
        "seconds",
        "model",
        "checkpoint",
        "output",
    }
    said = "".join(printed.err.split())  # lines are wrapped anywhere
    assert "2stepsof192positions" in said  # 2 batches of 2 rows of 24 + 24
    assert "parametersoncpu" in said
    assert str(tmp_path / "run" / "model") in said


def test_a_stopped_run_says_how_to_go_on(recipe_file, monkeypatch, capsys):
    progress = module.progress_for
    monkeypatch.setattr(module, "progress_for", lambda console: StopAfter(1))
    train_command(recipe_file, [], resume=False, json=True)
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert (summary["finished"], summary["step"], summary["model"]) == (False, 1, None)
    assert "--resume" in printed.err
    monkeypatch.setattr(module, "progress_for", progress)
    train_command(recipe_file, None, resume=True, json=False)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "going on after step 1" in printed.err


def test_several_ranks_are_told_to_go_on_as_several(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    line = module._resume_line("my recipe.yaml", ["steps=9"])
    assert line == "torchrun --nproc-per-node 4 -m twofold.cli train 'my recipe.yaml' steps=9 --resume"


def test_only_rank_0_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    note("hello")
    print_json({"a": 1})
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    note("hello")
    print_json({"a": 1})
    assert capsys.readouterr() == ('{"a": 1}\n', "hello\n")


def test_errors_come_out_as_they_are(recipe_file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.yaml"):
        train_command(tmp_path / "absent.yaml", [], resume=False, json=False)
    with pytest.raises(ValueError, match="colour"):
        train_command(recipe_file, ["colour=red"], resume=False, json=False)


def test_the_model_is_named(tmp_path):
    donors = [{"encoder": "big", "decoder": "small"}, {"encoder": "big"}]
    names = [module._model_name(recipe(tmp_path, model={"adapt": adapt})) for adapt in donors]
    assert names == ["a pair made of big (encoder) and small (decoder)", "a pair made of big"]
