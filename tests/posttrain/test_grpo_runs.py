"""Whole runs of stage grpo: stopped and resumed, on several ranks, checked before the first step, and learning."""

import json
from pathlib import Path

import pytest
import torch

import twofold
from tests.posttrain.tiny_pairs import written
from tests.posttrain.tiny_rollouts import RECORDS, grpo_recipe, metrics_of, values_of_recipe
from tests.train.conftest import one_thread  # noqa: F401
from tests.train.ranks import on_ranks
from tests.train.test_loop import StopAfter, optimizer_tensors
from tests.train.tiny_run import tiny_model
from twofold.checkpoint.save import save
from twofold.posttrain.grpo_runs import train_policy
from twofold.posttrain.rewards import RewardError
from twofold.train.callbacks import Callback

RUNS = {
    "once": {"policy": {"kl_coefficient": 0.1}},
    "twice": {
        "policy": {"num_iterations": 2, "scale": "batch", "mask_truncated": True, "kl_coefficient": 0.1}
    },
    "copied": {"rollout": {"precision": "bfloat16", "held_out": {"temperature": 1.0, "num_samples": 2}}},
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
        grpo_recipe(tmp_path, output=str(tmp_path / n), steps=3, **RUNS["twice"]) for n in ("one", "two")
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
        steps=25,
        rewards=[{"kind": "function", "name": "low", "path": f"{tmp_path / 'rewards.py'}:low"}],
        rollout={"num_samples": 6, "held_out": {"temperature": 1.0, "num_samples": 8}},
        optimizer={"learning_rate": 1e-2},
        schedule={"decay": "constant"},
    )
    result = train_policy(recipe)
    first, last = -result.held_out[0][1], -result.held_out[-1][1]
    assert first < 0.5
    assert last > first + 0.3
    curve = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    times = [line for line in curve if "rollout_seconds" in line]
    for line in times:
        parts = line["rollout_seconds"] + line["reward_seconds"] + line["scoring_seconds"]
        assert 0 < parts < line["seconds"]
