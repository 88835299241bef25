"""Averages as parts of a run."""

import json

import pytest
import torch

import twofold
from tests.train.ranks import on_ranks
from tests.train.tiny_run import recipe
from twofold.train import LossModule, evaluate, train
from twofold.train.run import build_loaders

DECAY = 0.7


def run_of(folder, **changes):
    constant = {"decay": "constant"}
    return recipe(folder, **({"ema_decay": DECAY, "schedule": constant, "steps": 4} | changes))


def weights_of(path):
    return twofold.load(path).state_dict()


def test_the_moving_average_follows_the_checkpoints_and_is_evaluated(tmp_path):
    run = run_of(tmp_path, save_every=1, keep_checkpoints=9, evaluate_every=2)
    train(run)
    average = {name: tensor.double() for name, tensor in weights_of(tmp_path / "start").items()}
    for step in range(1, 5):
        after = weights_of(tmp_path / "run" / "checkpoints" / f"step-{step:06d}")
        average = {name: DECAY * old + (1 - DECAY) * after[name].double() for name, old in average.items()}
    ema, last = weights_of(tmp_path / "run" / "model-ema"), weights_of(tmp_path / "run" / "model")
    assert any(not torch.equal(ema[name], last[name]) for name in ema)
    for name, tensor in ema.items():
        torch.testing.assert_close(tensor.double(), average[name], rtol=1e-5, atol=1e-7)

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["held_out_loss_average"] for line in lines if "held_out_loss_average" in line}
    plain = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert sorted(found) == sorted(plain) == [0, 2, 4]
    assert found[0] == plain[0]
    assert found[4] != plain[4]
    model = twofold.load(tmp_path / "run" / "model-ema")
    _, held_out = build_loaders(run.data, model)
    assert found[4] == pytest.approx(evaluate(LossModule(model), held_out.one_pass()).loss, rel=1e-6)


def test_evaluating_the_average_does_not_disturb_the_run(tmp_path):
    with_average, without = (
        train(run_of(tmp_path, output=str(tmp_path / name), ema_decay=decay))
        for name, decay in (("with", DECAY), ("without", None))
    )
    assert with_average.losses == without.losses
    assert with_average.held_out == without.held_out
    assert not (tmp_path / "without" / "model-ema").exists()


def test_a_resumed_average_is_equal_to_the_bit(tmp_path):
    train(run_of(tmp_path, output=str(tmp_path / "whole")))
    train(run_of(tmp_path, steps=2))
    train(run_of(tmp_path), resume=True)
    whole, resumed = (weights_of(tmp_path / name / "model-ema") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(ValueError, match=r"ema_decay: 0\.7 -> 0\.8"):
        train(run_of(tmp_path, ema_decay=0.8, steps=6), resume=True)


def on_a_rank(run, resume):
    train(run, resume=resume)


def test_two_ranks_keep_the_average_of_one(tmp_path):
    last = {"average_last": 2, "save_every": 1, "keep_checkpoints": 2}
    train(run_of(tmp_path, output=str(tmp_path / "one"), **last))
    two = run_of(tmp_path, output=str(tmp_path / "two"), **last)
    # New processes for the second part: a process joins others once, as under torchrun.
    assert on_ranks(on_a_rank, 2, two.model_copy(update={"steps": 2}), False) == [None, None]
    assert on_ranks(on_a_rank, 2, two, True) == [None, None]
    for name in ("model-ema", "model-average"):
        one, other = (weights_of(tmp_path / run / name) for run in ("one", "two"))
        for key, tensor in one.items():
            torch.testing.assert_close(other[key], tensor, rtol=1e-4, atol=1e-6)
