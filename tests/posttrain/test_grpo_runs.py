"""Whole runs of stage grpo: stopped and resumed, on several ranks, checked before the first step, and learning."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import twofold
from tests.posttrain.tiny_pairs import written
from tests.posttrain.tiny_rollouts import RECORDS, grpo_recipe, metrics_of, values_of_recipe
from tests.train.conftest import one_thread  # noqa: F401
from tests.train.ranks import on_ranks
from tests.train.test_loop import StopAfter, optimizer_tensors
from tests.train.tiny_run import tiny_model
from tests.train.tiny_teacher import save_donor
from twofold.checkpoint.save import save
from twofold.cli.train import train_command
from twofold.posttrain.grpo_runs import train_policy
from twofold.posttrain.rewards import RewardError
from twofold.posttrain.stages import read_run, train_stage
from twofold.train.callbacks import Callback

FOLDER = Path(__file__).parents[2] / "recipes"
RUNS = {
    "once": {"policy": {"kl_coefficient": 0.1}},
    "twice": {
        "policy": {"num_iterations": 2, "scale": "batch", "mask_truncated": True, "kl_coefficient": 0.1}
    },
    "copied": {"rollout": {"precision": "bfloat16", "held_out": {"temperature": 1.0, "num_samples": 2}}},
    "adapter": {"adapter": {"rank": 2}},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_the_run_that_never_stopped(name, tmp_path):
    whole = train_policy(grpo_recipe(tmp_path, output=str(tmp_path / "whole"), **RUNS[name]))
    parts = grpo_recipe(tmp_path, output=str(tmp_path / "parts"), **RUNS[name])
    first = train_policy(parts, callbacks=[StopAfter(3)])  # of "twice", between two updates on one rollout
    assert (first.is_finished, first.step) == (False, 3)
    resumed = train_policy(parts, resume=True)
    assert resumed.is_finished
    assert metrics_of(whole.output) == metrics_of(resumed.output)
    assert (whole.losses, whole.held_out, whole.tokens) == (resumed.losses, resumed.held_out, resumed.tokens)
    models = [twofold.load(result.model_path) for result in (whole, resumed)]
    for (n, one), (_, other) in zip(*(model.named_parameters() for model in models), strict=True):
        assert torch.equal(one, other), n
    one, other = (optimizer_tensors(result.checkpoint) for result in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one)
    steps = [line for line in metrics_of(whole.output) if "loss" in line]
    assert len(steps) == 6
    rollouts = [line["reward_low"] for line in steps]
    assert (rollouts[0] == rollouts[1]) == (name == "twice")
    held = [line for line in metrics_of(whole.output) if "held_out_reward_low" in line]
    assert [line["step"] for line in held] == [0, 3, 6]
    assert "held_out_entropy" not in held[0]
    answers = [(result.output / "held_out.jsonl").read_text() for result in (whole, resumed)]
    assert answers[0] == answers[1]
    lines = list(map(json.loads, answers[0].splitlines()))
    assert len(lines) == 3 * 3 * (2 if name == "copied" else 1)
    first = [line["reward_low"] for line in lines if line["step"] == 0]
    assert sum(first) / len(first) == pytest.approx(held[0]["held_out_reward_low"])
    assert lines[0]["prompt"] in {record["prompt"] for record in RECORDS}


class DieAfter(Callback):
    """As a power cut would: nothing is saved."""

    def __init__(self, step):
        self.step = step

    def on_step(self, step, result):
        if step == self.step:
            raise KeyboardInterrupt


def test_a_run_that_died_goes_on_from_its_last_checkpoint(tmp_path):
    whole = train_policy(grpo_recipe(tmp_path, output=str(tmp_path / "whole"), save_every=2))
    parts = grpo_recipe(tmp_path, output=str(tmp_path / "parts"), save_every=2)
    with pytest.raises(KeyboardInterrupt):
        train_policy(parts, callbacks=[DieAfter(5)])
    resumed = train_policy(parts, resume=True)
    assert metrics_of(whole.output) == metrics_of(resumed.output)


def run(recipe):
    result = train_policy(recipe)
    return result.losses, result.held_out


def test_two_ranks_do_what_one_does(tmp_path):
    save(tiny_model(), tmp_path / "start")  # without dropout
    recipes = [
        grpo_recipe(tmp_path, output=str(tmp_path / n), steps=2, **RUNS["twice"]) for n in ("one", "two")
    ]
    one = run(recipes[0])
    for found in on_ranks(run, 2, recipes[1]):
        assert not isinstance(found, Exception), found
        assert found[0] == pytest.approx(one[0], rel=1e-4, abs=1e-5)
        assert [loss for _, loss in found[1]] == pytest.approx([loss for _, loss in one[1]], rel=1e-5)
    models = [twofold.load(tmp_path / n / "model") for n in ("one", "two")]
    for (n, ours), (_, theirs) in zip(*(model.named_parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3, msg=n)


def test_a_tiny_model_learns_what_is_rewarded(tmp_path):
    recipe = grpo_recipe(
        tmp_path,
        steps=16,
        rewards=[{"kind": "function", "name": "low", "path": f"{tmp_path / 'rewards.py'}:low"}],
        rollout={"num_samples": 6, "held_out": {"temperature": 1.0, "num_samples": 8}},
        optimizer={"learning_rate": 1e-2},
        schedule={"decay": "constant"},
    )
    result = train_policy(recipe)
    first, last = -result.held_out[0][1], -result.held_out[-1][1]
    assert first < 0.5
    assert last > first + 0.2
    curve = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    times = [line for line in curve if "rollout_seconds" in line]
    for line in times:
        parts = line["rollout_seconds"] + line["reward_seconds"] + line["scoring_seconds"]
        assert 0 < parts < line["seconds"]


def test_what_does_not_go_together_stops_before_the_first_step(tmp_path):
    math = {"kind": "math"}
    empty = written(tmp_path / "empty.jsonl", [{**record, "answer": ""} for record in RECORDS])
    with pytest.raises(
        ValueError, match=r"9 of 9 records skipped \(9 empty answer\).*reward 'math' needs 'answer'"
    ):
        train_policy(grpo_recipe(tmp_path, rewards=[math], data={"sources": [{"path": str(empty)}]}))
    with pytest.raises(ValueError, match="'summary'"):
        train_policy(grpo_recipe(tmp_path, rewards=[{"kind": "rouge", "field": "summary"}]))
    with pytest.raises(ValueError, match=r"the prompt of .*line \d: 1 tokens before .* 128 new ones pass"):
        train_policy(grpo_recipe(tmp_path, rollout={"max_new_tokens": 128}))
    with pytest.raises(ValueError, match="does not fit source_length=3"):
        train_policy(grpo_recipe(tmp_path, data={"source_length": 3}))
    with pytest.raises(FileNotFoundError, match="absent"):
        train_policy(grpo_recipe(tmp_path, data={"sources": [{"path": str(tmp_path / "absent.jsonl")}]}))
    with pytest.raises(FileNotFoundError, match="no file"):
        train_policy(grpo_recipe(tmp_path, rewards=[{"kind": "function", "path": "absent.py:f"}]))
    assert not (tmp_path / "run").exists()


def test_a_cache_without_room_for_one_group_stops_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="cache"):
        train_policy(grpo_recipe(tmp_path, rollout={"cache_bytes": 1000}))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_reward_that_fails_in_the_run_names_the_record(tmp_path):
    recipe = grpo_recipe(tmp_path)
    (tmp_path / "rewards.py").write_text(
        "def low(prompts, completions, records):\n    return [float('inf')] * len(prompts)\n"
    )
    with pytest.raises(
        RewardError, match=r"reward 'low' must give finite numbers, got inf for an answer to .*line"
    ):
        train_policy(recipe)


def test_other_prompts_are_refused_on_resume(tmp_path):
    recipe = grpo_recipe(tmp_path)
    train_policy(recipe, callbacks=[StopAfter(2)])
    written(tmp_path / "prompts.jsonl", [{**record, "answer": "0"} for record in RECORDS])
    train_policy(recipe, resume=True, callbacks=[StopAfter(3)])  # no reward reads the answers
    written(tmp_path / "prompts.jsonl", [{**record, "prompt": record["prompt"] + "?"} for record in RECORDS])
    with pytest.raises(ValueError, match="saved state of the loader has prompts"):
        train_policy(recipe, resume=True)


@pytest.mark.parametrize("name", ["gsm8k", "summarise"])
def test_the_recipes_run_on_a_tiny_donor(name, tmp_path, monkeypatch):
    """All their settings but sizes and the backend."""
    monkeypatch.setenv("TWOFOLD_DATA", str(tmp_path))
    save_donor(tmp_path / "donor")
    rows = [
        {"question": r["prompt"], "dialogue": r["prompt"], "summary": "x", "answer": f"#### {r['answer']}"}
        for r in RECORDS
    ]
    path = written(tmp_path / "prompts.jsonl", rows)
    source = (
        read_run(FOLDER / f"smollm2-grpo-{name}.yaml")
        .data.sources[0]
        .model_dump(exclude={"path", "max_prompts"})
    )
    overrides = [
        f"model.adapt.encoder={tmp_path / 'donor'}",
        f"data.sources={json.dumps([source | {'path': str(path), 'template': '{prompt}'}])}",
        "data.held_out=[]",
        "data.held_out_fraction=0.3",
        "data.source_length=32",
        "rollout.max_new_tokens=4",
        "rollout.num_samples=2",
        "rollout.backend=torch",
        f"output={tmp_path / 'run'}",
        "steps=1",
        "schedule.warmup_steps=1",
        "device=cpu",
        "tensorboard=false",
    ]
    assert train_stage(read_run(FOLDER / f"smollm2-grpo-{name}.yaml", overrides)).is_finished


def test_the_command_trains_and_says_the_reward(text_model, tmp_path, capsys):
    save(text_model(), tmp_path / "start")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values_of_recipe(tmp_path, steps=2, data={"source_length": 60})))
    train_command(recipe, [], resume=False, json=True)
    printed = capsys.readouterr()
    summary = json.loads(printed.out.splitlines()[-1])
    assert (summary["finished"], summary["step"]) == (True, 2)
    said = " ".join(printed.err.split())
    assert "2 steps of 4 prompts with 3 answers each" in said
    assert "reward low" in said
    assert twofold.load(Path(summary["model"])).tokenizer is not None


def test_the_card_counts_prompts_and_answers(tmp_path):
    recipe = grpo_recipe(tmp_path, steps=2)
    result = train_policy(recipe)
    (phase,) = twofold.load(result.model_path).history.phases
    assert phase.stage == "grpo"
    assert sum(source.records for source in (*phase.data, *phase.held_out)) == len(RECORDS)
    assert phase.held_out
    batches = 2 * recipe.accumulate_batches
    assert phase.examples_drawn == batches * recipe.data.prompts_per_batch * recipe.rollout.num_samples
    last = [line for line in metrics_of(tmp_path / "run") if "held_out_reward" in line][-1]
    assert phase.reports["held_out"]["reward"] == last["held_out_reward"]
