"""Recipes of stages dpo and reward: what they take, and what they say when it does not fit."""

import pytest
import yaml

from twofold.config.preferences import PreferenceRecipe, RewardRecipe
from twofold.posttrain.stages import read_run

BASE = {
    "stage": "dpo",
    "model": {"path": "start"},
    "data": {
        "sources": [{"path": "a.jsonl"}],
        "source_length": 8,
        "target_length": 4,
        "pairs_per_batch": 3,
    },
    "output": "run",
    "steps": 10,
    "accumulate_batches": 2,
    "optimizer": {"learning_rate": 1e-5},
}


def read(tmp_path, overrides=(), **changes):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(BASE | changes))
    return read_run(path, overrides)


def test_the_stage_says_what_a_recipe_holds(tmp_path):
    recipe = read(tmp_path)
    assert isinstance(recipe, PreferenceRecipe)
    assert (recipe.preference.kind, recipe.preference.beta, recipe.preference.reference) == (
        "dpo",
        0.1,
        "precomputed",
    )
    assert recipe.data.sources[0].columns == ("prompt", "chosen", "rejected")
    assert recipe.describe_step() == "6 pairs"
    reward = read(
        tmp_path, ["data.sources.0.margin_field=m", "data.sources.0.prompt_field=null"], stage="reward"
    )
    assert isinstance(reward, RewardRecipe)
    assert reward.data.sources[0].columns == ("chosen", "rejected", "m")
    assert PreferenceRecipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("preference.beta=0", r"preference.beta: .*greater than 0, got 0"),
        ("preference.label_smoothing=0.5", r"preference.label_smoothing: .*less than 0.5"),
        ("preference.kind=ppo", r"preference.kind: .*'dpo', 'ipo' or 'orpo', got 'ppo'"),
        ("data.sources=[]", r"data: sources must name at least one source"),
        ("data.sources.0.path=", r"path: .*string, got None"),
        ("data.sources.0.chosen_field=prompt", r"a column of its own, got prompt, prompt, rejected"),
        ("data.sources.0.text_field=text", r"text_field: Extra inputs"),
        ("data={sources: [{path: a}], held_out: [{path: b}], held_out_fraction: 0.1, source_length: 1, "
         "target_length: 1, pairs_per_batch: 1}", r"from held_out \(1 sources\) or from held_out_fraction \(0.1\)"),
        ("objective=x", r"objective: Extra inputs"),
    ],
)  # fmt: skip
def test_errors_name_the_key(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["preference.kind=orpo", "preference.reference=model"], "orpo needs no reference"),
        (["preference.kind=ipo", "preference.label_smoothing=0.1"], "label_smoothing=0.1 has no effect"),
        (["evaluate_every=2"], "evaluate_every=2 has no effect: nothing is held out"),
        (["data.sources.0.margin_field=m"], "margin_field='m' has no effect: it is for stage 'reward'"),
    ],
)
def test_settings_without_effect_warn(tmp_path, overrides, message):
    with pytest.warns(UserWarning, match=message):
        read(tmp_path, overrides)
