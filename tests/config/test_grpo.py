"""Recipes of stage grpo: what they take, and what they say when it does not fit."""

import pytest
import yaml

from twofold.config.grpo import PolicyRecipe
from twofold.posttrain.stages import read_run

BASE = {
    "stage": "grpo",
    "model": {"path": "start"},
    "data": {"sources": [{"path": "a.jsonl"}], "source_length": 8, "prompts_per_batch": 3},
    "rewards": [{"kind": "math"}],
    "rollout": {"max_new_tokens": 4},
    "output": "run",
    "steps": 10,
    "accumulate_batches": 2,
    "optimizer": {"learning_rate": 1e-6},
}


def read(tmp_path, overrides=(), **changes):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(BASE | changes))
    return read_run(path, overrides)


def test_the_stage_says_what_a_recipe_holds(tmp_path):
    recipe = read(tmp_path, ["policy.kl_coefficient=0.1", "rollout.held_out.temperature=0.5"])
    assert isinstance(recipe, PolicyRecipe)
    assert recipe.describe_step() == "6 prompts with 8 answers each"
    assert (recipe.rewards[0].label, recipe.rewards[0].columns) == ("math", ("answer",))
    assert (recipe.policy.kl_coefficient, recipe.rollout.held_out.temperature) == (0.1, 0.5)
    assert read(tmp_path, ["rewards=[{kind: math, name: right}]"]).rewards[0].label == "right"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.num_samples=1", "num_samples must be at least 2, got 1: an answer is compared"),
        ("rollout.num_samples=65", "batch_size is 64, but 65 answers to one prompt"),
        ("rollout.precision=int8", "precision 'int8' is for backend 'openvino'"),
        ("rollout.temperature=0", "rollout.temperature: .* greater than 0"),
        ("rollout.top_p=0.9", "rollout.top_p: Extra inputs"),
        ("rollout.held_out.num_samples=3", "3 greedy answers would all be equal"),
        ("rewards=[]", "rewards must name at least one"),
        ("rewards=[{kind: maths}]", "expected tags: 'math', 'exact_match'"),
        ("rewards=[{kind: math}, {kind: math}]", "several rewards are named math"),
        ("rewards=[{kind: math, weight: 0}]", "all rewards have weight 0"),
        ("rewards=[{kind: math, filed: x}]", "rewards.0.math.filed: Extra inputs"),
        ("policy.baseline=mean", "policy.baseline"),
        ("policy.clip_low=1.5", "policy.clip_low"),
        ("data.sources=[]", "sources must name at least one"),
        ("data.sources=[{path: x, template: Solve.}]", "template must hold {prompt} once"),
        ("data.held_out_fraction=1", "data.held_out_fraction"),
    ],
)
def test_what_does_not_fit_is_refused(override, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.clip_high=0.28", "have no effect: with num_iterations=1"),
        ("evaluate_every=5", "evaluate_every=5 has no effect"),
        ("rollout.precision=float32", "has no effect beside null"),
    ],
)
def test_settings_without_effect_warn(override, message, tmp_path):
    with pytest.warns(UserWarning, match=message):
        read(tmp_path, [override])
