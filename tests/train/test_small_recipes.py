"""The recipes that run on a laptop, for two steps on a tiny donor: all their settings but sizes."""

import gzip
import json
from pathlib import Path

import pytest

import twofold
from tests.train.tiny_run import TEXTS
from tests.train.tiny_teacher import save_donor
from twofold.config.recipe import load_recipe, read_recipe
from twofold.config.targets import TargetsRecipe
from twofold.train import train
from twofold.train.make_targets import make_targets

FOLDER = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("TWOFOLD_DATA", str(tmp_path))
    save_donor(tmp_path / "donor")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    return [
        f"model.adapt.encoder={tmp_path / 'donor'}",
        f"data.sources=[{{path: {tmp_path / 'texts.txt'}, document: line}}]",
        "data.held_out_fraction=0.2",
        "data.source_length=32",
        "data.target_length=32",
        f"output={tmp_path / 'run'}",
    ]


SHORT = [
    "steps=2",
    "schedule.warmup_steps=1",
    "save_every=1",
    "evaluate_every=1",
    "device=cpu",
    "tensorboard=false",
]


@pytest.mark.parametrize("name", ["smollm2-prefixlm", "smollm2-ul2"])
def test_without_a_teacher(name, tiny):
    assert train(load_recipe(FOLDER / f"{name}.yaml", [*tiny, *SHORT])).is_finished


def test_t5gemma2(tiny, tmp_path):
    run = load_recipe(FOLDER / "smollm2-t5gemma2.yaml", [*tiny, *SHORT, "average_last=2"])
    assert train(run).is_finished
    steps = [twofold.load(tmp_path / "run" / "checkpoints" / f"step-00000{n}") for n in (1, 2)]
    mean = twofold.load(tmp_path / "run" / "model-average")
    assert mean.config.layout == "merged"
    norms = [model.decoder.norm.weight for model in (*steps, mean)]
    assert norms[2].tolist() == pytest.approx(((norms[0] + norms[1]) / 2).tolist())
    assert not norms[0].equal(norms[1])


def test_a_short_decoder(tiny, tmp_path):
    short = ["model.adapt.decoder_depth=1", f"distillation.teacher={tmp_path / 'donor'}", "opening.steps=2"]
    assert train(load_recipe(FOLDER / "smollm2-short-decoder.yaml", [*tiny, *SHORT, *short])).is_finished
    config = twofold.load(tmp_path / "run" / "model").config
    assert (config.encoder.num_hidden_layers, config.decoder.num_hidden_layers) == (2, 1)
    assert (config.encoder_mask, config.encoder_future_share) == (("sink", "sink"), 1.0)


def test_distillation_from_the_donor_and_from_stored_targets(tiny, tmp_path):
    teacher = f"teacher={tmp_path / 'donor'}"
    kd = [*tiny, *SHORT, f"distillation.{teacher}"]
    in_the_loop = train(load_recipe(FOLDER / "smollm2-prefixlm-kd.yaml", kd))
    targets = tmp_path / "targets"
    stored = [*tiny, teacher, f"output={targets}", "device=cpu"]
    assert make_targets(
        read_recipe(TargetsRecipe, FOLDER / "smollm2-distill-targets.yaml", stored)
    ).is_complete
    kd += [f"distillation={{targets: {targets}}}", f"output={tmp_path / 'stored'}"]
    from_targets = train(load_recipe(FOLDER / "smollm2-prefixlm-kd.yaml", kd))
    # 256 draws, bfloat16: near, and not the same.
    assert from_targets.losses[0] == pytest.approx(in_the_loop.losses[0], rel=0.05)
    assert from_targets.losses != in_the_loop.losses


WORDS = ["red", "blue", "green", "brown", "black", "white", "grey", "pink"]
TASKS = {
    "summarise": {
        f"summarization/{name}.jsonl.gz": row
        for name, row in {
            "scitldr-a-train": {"source": ["We take {}.", "It works."], "target": ["{} works."]},
            "dialogsum-dev": {"dialogue": "A: {}?\nB: No.", "summary": "B wants no {}."},
            "scitldr-a-dev": {"source": ["We use {} oil."], "target": ["{} oil.", "Oil."]},
            "dialogsum-test": {"dialogue": "A: {} tea?\nB: Yes.", "summary1": "B wants {} tea."},
        }.items()
    },
    "answer": {"benchmarks/gsm8k-train.jsonl.gz": {"question": "How many {}?", "answer": "Two {}.\n#### 2"}},
    "instruct": {
        "instructions/p3.jsonl.gz": {"prompt": "Say {}.", "completion": "{}"},
        "instructions/alpaca_en_demo.json.gz": {
            "instruction": "Name {}.",
            "input": "",
            "output": "It is {}.",
        },
    },
    "translate": {
        f"translation/multi30k/{split}.{language}.gz": f"{before}{{}}."
        for split in ("train", "val")
        for language, before in (("en", f"A {split} "), ("de", f"Ein {split} "))
    },
}


def filled(row, word):
    return json.loads(json.dumps(row).replace("{}", word))


@pytest.mark.parametrize("task", TASKS)
def test_tuning_on_answers_from_the_files_as_their_authors_wrote_them(task, tiny, tmp_path):
    for name, row in TASKS[task].items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [filled(row, word) for word in WORDS]
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        if name.endswith(".json.gz"):
            text = json.dumps(rows)
        file.write_bytes(gzip.compress(text.encode()))
    sizes = ["data.source_length=160", "data.target_length=64"]
    sizes += [] if task in ("summarise", "translate") else ["data.held_out_fraction=0.3"]
    kept = [override for override in tiny if not override.startswith("data.")]
    run = load_recipe(FOLDER / f"smollm2-{task}.yaml", [*kept, *sizes, *SHORT])
    result = train(run)
    assert result.is_finished
    assert len(result.held_out) == 3
    (phase,) = twofold.load(result.model_path).history.phases
    assert all(source.records for source in (*phase.data, *phase.held_out))
    assert len(phase.data) == len(run.data.sources)
