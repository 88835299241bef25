"""Cards of runs: their figures are those that the run itself wrote down."""

import json
from pathlib import Path

import pytest

import twofold
from tests.posttrain.tiny_pairs import dpo_recipe, reward_recipe, written
from tests.train.conftest import one_thread  # noqa: F401
from tests.train.test_loop import StopAfter
from tests.train.tiny_run import TEXTS, loader, recipe, settings, tiny_model
from tests.train.tiny_teacher import save_donor
from twofold.adapt import Choices, adapt_to_folder
from twofold.checkpoint import resolve
from twofold.checkpoint.card import read_history
from twofold.posttrain.pair_runs import train_preferences, train_reward
from twofold.posttrain.reward import load_reward_model
from twofold.train import fit, train
from twofold.train.averaging import average_checkpoints


def history_of(folder):
    return read_history(resolve(folder))


def lines_of(result):
    return [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]


def test_the_figures_are_those_of_the_run(tmp_path):
    (tmp_path / "more.txt").write_text("\n".join(text.upper() for text in TEXTS))
    sources = [
        {"path": str(tmp_path / name), "document": "line", "weight": weight}
        for name, weight in (("texts.txt", 3), ("more.txt", 1))
    ]
    result = train(recipe(tmp_path, data={"sources": sources}, steps=20, save_every=15))
    (phase,) = history_of(result.model_path).phases
    lines = lines_of(result)
    steps = [line for line in lines if "real_tokens" in line]
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert phase.step == 20
    assert phase.tokens == sum(line["real_tokens"] for line in steps) == result.tokens
    assert phase.first_loss == steps[0]["loss"]
    assert phase.late_loss == pytest.approx((steps[-1]["loss"] + steps[-2]["loss"]) / 2)
    assert phase.reports["train"] == {"loss": steps[-1]["loss"]}
    assert phase.reports["held_out"] == {"loss": held_out[-1]}
    assert phase.first_held_out_loss == held_out[0]
    assert phase.num_trainable == sum(p.numel() for p in twofold.load(result.model_path).parameters())
    # Bytes are tokens, and a document ends in a stop token.
    names = ("texts.txt", "more.txt")
    documents = {name: [] for name in names}
    for side in (phase.data, phase.held_out):
        for source, name in zip(side, names, strict=True):
            assert source.name == name
            documents[name].append((source.records, source.tokens))
    for both in documents.values():
        assert sum(records for records, _ in both) == len(TEXTS)
    shares = [source.tokens_drawn for source in phase.data]
    assert sum(shares) == phase.tokens
    assert shares[0] / sum(shares) == pytest.approx(0.75, abs=0.06)
    on_the_way = history_of(tmp_path / "run" / "checkpoints" / "step-000015").phases[-1]
    assert (on_the_way.step, on_the_way.settings["steps"]) == (15, 20)
    assert on_the_way.tokens == sum(line["real_tokens"] for line in steps[:15])
    assert on_the_way.examples_drawn < phase.examples_drawn


def test_no_card_names_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_donor(tmp_path / "donor")
    adapt_to_folder(tmp_path / "donor", None, tmp_path / "pair", Choices(encoder_mask="sink"))
    made = {"model": {"path": str(tmp_path / "pair")}, "data": {"cache": str(tmp_path / "cache")}}
    result = train(recipe(tmp_path, **made, ema_decay=0.5, average_last=2, save_every=2, steps=4))
    written(tmp_path / "pairs.jsonl")
    train_preferences(
        dpo_recipe(tmp_path, output=str(tmp_path / "dpo"), model={"path": str(result.model_path)}, steps=2)
    )
    average_checkpoints([tmp_path / "dpo" / "model", result.model_path], tmp_path / "mean")
    cards = [*tmp_path.rglob("README.md"), *tmp_path.rglob("history.json")]
    folders = {str(card.parent.relative_to(tmp_path)) for card in cards}
    assert folders == {
        "pair",
        "run/checkpoints/step-000002",
        "run/checkpoints/step-000004",
        "run/model",
        "run/model-ema",
        "run/model-average",
        "dpo/checkpoints/step-000002",
        "dpo/model",
        "mean",
    }
    assert len(cards) == 2 * len(folders)
    for card in cards:
        assert str(tmp_path) not in card.read_text(), card
        assert tmp_path.name not in card.read_text(), card


def test_phases_add_up(tmp_path):
    save_donor(tmp_path / "donor")
    made = {"adapt": {"encoder": str(tmp_path / "donor"), "start": "lossless", "encoder_mask": "sink"}}
    first = train(recipe(tmp_path, model=made, output=str(tmp_path / "first"), steps=2))
    written(tmp_path / "pairs.jsonl")
    start = {"path": str(first.model_path)}
    second = train_preferences(dpo_recipe(tmp_path, output=str(tmp_path / "second"), model=start))
    history = history_of(second.model_path)
    assert (history.origin.kind, history.origin.start) == ("adapted", "lossless")
    assert [donor.name for donor in history.origin.donors] == ["donor"]
    assert [phase.stage for phase in history.phases] == ["pretrain", "dpo"]
    assert history.phases[:1] == history_of(first.model_path).phases
    last = [line for line in lines_of(second) if "held_out_accuracy" in line][-1]
    report = history.phases[1].reports["held_out"]
    assert report == {name: last[f"held_out_{name}"] for name in report}
    assert set(report) == {"loss", "accuracy", "margin", "reward_chosen", "reward_rejected"}
    (train_part,), (held_part,) = history.phases[1].data, history.phases[1].held_out
    assert train_part.records + held_part.records == 16
    assert history.phases[1].examples_drawn == 6 * 2 * 2 - _short_batches(train_part.records, 12, 2)
    text = (second.model_path / "README.md").read_text()
    assert text.index("### 1. Training on running text") < text.index("### 2. Tuning on preferences")

    reward = train_reward(reward_recipe(tmp_path, output=str(tmp_path / "reward"), model=start, steps=2))
    history = load_reward_model(reward.model_path).history
    assert [phase.stage for phase in history.phases] == ["pretrain", "reward"]
    assert "load_reward_model" in (reward.model_path / "README.md").read_text()


def _short_batches(pairs: int, batches: int, size: int) -> int:
    """Pairs that `batches` batches lack because the last of each epoch may be short; that one is shuffled, too, so
    only whole epochs tell."""
    per_epoch = -(-pairs // size)
    assert batches % per_epoch == 0 or pairs % size == 0, "choose sizes that end with an epoch"
    return batches // per_epoch * (per_epoch * size - pairs)


def test_a_resumed_run_has_the_card_of_the_whole(tmp_path):
    whole = train(recipe(tmp_path, output=str(tmp_path / "whole")))
    parts = recipe(tmp_path, output=str(tmp_path / "parts"))
    train(parts, callbacks=[StopAfter(3)])
    resumed = train(parts, resume=True)
    histories = [history_of(result.model_path) for result in (whole, resumed)]
    assert histories[0] == histories[1]
    assert len(histories[1].phases) == 1


def test_checkpoints_of_one_run_are_averaged_as_one_phase(tmp_path):
    run = recipe(tmp_path, ema_decay=0.5, average_last=2, save_every=3)
    train(run)
    ema = history_of(tmp_path / "run" / "model-ema").phases
    assert [phase.weights for phase in ema] == ["moving average"]
    assert "held_out_average" in ema[0].reports
    last = history_of(tmp_path / "run" / "model")
    assert "held_out_average" not in last.phases[0].reports
    phases = history_of(tmp_path / "run" / "model-average").phases
    assert phases[:1] == last.phases
    assert [(model.name, model.step, model.phases) for model in phases[1].models] == [
        ("step-000003", 3, ()),
        ("step-000006", 6, ()),
    ]


def test_models_of_two_runs_keep_their_phases(tmp_path):
    start = train(recipe(tmp_path, steps=1)).model_path
    names = ("one", "two")
    for name, rate in zip(names, (1e-3, 2e-3), strict=True):
        made = {"model": {"path": str(start)}, "output": str(tmp_path / name)}
        train(recipe(tmp_path, **made, steps=1, optimizer={"learning_rate": rate}))
    average_checkpoints([tmp_path / name / "model" for name in names], tmp_path / "mean", weights=[1, 3])
    common, mean = history_of(tmp_path / "mean").phases
    assert (common,) == history_of(start).phases
    assert [(model.name, model.weight) for model in mean.models] == [("one/model", 1), ("two/model", 3)]
    rates = [model.phases[0].settings["optimizer"]["learning_rate"] for model in mean.models]
    assert rates == [1e-3, 2e-3]


def test_a_run_without_a_recipe_tells_what_it_knows(tmp_path):
    model = tiny_model()
    fit(model, loader(model), None, settings(steps=2), tmp_path / "a")
    result = fit(model, loader(model), None, settings(steps=3), tmp_path / "b")
    history = history_of(result.model_path)
    assert history.origin is None
    assert [(phase.stage, phase.step) for phase in history.phases] == [("fit", 2), ("fit", 3)]
    assert history.phases[0].data[0].records == len(TEXTS)
    assert Path(result.model_path / "README.md").is_file()
