"""Held-out prompts, answered while a model trains."""

import json

import pytest

import twofold
from tests.posttrain.tiny_pairs import dpo_recipe, reward_recipe
from tests.train.test_loop import StopAfter
from tests.train.tiny_run import TEXTS, loader, recipe, settings, tiny_model
from twofold.checkpoint.load import load
from twofold.posttrain.pair_runs import train_preferences
from twofold.train import fit, train
from twofold.train.progress import shorten

SAMPLES = {"count": 3, "max_new_tokens": 5}


def lines_of(result):
    return [json.loads(line) for line in (result.output / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("adapter", [None, {"rank": 2}], ids=["whole", "adapter"])
def test_answers_are_those_of_the_model_at_that_step(adapter, tmp_path):
    changes = {"adapter": adapter, "steps": 4, "optimizer": {"learning_rate": 3e-2}}
    plain = train(recipe(tmp_path, output=str(tmp_path / "plain"), **changes))
    result = train(recipe(tmp_path, samples=SAMPLES, **changes))
    assert result.losses == plain.losses  # showing changes nothing
    lines = lines_of(result)
    assert [(line["step"], line["number"]) for line in lines] == [(s, n) for s in (0, 2, 4) for n in range(3)]
    engine = twofold.Engine(load(result.model_path), backend="torch")
    for line in lines[-3:]:
        assert line["prompt"].endswith("<bos>")  # the decoder's start
        prompt = line["prompt"].removesuffix("<bos>")
        (expected,) = engine.generate([prompt], max_new_tokens=5)
        assert line["answer"] == expected.text
        # The whole is a piece of a held-out text.
        assert any(prompt + line["reference"] in text for text in TEXTS)
    assert lines[0]["answer"] != lines[-3]["answer"]


def test_a_resumed_run_shows_each_step_once(tmp_path):
    whole = train(recipe(tmp_path, steps=4, samples=SAMPLES, output=str(tmp_path / "whole")))
    parts = recipe(tmp_path, steps=4, samples=SAMPLES)
    train(parts, callbacks=[StopAfter(3)])
    assert lines_of(train(parts, resume=True)) == lines_of(whole)


def test_pairs_show_the_chosen_reply(tmp_path):
    result = train_preferences(dpo_recipe(tmp_path, steps=1, samples={"count": 1, "max_new_tokens": 2}))
    first = lines_of(result)[0]
    word, number = (
        first["prompt"].removesuffix("<bos>").removeprefix("say ").strip("0123456789"),
        first["number"],
    )
    assert number == 0
    assert word
    assert word.upper().startswith(first["reference"])


def test_tensorboard_has_the_text(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = tiny_model()
    config = settings(steps=1, tensorboard=True, samples=SAMPLES)
    fit(model, loader(model), loader(model), config, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("samples/2/text_summary")[0].tensor_proto.string_val
    assert "**reference**" in text.decode()


def test_what_cannot_be_shown_is_refused_before_anything_is_written(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="nothing is held out"):
        fit(model, loader(model), None, settings(samples=SAMPLES), tmp_path / "run")
    long = settings(samples={"max_new_tokens": 128})
    with pytest.raises(ValueError, match=r"held-out prompt 0: 1 tokens before .* lower max_new_tokens"):
        fit(model, loader(model), loader(model), long, tmp_path / "run")
    with pytest.raises(ValueError, match="a reward model writes nothing"):
        reward_recipe(tmp_path, samples=SAMPLES)
    assert not (tmp_path / "run").exists()


def test_long_texts_are_shown_by_their_end():
    assert shorten("one\ntwo", 10) == "one two"
    assert shorten("0123456789", 4) == "...6789"
