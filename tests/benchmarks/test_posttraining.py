"""The post-training benchmark: what it reads out of a run's files."""

import json
from pathlib import Path
from typing import Any

import pytest

from twofold.posttrain.stages import read_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def written(file: Path, *records: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_the_overrides_are_settings_of_the_recipes(monkeypatch):
    from posttraining import RUNS

    monkeypatch.setenv("TWOFOLD_DATA", "data")
    for name, (recipe, overrides) in RUNS.items():
        run = read_run(str(ROOT / recipe), [f"{key}={value}" for key, value in overrides.items()])
        assert run.stage == name
        assert run.steps % run.evaluate_every == 0  # a figure after the last step


def test_figures_are_those_of_the_files(tmp_path):
    from posttraining import figures, metrics

    step = {
        "loss": 0.1,
        "rollout_seconds": 3.0,
        "reward_seconds": 1.0,
        "scoring_seconds": 2.0,
        "seconds": 10.0,
    }
    written(
        tmp_path / "metrics.jsonl",
        {"step": 0, "held_out_loss": -0.2, "held_out_reward_rouge": 0.2, "held_out_length": 40},
        {"step": 1, **step},
        {"step": 2, **step, "rollout_seconds": 5.0},
        {"step": 2, **step},  # done again after a stop
        {"step": 2, "held_out_loss": -0.5, "held_out_reward_rouge": 0.5, "held_out_length": 20},
    )
    answers = [(0, "a", 0.1), (0, "b", 0.3), (1, "a", 0.9), (1, "b", 0.9), (2, "b", 0.7), (2, "a", 0.3)]
    written(
        tmp_path / "held_out.jsonl",
        *({"step": step, "where": where, "reward_rouge": reward} for step, where, reward in answers),
    )
    found = figures("grpo", tmp_path)
    assert found["steps_done"] == 2
    assert [line["step"] for line in found["train"]] == [1, 2]
    assert [line["reward_rouge"] for line in found["held_out"]] == [0.2, 0.5]
    assert found["time_split"] == pytest.approx(
        {"rollout": 0.3, "reward": 0.1, "scoring": 0.2, "update": 0.4}
    )
    gain = found["reward_gain"]
    assert gain["rouge_l"] == pytest.approx(0.3)  # 0.2 of a and 0.4 of b
    assert (gain["low"], gain["high"]) == pytest.approx((0.2, 0.4))
    assert (gain["prompts"], gain["last_step"]) == (2, 2)
    assert metrics({"grpo": found}) == {
        "grpo_reward_rouge_before": 0.2,
        "grpo_reward_rouge_after": 0.5,
        "grpo_length_before": 40,
        "grpo_length_after": 20,
    }
