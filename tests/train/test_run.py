import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.train.test_loop import StopAfter, assert_same_run
from tests.train.tiny_run import EOS, TEXTS, recipe, tiny_model
from twofold.checkpoint.load import load
from twofold.checkpoint.save import save
from twofold.config.recipe import load_recipe
from twofold.train import Callback, latest_checkpoint, train
from twofold.train.run import build_loaders, sentinel_ids


def loaders(config, model):
    return build_loaders(config, model)


UL2 = {"objective": {"name": "ul2", "preset": "t5gemma2"}}


def test_a_recipe_becomes_a_model_that_loads(tmp_path):
    result = train(recipe(tmp_path))
    assert result.is_finished
    assert len(result.losses) == 6
    assert [step for step, _ in result.held_out] == [0, 2, 4, 6]
    assert load(result.model_path).tokenizer is not None
    resolved = result.output / "recipe.resolved.yaml"
    assert load_recipe(resolved) == recipe(tmp_path)


def test_a_resumed_recipe_equals_the_run_that_never_stopped(tmp_path):
    # Sentinels are added at the start, so the resumed run meets a vocabulary that has grown.
    whole = train(recipe(tmp_path, output=str(tmp_path / "whole"), data=UL2))
    parts = recipe(tmp_path, output=str(tmp_path / "parts"), data=UL2)
    assert not train(parts, callbacks=[StopAfter(3)]).is_finished
    shutil.rmtree(tmp_path / "start")  # the run needs nothing but its own folder and the data
    resumed = train(parts, resume=True)
    assert_same_run_but_output((load(whole.model_path), whole), (load(resumed.model_path), resumed))
    assert load(resumed.model_path).config.decoder.vocab_size > 259


def assert_same_run_but_output(one, other):
    for _, result in (one, other):
        path = result.checkpoint / "trainer.json"
        content = json.loads(path.read_text())
        del content["settings"]["output"]
        path.write_text(json.dumps(content))
    assert_same_run(one, other)


SIGTERM_SCRIPT = """
import os, signal, sys, time
import torch
from twofold.config.recipe import load_recipe
from twofold.train import Callback, train

torch.set_num_threads(1)

class Terminate(Callback):
    def on_step(self, step, result):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

print(train(load_recipe(sys.argv[1]), callbacks=[Terminate()]).step)
"""


def test_sigterm_saves_exits_cleanly_and_can_be_resumed(tmp_path):
    parts = recipe(tmp_path, output=str(tmp_path / "parts"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(parts.model_dump(mode="json")))
    source = str(Path(__file__).parents[2] / "src")
    process = subprocess.run(
        [sys.executable, "-c", SIGTERM_SCRIPT, str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": source},
        timeout=120,
        check=False,
    )
    assert (process.returncode, process.stdout) == (0, "3\n"), process.stderr
    assert latest_checkpoint(tmp_path / "parts").name == "step-000003"
    resumed = train(parts, resume=True)
    whole = train(recipe(tmp_path, output=str(tmp_path / "whole")))
    assert_same_run_but_output((load(whole.model_path), whole), (load(resumed.model_path), resumed))


def test_existing_output_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").touch()
    run = recipe(tmp_path, model={"path": str(tmp_path / "no-such-model")})
    with pytest.raises(FileExistsError, match="run exists"):
        train(run)


def test_a_changed_recipe_is_refused_before_anything_is_loaded(tmp_path):
    train(recipe(tmp_path, steps=1))
    data = {"sources": [{"path": "absent.txt", "document": "line"}], "rows_per_batch": 3}
    with pytest.raises(ValueError, match=r"sources.0.path: .*-> absent.txt; .*rows_per_batch: 2 -> 3"):
        train(recipe(tmp_path, steps=1, data=data), resume=True)


@pytest.mark.parametrize(
    ("meeting", "data", "message"),
    [
        ({}, {"source_length": 129}, r"data.source_length is 129 tokens, .* 128"),
        ({}, {"target_length": 129}, r"data.target_length is 129 tokens, .* 128"),
        (
            {"decoder_positions": "continue"},
            {"source_length": 100, "target_length": 29},
            r"target_length together with data.source_length is 129",
        ),
    ],
)
def test_rows_longer_than_the_positions_are_refused(tmp_path, meeting, data, message):
    run = recipe(tmp_path, data=data)
    with pytest.raises(ValueError, match=message):
        loaders(run.data, tiny_model(**meeting))


def test_rows_as_long_as_the_positions_are_allowed(tmp_path):
    run = recipe(tmp_path, data={"source_length": 100, "target_length": 28})
    loaders(run.data, tiny_model(decoder_positions="continue"))


def test_missing_data_is_refused_before_the_model_is_loaded(tmp_path):
    missing = {"sources": [{"path": str(tmp_path / "absent.txt")}]}
    run = recipe(tmp_path, data=missing, model={"path": str(tmp_path / "no-such-model")})
    with pytest.raises(FileNotFoundError, match="absent"):
        train(run)
    assert not (tmp_path / "run").exists()


def test_data_without_an_example_leaves_no_output(tmp_path):
    (tmp_path / "short.txt").write_text("a\nb\nc")
    sources = [{"path": str(tmp_path / "short.txt"), "document": "line"}]
    with pytest.raises(ValueError, match="gave an example"):
        train(recipe(tmp_path, data={"sources": sources}))
    assert not (tmp_path / "run").exists()


def test_a_model_without_tokenizer_is_refused(tmp_path):
    model = tiny_model()
    model.tokenizer = None
    save(model, tmp_path / "bare")
    with (
        pytest.warns(UserWarning, match="no tokenizer files"),
        pytest.raises(ValueError, match="no tokenizer"),
    ):
        train(recipe(tmp_path, model={"path": str(tmp_path / "bare")}))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path):
    model = tiny_model()
    model.tokenizer.add_tokens(["fox"])  # id 259
    with pytest.raises(ValueError, match="id 259, the model has 259 embeddings"):
        loaders(recipe(tmp_path).data, model)


def test_sentinels_are_found_where_they_are_and_added_where_not():
    model = tiny_model()
    assert sentinel_ids(model, 0) == []
    assert sentinel_ids(model, 3) == [259, 260, 261]
    assert model.config.decoder.vocab_size == 262
    assert sentinel_ids(model, 2) == [259, 260]
    assert model.encoder.embed_tokens.weight.shape[0] == 262


def test_sentinels_without_embedding_get_one():
    model = tiny_model()
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_id_0>", "<extra_id_1>"]})
    assert sentinel_ids(model, 2) == [259, 260]
    assert model.config.decoder.vocab_size == 261


def test_supervised_pairs(tmp_path):
    rows = [{"question": f"{n} + 1 =", "answer": str(n + 1)} for n in range(9)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = {"path": str(tmp_path / "pairs.jsonl"), "prompt_field": "question", "completion_field": "answer"}
    data = {"sources": [source], "objective": {"name": "supervised"}}
    run = recipe(tmp_path, stage="sft", data=data, steps=2)
    assert train(run).is_finished
    train_loader, held_out = loaders(run.data, tiny_model())
    assert train_loader.num_documents + held_out.num_documents == 9
    assert EOS in next(train_loader).labels


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"question": "a?", "answer": ""}, {}, "empty"),
        ({"question": "<bos><bos>a?", "answer": "b"}, {}, "starts with two BOS tokens"),
        ({"question": "a?", "answer": "<bos>b"}, {}, "decoder input starts with two BOS tokens"),
        (
            {"question": "a?", "answer": "b"},
            {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"},
            r"closes a reply with '' \(token None\), which is not a stop token",
        ),
    ],
    ids=["nothing-scored", "two-bos-in-the-source", "two-bos-in-the-target", "no-stop-token"],
)
def test_pairs_that_teach_the_wrong_thing_end_a_run_before_its_first_step(row, changes, message, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("\n".join([json.dumps(row)] * 5))
    source = {"path": str(tmp_path / "pairs.jsonl"), "prompt_field": "question", "completion_field": "answer"}
    data = {"sources": [source], "objective": {"name": "supervised"}, "held_out_fraction": 0.0}
    run = recipe(tmp_path, stage="sft", data=data, evaluate_every=None)
    model = tiny_model()
    for name, value in changes.items():
        setattr(model.tokenizer, name, value)
    save(model, tmp_path / "start", overwrite=True)
    with pytest.raises(ValueError, match=message):
        train(run)
    assert not (tmp_path / "run").exists()


def test_a_run_says_what_its_data_is_and_what_was_skipped(tmp_path):
    chosen = recipe(tmp_path, steps=1)
    (tmp_path / "texts.txt").write_text("\n".join([*TEXTS, "", "x" * 40]))
    heard = []

    class Watch(Callback):
        def on_tokenise(self, progress):
            heard.append(progress.documents)

        def on_data(self, report):
            heard.append(list(report))

    result = train(chosen, callbacks=[Watch()])
    *progress, report = heard
    assert progress
    assert progress[-1] == 13
    assert (result.output / "data.txt").read_text() == "".join(f"{line}\n" for line in report)
    assert len(report) == 1
    assert report[0].startswith(f"{tmp_path / 'texts.txt'}: ")


def test_no_held_out_documents_no_evaluation(tmp_path):
    result = train(recipe(tmp_path, steps=1, evaluate_every=None, data={"held_out_fraction": 0.0}))
    assert result.held_out == []


def test_donors_are_adapted_and_reported(tmp_path, monkeypatch):
    calls = []

    def adapt(**arguments):
        calls.append(arguments)
        model = tiny_model()
        model.adaptation = {"start": "lossless"}
        return model

    monkeypatch.setattr("twofold.train.run.adapt", adapt)
    model = {"adapt": {"encoder": "donor", "start": "lossless", "encoder_mask": ["sink", "causal"]}}
    result = train(recipe(tmp_path, model=model, steps=1))
    assert calls[0]["encoder"] == "donor"
    assert calls[0]["encoder_mask"] == ("sink", "causal")
    assert calls[0]["dtype"] == torch.float32
    assert json.loads((result.output / "adaptation.json").read_text()) == {"start": "lossless"}
