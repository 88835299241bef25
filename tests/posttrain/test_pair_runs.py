"""Whole runs of stages dpo and reward: stopped and resumed, on several ranks, and from the command line."""

import gzip
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

import twofold
from tests.models.tiny import build, pair_config, stack
from tests.posttrain.tiny_pairs import RECORDS, dpo_recipe, reward_recipe, values_of_recipe
from tests.train.conftest import one_thread  # noqa: F401
from tests.train.ranks import on_ranks
from tests.train.test_loop import StopAfter, optimizer_tensors
from tests.train.tiny_run import byte_tokenizer, tiny_model
from tests.train.tiny_teacher import save_donor
from twofold.checkpoint.save import save
from twofold.cli.train import train_command
from twofold.posttrain.pair_runs import train_preferences, train_reward
from twofold.posttrain.reference import FILE
from twofold.posttrain.reward import load_reward_model
from twofold.posttrain.stages import read_run, train_stage

RUNS = {
    "dpo": (partial(dpo_recipe), train_preferences, twofold.load),
    "dpo-loop": (partial(dpo_recipe, preference={"reference": "model"}), train_preferences, twofold.load),
    "orpo": (partial(dpo_recipe, preference={"kind": "orpo"}), train_preferences, twofold.load),
    "reward": (partial(reward_recipe), train_reward, load_reward_model),
    "dpo-adapter": (
        partial(dpo_recipe, preference={"reference": "model"}, adapter={"rank": 2}),
        train_preferences,
        twofold.load,
    ),
    "reward-adapter": (partial(reward_recipe, adapter={"rank": 2}), train_reward, load_reward_model),
}


def metrics_of(result):
    lines = map(json.loads, (result.output / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_the_run_that_never_stopped(name, tmp_path):
    recipe, train, load = RUNS[name]
    whole = train(recipe(tmp_path, output=str(tmp_path / "whole")))
    parts = recipe(tmp_path, output=str(tmp_path / "parts"))
    first = train(parts, callbacks=[StopAfter(3)])
    assert (first.is_finished, first.step) == (False, 3)
    resumed = train(parts, resume=True)
    assert resumed.is_finished
    assert metrics_of(whole) == metrics_of(resumed)
    assert (whole.losses, whole.held_out, whole.tokens) == (resumed.losses, resumed.held_out, resumed.tokens)
    models = [load(result.model_path) for result in (whole, resumed)]
    for (n, one), (_, other) in zip(*(model.named_parameters() for model in models), strict=True):
        assert torch.equal(one, other), n
    one, other = (optimizer_tensors(result.checkpoint) for result in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one)
    told = {"dpo": "reward_chosen", "dpo-loop": "margin", "orpo": "accuracy", "reward": "calibration_error"}[
        name.removesuffix("-adapter")
    ]
    lines = metrics_of(whole)
    assert sum(told in line for line in lines) == 6
    assert sum(f"held_out_{told}" in line for line in lines) == 3
    assert (tmp_path / "whole" / "recipe.resolved.yaml").is_file()
    assert "held out" in (tmp_path / "whole" / "data.txt").read_text()
    assert (tmp_path / "whole" / FILE).exists() == (name == "dpo")


def test_the_reference_is_the_start_also_where_its_file_is_lost(tmp_path):
    whole = train_preferences(dpo_recipe(tmp_path, output=str(tmp_path / "whole")))
    parts = dpo_recipe(tmp_path, output=str(tmp_path / "parts"))
    train_preferences(parts, callbacks=[StopAfter(3)])
    (tmp_path / "parts" / FILE).unlink()
    assert train_preferences(parts, resume=True).losses == whole.losses
    assert (tmp_path / "parts" / FILE).is_file()


@pytest.mark.parametrize("adapter", [None, {"rank": 2}], ids=["whole", "adapter"])
def test_both_references_give_one_curve(adapter, tmp_path):
    losses = [
        train_preferences(
            dpo_recipe(
                tmp_path, output=str(tmp_path / where), preference={"reference": where}, adapter=adapter
            )
        ).losses
        for where in ("precomputed", "model")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != sorted(losses[0])


def test_a_reference_of_other_pairs_is_refused(tmp_path):
    recipe = dpo_recipe(tmp_path)
    train_preferences(recipe, callbacks=[StopAfter(2)])
    other = dpo_recipe(tmp_path, output=str(tmp_path / "other"), data={"seed": 1})
    train_preferences(other, callbacks=[StopAfter(1)])
    (tmp_path / "run" / FILE).write_bytes((tmp_path / "other" / FILE).read_bytes())
    with pytest.raises(ValueError, match=r"holds log-probabilities of other pairs"):
        train_preferences(recipe, resume=True)


def test_a_reference_of_another_model_is_refused(tmp_path):
    recipe = dpo_recipe(tmp_path)
    train_preferences(recipe, callbacks=[StopAfter(2)])
    save(tiny_model(5), tmp_path / "another")
    other = dpo_recipe(tmp_path, output=str(tmp_path / "other"), model={"path": str(tmp_path / "another")})
    train_preferences(other, callbacks=[StopAfter(1)])
    (tmp_path / "run" / FILE).write_bytes((tmp_path / "other" / FILE).read_bytes())
    with pytest.raises(ValueError, match=r"saved state of the loader has pairs"):
        train_preferences(recipe, resume=True)


def losses_of(train, recipe):
    result = train(recipe)
    return result.losses, result.held_out


@pytest.mark.parametrize("name", ["dpo", "dpo-loop", "reward"])
def test_two_ranks_do_what_one_does(name, tmp_path):
    recipe, train, load = RUNS[name]
    save(tiny_model(), tmp_path / "start")
    values_of_recipe(tmp_path)  # the model is there, without dropout
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    recipes = [
        recipe(tmp_path, output=str(tmp_path / n), steps=3, accumulate_batches=2) for n in ("one", "two")
    ]
    one = losses_of(train, recipes[0])
    two = on_ranks(losses_of, 2, train, recipes[1])
    for found in two:
        assert found[0] == pytest.approx(one[0], rel=1e-4)
        assert [loss for _, loss in found[1]] == pytest.approx([loss for _, loss in one[1]], rel=1e-4)
    models = [load(tmp_path / n / "model") for n in ("one", "two")]
    for (n, ours), (_, theirs) in zip(*(model.named_parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3, msg=n)


def test_what_does_not_go_together_stops_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"one text, of up to .* = 140 tokens.* 128; lower"):
        train_reward(reward_recipe(tmp_path, data={"source_length": 80}))
    with pytest.raises(ValueError, match=r"data.target_length is 200 tokens"):
        train_preferences(dpo_recipe(tmp_path, data={"target_length": 200}))
    with pytest.raises(FileNotFoundError, match="absent"):
        train_preferences(dpo_recipe(tmp_path, data={"sources": [{"path": str(tmp_path / "absent.jsonl")}]}))
    doubled = tmp_path / "bos.jsonl"
    doubled.write_text(
        "".join(json.dumps({**row, "prompt": "<bos><bos>" + row["prompt"]}) + "\n" for row in RECORDS)
    )
    with pytest.raises(ValueError, match="two BOS"):
        train_preferences(dpo_recipe(tmp_path, data={"sources": [{"path": str(doubled)}]}))
    with pytest.raises(ValueError, match="cross_attention_warmup_steps is 2, but a reward model has no"):
        reward_recipe(tmp_path, cross_attention_warmup_steps=2)
    assert not (tmp_path / "run").exists()


def test_a_reward_model_is_averaged_and_opened_like_a_pair(tmp_path):
    save(tiny_model(encoder_mask=("causal", "causal")), tmp_path / "start")
    changes = {
        "average_last": 2,
        "save_every": 1,
        "ema_decay": 0.5,
        "opening": {"kind": "layers", "steps": 3},
    }
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    result = train_reward(reward_recipe(tmp_path, steps=4, **changes))
    last, ema, mean = (load_reward_model(result.output / n) for n in ("model", "model-ema", "model-average"))
    assert last.config.encoder_mask == ("sink", "sink")
    steps = [load_reward_model(result.output / "checkpoints" / f"step-00000{n}") for n in (3, 4)]
    weights = [model.head.out_proj.weight for model in (*steps, mean, ema)]
    torch.testing.assert_close(weights[2], (weights[0] + weights[1]) / 2)
    assert not torch.equal(weights[3], weights[1])
    assert torch.equal(weights[1], last.head.out_proj.weight)


@pytest.mark.parametrize(
    ("recipe", "train"), [(dpo_recipe, train_preferences), (reward_recipe, train_reward)]
)
def test_ids_without_an_embedding_stop_before_the_first_step(recipe, train, tmp_path):
    model = build(pair_config(stack(vocab_size=200, max_position_embeddings=128)))
    model.tokenizer = byte_tokenizer()  # of 259
    save(model, tmp_path / "start")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    with pytest.raises(ValueError, match="the tokenizer gives id 220, the model has 200 embeddings"):
        train(recipe(tmp_path))


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_the_recipes_run_on_a_tiny_donor(stage, tmp_path, monkeypatch):
    """All their settings but sizes."""
    monkeypatch.setenv("TWOFOLD_DATA", str(tmp_path))
    save_donor(tmp_path / "donor")
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    overrides = [
        f"model.adapt.encoder={tmp_path / 'donor'}",
        f"data.sources=[{{path: {path}}}]",
        "data.held_out_fraction=0.3",
        "data.source_length=32",
        "data.target_length=16",
        f"output={tmp_path / 'run'}",
        "steps=2",
        "schedule.warmup_steps=1",
        "device=cpu",
        "tensorboard=false",
    ]
    recipe = Path(__file__).parents[2] / "recipes" / f"smollm2-{stage}.yaml"
    assert train_stage(read_run(recipe, overrides)).is_finished


def hh(record, reply):
    return f"\n\nHuman: {record['prompt']}\n\nAssistant: {record[reply]}"


def llama_factory(record):
    return {
        "conversations": [
            {"from": "system", "value": "Be loud."},
            {"from": "human", "value": record["prompt"]},
        ],
        "chosen": {"from": "gpt", "value": record["chosen"]},
        "rejected": {"from": "gpt", "value": record["rejected"]},
    }


FORMS = {
    "hh.jsonl.gz": (
        None,
        "".join(json.dumps({n: hh(r, n) for n in ("chosen", "rejected")}) + "\n" for r in RECORDS),
    ),
    "demo.json.gz": ("conversations", json.dumps([llama_factory(record) for record in RECORDS], indent=1)),
    "texts.jsonl": ("prompt", "".join(json.dumps(record) + "\n" for record in RECORDS)),
}


@pytest.mark.parametrize("stage", ["dpo", "reward"])
@pytest.mark.parametrize("name", FORMS)
def test_the_command_reads_every_form(stage, name, text_model, tmp_path, capsys):
    save(text_model(), tmp_path / "start")
    field, content = FORMS[name]
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    data = {"sources": [{"path": str(path), "prompt_field": field}], "source_length": 100}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values_of_recipe(tmp_path, stage=stage, steps=2, data=data)))
    train_command(recipe, ["evaluate_every=1"], resume=False, json=True)
    printed = capsys.readouterr()
    summary = json.loads(printed.out.splitlines()[-1])
    assert (summary["finished"], summary["step"]) == (True, 2)
    said = " ".join(printed.err.split())
    assert "2 steps of 4 pairs" in said
    assert "accuracy" in said
    load = {"dpo": twofold.load, "reward": load_reward_model}[stage]
    assert load(Path(summary["model"])).tokenizer is not None
