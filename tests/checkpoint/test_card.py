import json

import pytest
from huggingface_hub import ModelCard

import twofold
from tests.train.tiny_run import tiny_model
from twofold.checkpoint import resolve
from twofold.checkpoint.card import donor_of, read_history
from twofold.checkpoint.card_text import render_card
from twofold.config.history import (
    Averaged,
    Averaging,
    Donor,
    History,
    Origin,
    SourceUse,
    Training,
    public_name,
    public_settings,
)

SETTINGS = {
    "steps": 20,
    "optimizer": {"learning_rate": 2e-5},
    "schedule": {"warmup_steps": 2, "decay": "linear"},
    "precision": "bfloat16",
    "stage": "sft",
    "data": {"objective": {"name": "supervised"}},
}


def training(**changes):
    values = {
        "stage": "sft",
        "settings": SETTINGS,
        "data": [{"name": "org/answers", "is_on_hub": True, "records": 1200, "tokens": 34_000}],
        "held_out": [{"name": "held.jsonl", "records": 50}],
        "examples_drawn": 80,
        "step": 20,
        "tokens": 9876,
        "num_parameters": 1000,
        "num_trainable": 10,
        "first_loss": 3.5,
        "late_loss": 2.25,
        "first_held_out_loss": 3.25,
        "reports": {"train": {"loss": 2.125}, "held_out": {"loss": 2.5}},
        "device": "cpu",
        "versions": {"twofold": "1.2"},
    }
    return Training(**(values | changes))


def adapted(*donors):
    return Origin(kind="adapted", donors=donors, start="lossless", cross_attention="merged", seed=0)


HUB_DONOR = Donor(name="org/small", role="both", license="apache-2.0", is_on_hub=True)
LOCAL_DONOR = Donor(name="large.Q4", role="encoder")


def card_of(history, **options):
    return ModelCard(render_card(history, tiny_model().config, **options))


def test_the_front_matter_is_what_the_hub_reads():
    data = card_of(History(origin=adapted(HUB_DONOR)).then(training())).data.to_dict()
    assert data == {
        "library_name": "twofold",
        "pipeline_tag": "text-generation",
        "base_model": ["org/small"],
        "license": "apache-2.0",
        "datasets": ["org/answers"],
        "tags": ["twofold", "encoder-decoder", "sft"],
    }
    reward = card_of(History(origin=adapted(HUB_DONOR)), architecture="RewardModel")
    assert (reward.data.pipeline_tag, reward.data.tags) == (
        "text-classification",
        ["twofold", "reward-model"],
    )
    assert "load_reward_model" in reward.text
    of_t5gemma = card_of(History(origin=None), format="t5gemma").data.to_dict()
    assert of_t5gemma["library_name"] == "transformers"


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [(("mit", "mit"), "mit"), (("mit", "gemma"), "other"), (("mit", None), None), ((None, None), None)],
)
def test_a_licence_is_stated_only_where_all_donors_do(licenses, expected):
    donors = [
        Donor(name=f"org/{n}", role=role, license=license, is_on_hub=True)
        for n, (role, license) in enumerate(zip(("encoder", "decoder"), licenses, strict=True))
    ]
    card = card_of(History(origin=adapted(*donors)))
    assert card.data.license == expected
    for donor in donors:
        assert f"/{donor.name}): {donor.license or 'not stated'}" in card.text


def test_the_text_tells_every_phase_in_order():
    dpo = training(
        stage="dpo",
        settings=SETTINGS | {"stage": "dpo", "steps": 30, "preference": {"kind": "ipo"}, "data": {}},
        reports={"train": {"loss": 0.5, "accuracy": 0.75}, "held_out": {"loss": 0.6, "accuracy": 0.625}},
        data=[
            SourceUse(name="a.jsonl", weight=3, tokens_drawn=300),
            SourceUse(name="b.jsonl", weight=1, tokens_drawn=100),
        ],
    )
    text = card_of(History(origin=adapted(LOCAL_DONOR), phases=(training(), dpo))).text
    told = [
        "# large.Q4: encoder-decoder",
        "Made of `large.Q4` (encoder)",
        "`lossless`: with a causal encoder",
        "### 1. Tuning on given answers (SFT)",
        "| steps | 20 |",
        "| tokens, both sides | 9,876 |",
        "| examples | 80 |",
        "2e-05 at most, 2 steps of warm-up, then linear",
        "10 of 1,000",
        "bfloat16 on cpu",
        "[org/answers](https://huggingface.co/datasets/org/answers) | 1,200 | 34,000 |",
        "`held.jsonl` (50 examples)",
        "| first step | 3.5 |",
        "| mean of the last tenth | 2.25 |",
        "| held out, before | 3.25 |",
        "| last step | 2.125 |",
        "| held out | 2.5 |",
        "learning_rate: 2.0e-05",
        "twofold 1.2",
        "### 2. Tuning on preferences",
        "`dpo`, `ipo`",
        "| steps | 20 of 30 |",
        "| `a.jsonl` |  |  | 3 | 75.0% |",
        "| held out | 0.6 | 0.625 |",
        'AutoModelForSeq2SeqLM.from_pretrained("FOLDER")',
    ]
    at = 0
    for part in told:
        assert part in text[at:], part
        at = text.index(part, at)


def test_models_that_were_averaged_keep_what_is_theirs_alone():
    branch = Averaged(name="a/model", weight=3, origin=adapted(LOCAL_DONOR), phases=(training(),))
    mean = Averaging(models=(branch, Averaged(name="b/model", weight=1)), versions={})
    card = card_of(History(origin=adapted(HUB_DONOR), phases=(mean,)))
    assert "- `a/model`: 75.0%\n- `b/model`: 25.0%" in card.text
    assert card.text.index("#### `a/model`") < card.text.index("##### 1. Tuning on given answers (SFT)")
    assert card.data.datasets == ["org/answers"]
    assert card.data.license is None


def test_names_keep_nothing_of_a_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    names = {
        "org/name": "org/name",
        "runs/model": "model",  # it is there, so it is a folder
        "/home/alice/data/a.jsonl": "a.jsonl",
        "~/secret/*.jsonl.gz": "*.jsonl.gz",
        r"C:\Users\alice\b.txt": "b.txt",
        "https://alice:key@host/files/c.jsonl?token=abc": "c.jsonl",
        "data/": "data",
    }
    assert {path: public_name(path) for path in names} == names
    settings = {
        "output": "/home/alice/run",
        "data": {
            "cache": "/home/alice/cache",
            "sources": [{"path": "/home/alice/a.jsonl", "split": "train"}],
        },
        "rewards": ["/home/alice/rewards.py:score", "math"],
        "prompt_template": "/think about {x}",
    }
    assert public_settings(settings) == {
        "data": {"sources": [{"path": "a.jsonl", "split": "train"}]},
        "rewards": ["rewards.py:score", "math"],
        "prompt_template": "/think about {x}",
    }


def test_where_a_licence_is_stated(tmp_path):
    def checkpoint(name, config=None, card=None, parent=tmp_path):
        folder = parent / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
        if card is not None:
            (folder / "README.md").write_text(card)
        return resolve(folder)

    assert checkpoint("a", card="---\nlicense: mit\ntags: [x]\n---\n# A").license == "mit"
    assert checkpoint("b", card="# B\nlicense: mit").license is None
    assert checkpoint("c", card="---\nlicense: [\n---\n").license is None
    assert checkpoint("d").license is None
    assert checkpoint("e", {"model_type": "gemma2"}).license == "gemma"
    cached = checkpoint("0a1b", parent=tmp_path / "models--org--name.x" / "snapshots")
    assert donor_of(cached, "both") == Donor(name="org/name.x", role="both", is_on_hub=True)
    assert donor_of(resolve(tmp_path / "a"), "decoder") == Donor(name="a", role="decoder", license="mit")


def test_a_model_is_saved_with_its_history(tmp_path):
    model = tiny_model()
    twofold.save(model, tmp_path / "bare")
    assert not (tmp_path / "bare" / "README.md").exists()
    loaded = twofold.load(tmp_path / "bare")
    assert loaded.history == History(
        origin=Origin(kind="checkpoint", donors=(Donor(name="bare", role="both"),))
    )
    loaded.history = loaded.history.then(training())
    twofold.save(loaded, tmp_path / "told")
    assert twofold.load(tmp_path / "told").history == loaded.history
    card = ModelCard.load(tmp_path / "told" / "README.md")
    assert "The encoder-decoder `bare`, as it was found." in card.text


def test_a_history_that_cannot_be_read_is_no_reason_not_to_load(tmp_path):
    model = tiny_model()
    model.history = History(origin=None)
    twofold.save(model, tmp_path / "pair")
    file = tmp_path / "pair" / "history.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 99'))
    with pytest.warns(UserWarning, match="history.json is not a history that this twofold reads"):
        history = read_history(resolve(tmp_path / "pair"))
    assert history.origin.kind == "checkpoint"
