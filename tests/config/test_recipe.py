import inspect
from pathlib import Path

import pytest
import yaml

import twofold
from twofold.config.recipe import AdaptConfig, Recipe, load_recipe, read_recipe
from twofold.config.targets import TargetsRecipe
from twofold.posttrain.stages import read_run, stage_of

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
BASE = {
    "stage": "pretrain",
    "model": {"path": "start"},
    "data": {"sources": [{"path": "a.txt"}], "source_length": 8, "target_length": 4, "rows_per_batch": 3},
    "output": "run",
    "steps": 10,
    "optimizer": {"learning_rate": 1e-3},
}


def written(tmp_path, **changes):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(BASE | changes))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path, tmp_path, monkeypatch, recwarn):
    monkeypatch.setenv("TWOFOLD_DATA", str(tmp_path))
    if stage_of(path) == "distill-targets":
        recipe = read_recipe(TargetsRecipe, path)
    else:
        recipe = read_run(path)
        overrides = [
            "steps=2",
            "schedule.warmup_steps=0",
            "cross_attention_warmup_steps=0",
            "average_last=null",
            "opening=null",
        ]
        assert read_run(path, overrides).steps == 2
    assert recipe.data.sources[0].path.startswith(f"{tmp_path}/")
    donors = ("HuggingFaceTB/SmolLM2-135M-Instruct", "google/gemma-")
    start = recipe.model.path if recipe.model.adapt is None else recipe.model.adapt.encoder
    assert start.startswith((*donors, "google/t5gemma-"))
    assert not recwarn.list


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {
        "smollm2-prefixlm",
        "smollm2-ul2",
        "smollm2-summarise",
        "smollm2-translate",
        "smollm2-answer",
        "smollm2-instruct",
        "t5gemma-2b-2b-instruct",
        "t5gemma-9b-2b-instruct",
        "smollm2-prefixlm-kd",
        "smollm2-t5gemma2",
        "smollm2-distill-targets",
        "smollm2-short-decoder",
        "smollm2-dpo",
        "smollm2-reward",
        "t5gemma-2b-2b-prefixlm-kd",
        "t5gemma-9b-2b-prefixlm-kd",
        "t5gemma-2b-2b-ul2",
        "t5gemma2-270m-ul2",
    }


def test_the_papers_numbers():
    two, nine, ul2, second = (
        load_recipe(RECIPES[0].parent / f"{name}.yaml", ["data.sources=[{path: a.txt}]"])
        for name in (
            "t5gemma-2b-2b-prefixlm-kd",
            "t5gemma-9b-2b-prefixlm-kd",
            "t5gemma-2b-2b-ul2",
            "t5gemma2-270m-ul2",
        )
    )
    # 4.2M tokens a step and 2T in all.
    assert {recipe.positions_per_step for recipe in (two, nine, ul2, second)} == {4_194_304}
    assert all(abs(r.steps * r.positions_per_step / 2e12 - 1) < 1e-5 for r in (two, nine, ul2, second))
    assert nine.cross_attention_warmup_steps == 1000
    assert (nine.model.adapt.encoder, nine.model.adapt.decoder) == ("google/gemma-2-9b", "google/gemma-2-2b")
    assert two.distillation.share == nine.distillation.share == 1.0
    assert ul2.distillation is second.distillation is None
    assert (second.average_last, second.save_every, second.schedule.warmup_steps) == (5, 10_000, 100)
    assert (second.max_grad_norm, second.model.adapt.layout) == (1.0, "merged")


def test_a_mean_of_checkpoints_needs_them(tmp_path):
    with pytest.raises(ValueError, match=r"average_last=3 needs .* keep_checkpoints is 2; raise it"):
        load_recipe(written(tmp_path, average_last=3, save_every=1))
    with pytest.raises(ValueError, match=r"10 steps with save_every=4 give 3; lower save_every"):
        load_recipe(written(tmp_path, average_last=4, keep_checkpoints=4, save_every=4))
    with pytest.raises(ValueError, match=r"save_every=None give 1"):
        load_recipe(written(tmp_path, average_last=2))
    assert load_recipe(written(tmp_path, average_last=3, keep_checkpoints=3, save_every=4)).average_last == 3


def test_a_recipe_of_targets_is_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"stage 'distill-targets' .*twofold train"):
        load_recipe(written(tmp_path, stage="distill-targets"))


def test_defaults(tmp_path):
    recipe = load_recipe(written(tmp_path))
    assert recipe.optimizer.betas == (0.9, 0.95)
    assert recipe.optimizer.weight_decay == 0.0
    assert recipe.schedule.decay == "cosine"
    assert (recipe.max_grad_norm, recipe.accumulate_batches, recipe.precision) == (1.0, 1, "float32")
    assert recipe.positions_per_step == 3 * (8 + 4)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_overrides_reach_into_mappings_lists_and_what_is_not_there_yet(tmp_path):
    overrides = [
        "steps=20",
        "optimizer.learning_rate=1e-4",  # YAML 1.1 reads this as text
        "data.sources.0.path=b=c.txt",
        "schedule.decay=linear",
        "model.path=null",
        "model.adapt={encoder: donor, start: lossless}",
        "max_grad_norm=null",
        "steps=30",
    ]
    recipe = load_recipe(written(tmp_path), overrides)
    assert recipe.steps == 30
    assert recipe.optimizer.learning_rate == 1e-4
    assert recipe.data.sources[0].path == "b=c.txt"
    assert recipe.schedule.decay == "linear"
    assert recipe.model.adapt.start == "lossless"
    assert recipe.max_grad_norm is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "key=value"),
        ("=3", "key=value"),
        ("steps=[", "not valid YAML"),
        ("data.sources.1.path=x", "a list of 1"),
        ("data.sources.2=x", "a list of 1"),
        ("steps.more=1", "no key 'more'; the recipe has 10"),
        ("colour=red", "colour"),
    ],
)
def test_wrong_overrides(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(written(tmp_path), [override])


def test_a_whole_list_item_can_be_replaced(tmp_path):
    recipe = load_recipe(written(tmp_path), ["data.sources.0={path: c.txt}"])
    assert recipe.data.sources[0].path == "c.txt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {}}, r"optimizer.learning_rate: Field required"),
        ({"optimizer": {"learning_rate": 0}}, r"optimizer.learning_rate: .*greater than 0, got 0"),
        ({"optimizer": {"learning_rate": 1, "betas": [0.9, 1.0]}}, r"optimizer.betas: betas must"),
        ({"steps": 0}, r"steps: .*greater than or equal to 1"),
        ({"learning_rate": 1}, r"learning_rate: Extra inputs"),
        ({"precision": "fp16"}, r"precision: .*overflow float16"),
        ({"precision": "float64"}, r"precision: .*'float32' or 'bfloat16', got 'float64'"),
        (
            {"schedule": {"warmup_steps": 11}},
            r"schedule.warmup_steps \(11\) must not be more than steps \(10\)",
        ),
        ({"cross_attention_warmup_steps": 11}, r"cross_attention_warmup_steps \(11\)"),
        ({"model": {}}, r"model: .*exactly one of path .* got neither"),
        ({"model": {"path": "a", "adapt": {"encoder": "b"}}}, r"got both"),
        ({"model": {"adapt": {"encoder": "b"}, "skip_vision": True}}, r"skip_vision"),
        ({"stage": "sft"}, r"stage 'sft' needs data.objective.name 'supervised', got 'prefix_lm'"),
        ({"stage": "dpo"}, r"stage: .*'pretrain' or 'sft'"),
        ({"distillation": {}}, r"distillation: .*exactly one of teacher and targets, got neither"),
        ({"output": ""}, r"output must name a folder"),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path, changes, message):
    path = written(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"{path}: ")


def test_pretrain_refuses_pairs(tmp_path):
    source = {"path": "a.jsonl", "prompt_field": "q", "completion_field": "a"}
    data = BASE["data"] | {"sources": [source], "objective": {"name": "supervised"}}
    with pytest.raises(ValueError, match="stage 'pretrain' needs"):
        load_recipe(written(tmp_path, data=data))
    assert load_recipe(written(tmp_path, data=data, stage="sft")).stage == "sft"


def test_settings_without_effect_warn(tmp_path):
    with pytest.warns(UserWarning, match="evaluate_every=5 has no effect"):
        load_recipe(written(tmp_path, evaluate_every=5))
    with pytest.warns(UserWarning, match="final_share"):
        load_recipe(written(tmp_path, schedule={"decay": "constant", "final_share": 0.5}))


def test_environment_variables_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("WHERE", "/data")
    monkeypatch.delenv("NOWHERE", raising=False)
    recipe = load_recipe(written(tmp_path, output="${WHERE}/x/${WHERE}", model={"path": "${WHERE}/m"}))
    assert (recipe.output, recipe.model.path) == ("/data/x//data", "/data/m")
    with pytest.raises(ValueError, match=r"r.yaml: data.sources.0.path is .*variable NOWHERE is not set"):
        load_recipe(written(tmp_path), ["data.sources.0.path=${NOWHERE}/a"])


def test_other_keys_keep_their_dollar_signs(tmp_path):
    source = {"path": "a.jsonl", "text_field": "${NOWHERE}"}
    data = BASE["data"] | {"sources": [source]}
    assert load_recipe(written(tmp_path, data=data)).data.sources[0].text_field == "${NOWHERE}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nsteps: 2", r"key \['steps'\] is given twice"),
        ("steps: [", "not valid YAML"),
        ("- steps", "must hold keys and values, got list"),
        ("", "got NoneType"),
    ],
)
def test_broken_files(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(path)
    assert str(path) in str(error.value)


def test_no_file():
    with pytest.raises(FileNotFoundError, match=r"no recipe at nowhere.yaml"):
        load_recipe("nowhere.yaml")


def test_adapt_takes_the_arguments_of_the_function():
    arguments = inspect.signature(twofold.adapt).parameters
    functions = {"profile", "choose", "refit", "stitcher"}
    # dtype is always float32 in training.
    assert set(AdaptConfig.model_fields) == set(arguments) - functions - {"dtype"}
    defaults = {name: p.default for name, p in arguments.items() if name in AdaptConfig.model_fields}
    ours = {n: f.default for n, f in AdaptConfig.model_fields.items()}
    assert {n: d for n, d in defaults.items() if n != "encoder"} == {
        n: d for n, d in ours.items() if n != "encoder"
    }
