import inspect
from pathlib import Path

import pytest
import yaml

import twofold
from twofold.config.recipe import AdaptConfig, Recipe, load_recipe

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
    recipe = load_recipe(path)
    assert recipe.data.sources[0].path.startswith(f"{tmp_path}/")
    assert recipe.model.adapt.encoder == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert not recwarn.list
    assert load_recipe(path, ["steps=2", "schedule.warmup_steps=0"]).steps == 2


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {"smollm2-prefixlm", "smollm2-ul2", "smollm2-summarise"}


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
    # dtype is always float32 in training.
    assert set(AdaptConfig.model_fields) == set(arguments) - {"dtype", "watch"}
    defaults = {name: p.default for name, p in arguments.items() if name in AdaptConfig.model_fields}
    ours = {n: f.default for n, f in AdaptConfig.model_fields.items()}
    assert {n: d for n, d in defaults.items() if n != "encoder"} == {
        n: d for n, d in ours.items() if n != "encoder"
    }
