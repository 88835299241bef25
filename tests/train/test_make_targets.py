"""Stored targets against transformers reading each text alone, and against the teacher in the loop."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.train.tiny_run import BOS, PAD, TEXTS, VOCAB, recipe
from tests.train.tiny_teacher import next_token_distributions, save_donor, student
from twofold.checkpoint.save import save
from twofold.config.distillation import DistillationConfig
from twofold.config.targets import TargetsRecipe
from twofold.data import targets as targets_module
from twofold.data.targets import TargetReader, name_store, read_header
from twofold.train import LossModule, train
from twofold.train.make_targets import make_targets
from twofold.train.run import build_loaders
from twofold.train.step import scored_positions
from twofold.train.teacher import open_distillation, stored_teacher


def targets_recipe(folder: Path, **changes) -> TargetsRecipe:
    if not (folder / "start").exists():
        save(student(), folder / "start")
        (folder / "texts.txt").write_text("\n".join(TEXTS))
    data = {
        "sources": [{"path": str(folder / "texts.txt"), "document": "line"}],
        "held_out_fraction": 0.2,
        "source_length": 24,
        "target_length": 24,
        "rows_per_batch": 2,
    }
    values = {
        "stage": "distill-targets",
        "teacher": str(folder / "donor"),
        "model": {"path": str(folder / "start")},
        "data": data | changes.pop("data", {}),
        "output": str(folder / "targets"),
        "method": "top_k",
        "k": VOCAB,
        "precision": "float32",
        "shard_tokens": 300,
        "device": "cpu",
    }
    return TargetsRecipe(**(values | changes))


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def distillation(model, **settings):
    return open_distillation(
        DistillationConfig(**settings),
        model,
        pad_multiple=8,
        max_raw_length=64,
        precision="float32",
        device=torch.device("cpu"),
    )


def losses_of(model, run, **settings):
    """The losses of all training batches, under a teacher."""
    made = distillation(model, **settings)
    loader, _ = build_loaders(run.data, model, teaching=made.teaching)
    module = LossModule(model, teacher=made.teacher).train()
    with torch.no_grad():
        return [module(batch, scored_positions(batch)).item() for batch in loader.one_pass()]


def test_every_token_has_what_transformers_says(tmp_path):
    donor = save_donor(tmp_path / "donor", adds_bos=True)
    run = targets_recipe(tmp_path)
    result = make_targets(run)
    assert result.is_complete
    header = read_header(tmp_path / "targets")
    assert len(header.shards) == result.num_shards_of_all > 2
    loader, _ = build_loaders(run.data, student())
    corpus = loader._corpora[0]
    reader = TargetReader(tmp_path / "targets", [name_store(corpus.store, "")])
    checked = 0
    for start, end in [p[1:3] for p in loader._units[0].locate(np.arange(loader.num_units))]:
        text = corpus.store.tokens[start:end].tolist()
        wanted = next_token_distributions(donor, [BOS, *text])[:-1]
        ids, shares = reader.lookup(np.zeros(end - start, dtype=np.int64), np.arange(start, end))
        said = np.zeros((end - start, VOCAB), dtype=np.float32)
        np.add.at(said, (np.arange(end - start)[:, None], ids), shares)
        # Relative to float16's own steps.
        np.testing.assert_allclose(said, wanted.half().float().numpy(), rtol=2e-3, atol=1e-7)
        checked += end - start
    kept = np.concatenate([np.load(f) for f in sorted((tmp_path / "targets").glob("shard-*/kept.npy"))])
    assert (kept > 0).sum() == checked
    # What is held out, and places that are in no store, have no targets.
    held_out = np.flatnonzero(~np.isin(np.arange(corpus.store.num_documents), corpus.indices()))
    places = np.asarray([-1, corpus.store.offsets[held_out[0]], corpus.store.num_tokens + 7])
    assert not reader.lookup(np.zeros(3, dtype=np.int64), places)[1].any()


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("decoder_start", ["bos", "last_source_token"])
@pytest.mark.parametrize("kind", ["prefix_lm", "supervised"])
def test_all_of_the_vocabulary_stored_is_the_teacher_in_the_loop(tmp_path, kind, decoder_start, adds_bos):
    save_donor(tmp_path / "donor", adds_bos=adds_bos)
    save(student(decoder_start=decoder_start), tmp_path / "start")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    data = {}
    if kind == "supervised":
        pairs = [{"q": f"question {n}?" * (n % 3 + 1), "a": f"the answer {n}"} for n in range(9)]
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        source = {"path": str(tmp_path / "pairs.jsonl"), "prompt_field": "q", "completion_field": "a"}
        data = {"sources": [source], "objective": {"name": "supervised"}, "max_length_action": "truncate"}
    run = targets_recipe(tmp_path, data=data)
    make_targets(run)
    model = student(decoder_start=decoder_start)
    stored = losses_of(model, run, targets=run.output)
    in_the_loop = losses_of(model, run, teacher=run.teacher)
    plain = losses_of(model, run, teacher=run.teacher, share=0.5)
    # Shares are rounded to float16: relative steps of 5e-4, which mostly cancel.
    assert stored == pytest.approx(in_the_loop, rel=1e-4)
    assert plain == in_the_loop  # the share is the module's to apply
    labels = LossModule(model).train()
    loader, _ = build_loaders(run.data, model)
    with torch.no_grad():
        hard = [labels(batch, scored_positions(batch)).item() for batch in loader.one_pass()]
    assert not np.allclose(hard, stored, rtol=1e-2)


@pytest.mark.parametrize(("method", "k"), [("top_k", 5), ("sample", 16)])
def test_the_loss_is_that_of_the_stored_shares_without_the_rounding(tmp_path, method, k):
    """The reader, the collation and the loss, against a plain sum over what the files hold."""
    save_donor(tmp_path / "donor")
    run = targets_recipe(tmp_path, method=method, k=k)
    make_targets(run)
    model = student()
    made = distillation(model, targets=run.output)
    loader, _ = build_loaders(run.data, model, teaching=made.teaching)
    reader = TargetReader(run.output, [name_store(loader._corpora[0].store, "")])
    module, total, naive = LossModule(model, teacher=made.teacher).train(), 0.0, 0.0
    with torch.no_grad():
        for batch in loader.one_pass():
            total += module(batch, scored_positions(batch)).item()
        for piece in loader._in_order():
            example = piece.example
            logits = model(
                input_ids=torch.from_numpy(example.source)[None],
                attention_mask=torch.ones(1, len(example.source), dtype=torch.bool),
                decoder_input_ids=torch.from_numpy(example.decoder_input_ids)[None],
                decoder_attention_mask=torch.ones(1, example.decoder_length, dtype=torch.bool),
            ).logits[0, len(example.decoder_prefix) - 1 :]
            for logit, token, origin in zip(logits, example.target, example.raw.origins, strict=True):
                log_p = logit.double().log_softmax(0)
                place = np.asarray([example.raw.start + origin if origin >= 0 else -1])
                ids, shares = reader.lookup(np.zeros(1, dtype=np.int64), place)
                entries = {int(i): float(s) for i, s in zip(ids[0], shares[0], strict=True) if s > 0}
                assert len(entries) <= k
                if not entries:
                    naive -= float(log_p[token])
                for i, share in entries.items():
                    naive -= share / sum(entries.values()) * float(log_p[i])
    assert total == pytest.approx(naive, rel=1e-5)


def test_ul2_takes_the_same_targets(tmp_path):
    """Predictions belong to tokens, so another objective with the same store uses them; sentinels stay one-hot."""
    save_donor(tmp_path / "donor")
    run = targets_recipe(tmp_path)
    make_targets(run)
    model = student()
    made = distillation(model, targets=run.output)
    objective = {"name": "ul2", "preset": "t5gemma2"}
    data = type(run.data).model_validate(run.data.model_dump() | {"objective": objective})
    loader, _ = build_loaders(data, model, teaching=made.teaching)
    silent = spoken = 0
    for batch in loader.one_pass():
        scored = scored_positions(batch)
        labels, teacher = batch.labels.flatten()[scored], stored_teacher(batch, scored)
        says = teacher.shares_NK.sum(1)
        torch.testing.assert_close(says[says > 0], torch.ones(int((says > 0).sum())))
        assert not says[labels >= PAD].any()
        silent, spoken = silent + int((says == 0).sum()), spoken + int((says > 0).sum())
    assert spoken > silent > 0


def test_several_processes_divide_the_shards(tmp_path, monkeypatch):
    save_donor(tmp_path / "donor")
    make_targets(targets_recipe(tmp_path, method="sample", k=8))
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = targets_recipe(tmp_path, method="sample", k=8, output=str(tmp_path / "parts"))
    monkeypatch.setenv("RANK", "1")
    first = make_targets(parts)
    assert not first.is_complete
    with pytest.raises(FileNotFoundError, match=r"not complete: \d+ of \d+ shards are missing"):
        TargetReader(tmp_path / "parts", [])
    monkeypatch.setenv("RANK", "0")
    second = make_targets(parts)
    assert second.is_complete
    assert first.num_shards + second.num_shards == second.num_shards_of_all
    assert files(tmp_path / "parts") == files(tmp_path / "targets")
    make_targets(targets_recipe(tmp_path, method="sample", k=8, seed=1, output=str(tmp_path / "other")))
    other, same = (files(tmp_path / name) for name in ("other", "targets"))
    # Each unit has draws of its own, by the seed of the run.
    name = "shard-000000/ids.npy"
    assert other[name] != same[name]


def test_a_killed_run_goes_on_to_the_same_files(tmp_path):
    save_donor(tmp_path / "donor")
    whole = targets_recipe(tmp_path, method="sample", k=32, shard_tokens=60)
    make_targets(whole)
    again = whole.model_copy(update={"output": str(tmp_path / "killed")})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(again.model_dump(mode="json")))
    # Slow at the end of each shard's file, so that the kill comes while one is written.
    script = (
        "import sys, time, numpy as np\n"
        "from twofold.config.recipe import read_recipe\n"
        "from twofold.config.targets import TargetsRecipe\n"
        "from twofold.train.make_targets import make_targets\n"
        "save = np.save\n"
        "def slow(*args):\n"
        "    save(*args)\n"
        "    time.sleep(0.2)\n"
        "np.save = slow\n"
        "make_targets(read_recipe(TargetsRecipe, sys.argv[1]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "recipe.yaml")], env=os.environ)
    deadline = time.monotonic() + 120
    killed = tmp_path / "killed"
    while not (len(list(killed.glob("shard-*"))) >= 2 and list(killed.glob(".shard-*/shares.npy"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    complete = files(killed)
    assert 2 <= len(list(killed.glob("shard-*"))) < len(list((tmp_path / "targets").glob("shard-*")))
    times = {name: (killed / name).stat().st_mtime_ns for name in complete if name.startswith("shard-")}
    make_targets(again)
    assert files(killed) == files(tmp_path / "targets")
    assert all((killed / name).stat().st_mtime_ns == when for name, when in times.items())  # kept, not redone


def test_what_does_not_fit_is_refused(tmp_path):
    save_donor(tmp_path / "donor")
    run = targets_recipe(tmp_path)
    make_targets(run)
    before = files(tmp_path / "targets")
    with pytest.raises(FileExistsError, match=r"differ from these in k, seed"):
        make_targets(run.model_copy(update={"k": 3, "seed": 1}))
    assert files(tmp_path / "targets") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        make_targets(run.model_copy(update={"output": str(tmp_path / "full")}))
    assert files(tmp_path / "full").keys() == {"notes.txt"}
    # Other texts, though as many and as long.
    (tmp_path / "texts.txt").write_text("\n".join(text.replace("fox", "cat") for text in TEXTS))
    with pytest.raises(ValueError, match=r"made for other data than .*texts.txt"):
        losses_of(student(), run, targets=run.output)
    with pytest.raises(FileNotFoundError, match=r"has no targets.json"):
        losses_of(student(), run, targets=str(tmp_path / "nowhere"))


def test_a_damaged_shard_is_found(tmp_path):
    save_donor(tmp_path / "donor")
    run = targets_recipe(tmp_path)
    make_targets(run)
    np.save(tmp_path / "targets" / "shard-000001" / "ids.npy", np.zeros(3, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"shard-000001 is damaged"):
        losses_of(student(), run, targets=run.output)


def test_nothing_is_written_where_the_disk_is_full(tmp_path, monkeypatch):
    save_donor(tmp_path / "donor")
    run = targets_recipe(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(targets_module.np, "save", full)
    with pytest.raises(OSError, match="No space"):
        make_targets(run)
    assert [path.name for path in (tmp_path / "targets").iterdir()] == ["targets.json"]
    monkeypatch.undo()
    assert make_targets(run).is_complete


def test_a_run_with_stored_targets_needs_no_teacher(tmp_path):
    save_donor(tmp_path / "donor")
    run = recipe(tmp_path)
    make_targets(targets_recipe(tmp_path, method="sample", k=32))
    shutil.rmtree(tmp_path / "donor")
    settings = {"distillation": {"targets": str(tmp_path / "targets"), "share": 0.9}}
    result = train(run.model_validate(run.model_dump() | settings))
    assert result.is_finished
    assert result.losses[-1] < result.losses[0]
