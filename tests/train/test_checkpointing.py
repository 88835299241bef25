import errno
import json
import os
import threading
from pathlib import Path

import pytest
import torch

from tests.train.tiny_run import loader, tiny_model
from twofold.checkpoint.load import load
from twofold.config.recipe import OptimizerConfig
from twofold.train import LossModule, checkpointing, latest_checkpoint, train_step
from twofold.train.checkpointing import (
    CheckpointError,
    CheckpointSaver,
    TrainerState,
    changed_settings,
    read_state,
    restore_checkpoint,
)
from twofold.train.optimizer import cross_attention_names, new_optimizer, set_phase, trainable_parameters
from twofold.train.world import ONE_PROCESS


def trained(steps=2, seed=0, phase=None):
    model = tiny_model(seed).train()
    parameters = trainable_parameters(model)
    if phase is not None:
        set_phase(parameters, phase(model, parameters))
    optimizer = new_optimizer(model, parameters, OptimizerConfig(learning_rate=1e-2))
    batches = loader(model)
    for step in range(1, steps + 1):
        train_step(LossModule(model), optimizer, [next(batches)], step=step, learning_rate=1e-2)
    return model, optimizer, parameters


def save(output, step, run=None, keep=9):
    model, optimizer, parameters = run or trained(1)
    state = TrainerState(step=step, settings={"steps": 9}, losses=[0.1, 0.2], held_out=[(0, 5.5)])
    saver = CheckpointSaver(output, ONE_PROCESS, keep=keep)
    saver.start(model, optimizer, parameters, state)
    return saver.wait()


def restore(folder, model, optimizer, parameters):
    restore_checkpoint(folder, model, optimizer, parameters, read_state(folder), ONE_PROCESS)


def test_there_and_back(tmp_path):
    run = trained()
    folder = save(tmp_path, 100, run)
    assert folder == tmp_path / "checkpoints" / "step-000100"
    model, optimizer, parameters = trained(1, seed=5)
    restore(folder, model, optimizer, parameters)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), run[0].named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[ours][moment], run[1].state[theirs][moment]), (name, moment)
    state = TrainerState(step=100, settings={"steps": 9}, losses=[0.1, 0.2], held_out=[(0, 5.5)])
    state.parameter_steps = dict.fromkeys(parameters, 2)
    assert read_state(folder) == state


def test_steps_after_the_start_of_a_save_are_not_in_it(tmp_path, monkeypatch):
    run = trained(1)
    before = {name: p.detach().clone() for name, p in run[0].named_parameters()}
    may_write = threading.Event()
    real = checkpointing._write_shards

    def slow(*arguments):
        assert may_write.wait(10)
        real(*arguments)

    monkeypatch.setattr(checkpointing, "_write_shards", slow)
    saver = CheckpointSaver(tmp_path, ONE_PROCESS, keep=1)
    saver.start(*run, TrainerState(step=1, settings={}))
    train_step(LossModule(run[0]).train(), run[1], [next(loader(run[0]))], step=2, learning_rate=1e-2)
    assert saver.is_writing
    assert latest_checkpoint(tmp_path) is None
    may_write.set()
    loaded = load(saver.wait())
    assert all(torch.equal(p, before[name]) for name, p in loaded.named_parameters())
    assert not torch.equal(run[0].encoder.norm.weight, before["model.encoder.norm.weight"])


def test_large_models_are_written_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing, "_FILE_BYTES", 20_000)
    run = trained(1)
    folder = save(tmp_path, 1, run)
    assert len(list(folder.glob("shard-*.safetensors"))) > 3
    model, optimizer, parameters = trained(0, seed=4)
    restore(folder, model, optimizer, parameters)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), run[0].parameters(), strict=True))


def test_it_is_a_model_that_load_reads(tmp_path):
    model, *rest = trained()
    loaded = load(save(tmp_path, 1, (model, *rest)))
    assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    for (_, ours), (_, theirs) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_no_file_is_a_pickle(tmp_path):
    files = [path for path in save(tmp_path, 1).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja"}


def test_parameters_that_never_trained_have_no_moments(tmp_path):
    run = trained(phase=cross_attention_names)
    folder = save(tmp_path, 1, run)
    model, optimizer, parameters = trained(0)
    restore(folder, model, optimizer, parameters)
    names = {name for name, p in parameters.items() if p in optimizer.state}
    assert names == cross_attention_names(model, parameters)


@pytest.mark.parametrize("victim", ["shard-00001-model", "trainer.json"])
def test_a_full_disk_leaves_the_older_checkpoint_and_says_so(tmp_path, monkeypatch, victim):
    older = save(tmp_path, 1, keep=1)
    real = Path.open

    def full(path, mode="r", *arguments, **options):
        if "w" in mode and path.name.startswith(victim):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(tmp_path, 2, keep=1)
    assert latest_checkpoint(tmp_path) == older
    assert [path.name for path in older.parent.iterdir()] == ["step-000001"]
    load(older)


def test_a_half_written_folder_is_never_picked_up_and_goes_with_the_next_save(tmp_path):
    # What a process that was killed leaves behind.
    older = save(tmp_path, 1)
    partial = older.parent / ".step-000002.partial"
    partial.mkdir()
    (partial / "trainer.json").write_text("{}")
    (older.parent / "step-000009.txt").write_text("no folder")
    assert latest_checkpoint(tmp_path) == older
    save(tmp_path, 3)
    assert not partial.exists()


def test_old_ones_go_after_the_new_one_is_complete(tmp_path, monkeypatch):
    run = trained(1)
    seen = []
    real = checkpointing._remove_old

    def remove(output, keep):
        seen.append(sorted(path.name for path in (output / "checkpoints").iterdir()))
        real(output, keep)

    monkeypatch.setattr(checkpointing, "_remove_old", remove)
    for step in (8, 9, 10):
        save(tmp_path, step, run, keep=2)
    assert seen[-1] == ["step-000008", "step-000009", "step-000010"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000009",
        "step-000010",
    ]


def test_the_latest_goes_by_number(tmp_path):
    for name in ("step-999999", "step-1000000"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert latest_checkpoint(tmp_path).name == "step-1000000"
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_another_model_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    model = tiny_model(tie_word_embeddings="none")
    parameters = trainable_parameters(model)
    optimizer = new_optimizer(model, parameters, OptimizerConfig(learning_rate=1e-2))
    with pytest.raises(ValueError, match=r"lm_head.out_proj.weight"):
        restore(folder, model, optimizer, parameters)


def test_other_shapes_are_refused(tmp_path):
    run = trained(1)
    folder = save(tmp_path, 1, run)
    model = tiny_model()
    model.encoder.norm.weight = torch.nn.Parameter(torch.ones(7))
    parameters = trainable_parameters(model)
    with pytest.raises(ValueError, match=r"encoder.norm.weight has shape \[32\], this model's has \[7\]"):
        restore(folder, model, run[1], parameters)


def test_other_trained_parameters_are_refused(tmp_path):
    folder = save(tmp_path, 1)
    model = tiny_model()
    model.encoder.requires_grad_(False)
    parameters = trainable_parameters(model)
    optimizer = new_optimizer(model, parameters, OptimizerConfig(learning_rate=1e-2))
    with pytest.raises(ValueError, match="does not fit this model"):
        restore(folder, model, optimizer, parameters)


def test_another_format_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    content = json.loads((folder / "trainer.json").read_text()) | {"format": 1}
    (folder / "trainer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="format"):
        read_state(folder)


def test_changes_are_listed_by_their_dotted_key():
    old = {"a": {"b": 1, "c": [1, 2]}, "steps": 3, "gone": None, "same": []}
    new = {"a": {"b": 2, "c": (1, 3)}, "steps": 4, "new": True, "same": ()}
    assert changed_settings(old, new, free=frozenset({"steps"})) == [
        "a.b: 1 -> 2",
        "a.c.1: 2 -> 3",
        "gone: None -> not set",
        "new: not set -> True",
    ]
