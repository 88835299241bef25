"""The whole protocol on tiny models and files: it learns, restores, resumes, and says what it left out."""

import json
import sys
from dataclasses import replace
from itertools import chain, cycle, product
from types import SimpleNamespace

import pytest
import torch

from tests.models.tiny import build, pair_config, stack
from twofold.evaluate import Contender, Evaluation
from twofold.evaluate.superglue import Grid, Tuning, protocol, run, tune
from twofold.evaluate.superglue.cells import Cell, CellFile
from twofold.evaluate.superglue.tune import Tuned
from twofold.train.step import NonFiniteError

NOUNS = ["cat", "dog", "hen", "cow", "fox", "owl", "ant", "bee"]
PLACES = ["here", "at home", "in the big house", "up there"]
ONE_CELL = Grid(learning_rates=(1e-2,), batch_sizes=(8,), dropout_rates=(0.0,))
FAST = Tuning(epochs=6)

DECODER_ONLY = {"encoder_mask": ("causal",) * 2, "tie_stacks": True, "tie_word_embeddings": "all"}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    def load_dataset(path, name, split):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


@pytest.fixture
def contender(byte_tokenizer):
    """A new one at every call: two layers, started as from scratch."""

    def make(**changes):
        settings = {
            "layout": "merged", "reads": "aligned", "cross_rope": True, "decoder_positions": "continue",
            "decoder_start": "last_source_token", "bos_token_id": 256, "eos_token_ids": (257,), "pad_token_id": 257,
        }  # fmt: skip
        two = stack(
            vocab_size=258,
            num_hidden_layers=2,
            layer_types=("full_attention",) * 2,
            max_position_embeddings=128,
        )
        model = build(pair_config(two, **(settings | changes)))
        model.initialise_randomly(seed=1)
        model.tokenizer = byte_tokenizer
        kind = "decoder-only" if changes else "encoder-decoder"
        return Contender(name="tiny", path="a/tiny", kind=kind, model=model)

    return make


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def data(tmp_path):
    """RTE, WiC and BoolQ in their own formats, COPA and MultiRC in the hub's; dev sets of other nouns. The answer is
    whether the text ends in a word with z."""
    folder = tmp_path / "data"
    for split, hub_split, nouns in (("train", "train", NOUNS[:6]), ("dev", "validation", NOUNS[6:])):
        texts = [
            (f"The {noun} is {place}.", end) for noun, place, end in product(nouns, PLACES, ("zz", "oo"))
        ]
        labels = {"zz": "entailment", "oo": "not_entailment"}
        rows = [f"{i}\t{text}\tIt {end}\t{labels[end]}" for i, (text, end) in enumerate(texts)]
        write_lines(folder / f"rte/{split}.tsv", ["index\tsentence1\tsentence2\tlabel", *rows])
        write_lines(
            folder / f"wic/{split}.data.txt", [f"is\tV\t1-1\t{text}\tIt {end}" for text, end in texts]
        )
        write_lines(folder / f"wic/{split}.gold.txt", ["T" if end == "zz" else "F" for _, end in texts])
        boolq = [
            {"query": f"A -- {t}\nQuestion: {e}?\nAnswer:", "choices": ["yes", "no"], "gold": int(e != "zz")}
            if split == "train"
            else {"passage": t, "question": e, "answer": e == "zz"}
            for t, e in texts
        ]
        write_lines(folder / f"boolq-{hub_split}.jsonl", map(json.dumps, boolq))
        copa = [
            {"premise": t, "question": "cause", "choice1": e, "choice2": other, "label": int(e != "zz")}
            for (t, e), other in zip(texts, cycle(("oo", "zz")), strict=False)
        ]
        write_lines(folder / f"super_glue-copa-{hub_split}.jsonl", map(json.dumps, copa))
    multirc = {"paragraph": "a", "question": "b", "answer": "c", "label": 0}
    write_lines(folder / "super_glue-multirc-validation.jsonl", [json.dumps(multirc)])
    return folder


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("changes", [{}, DECODER_ONLY], ids=["encoder-decoder", "decoder-only"])
def test_it_learns_what_can_be_learnt(changes, contender, data, tmp_path):
    """Accuracy 1 on unseen nouns, from files in the real formats; the rest is skipped, and the mean says so."""
    given = contender(**changes)
    before = weights(given.model)
    heard = []
    found = run(
        given,
        out=tmp_path / "out.json",
        data=data,
        grid=ONE_CELL,
        tuning=FAST,
        device="cpu",
        say=heard.append,
    )
    assert {name: task.value for name, task in found.tasks.items()} == {
        "superglue_boolq": 1.0, "superglue_copa": 1.0, "superglue_rte": 1.0, "superglue_wic": 1.0,
    }  # fmt: skip
    rte = found.tasks["superglue_rte"]
    assert (rte.metric, rte.n, rte.values, rte.error) == ("acc", 16, (1.0,) * 16, 0.0)
    assert (rte.others, rte.n_truncated, rte.target_tokens) == ({"majority": 0.5}, 0, 0.0)
    lengths = [len(f"rte premise: The {n} is {p}. hypothesis: It zz") for n, p in product(NOUNS[6:], PLACES)]
    assert rte.source_tokens == sum(lengths) / len(lengths)
    assert found.settings["mean_accuracy"] == 1.0
    assert found.settings["mean_over"] == ["boolq", "copa", "rte", "wic"]
    skipped = found.settings["skipped"]
    assert list(skipped) == ["cb", "multirc", "wsc"]
    assert f"{data} has no train split of multirc, and the hub cannot be reached" in skipped["multirc"]
    assert [line.split(":")[0] for line in heard[:3]] == ["cb", "multirc", "wsc"]
    assert (found.model, found.path, found.kind) == ("tiny", "a/tiny", given.kind)
    assert found.settings["examples"]["rte"]["labels"] == ["entailment", "not_entailment"]
    assert found.settings["examples"]["rte"]["n_train_of_label"] == [24, 24]
    assert Evaluation.load(tmp_path / "out.json") == found
    after = given.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not given.model.training
    assert all(p.grad is None for p in given.model.parameters())


def same(found: Evaluation) -> dict:
    """What must not depend on when and how often a run was stopped: everything but times."""
    settings = json.loads(json.dumps(found.settings))
    for cell in chain(settings["best"].values(), *settings["cells"].values()):
        cell["seconds"] = cell["step_s"] = 0.0
    return {
        "tasks": found.tasks,
        "settings": settings,
        "rest": replace(found, tasks={}, settings={}, seconds=0.0, date=""),
    }


GRID = Grid(learning_rates=(1e-3, 1e-2), batch_sizes=(8,), dropout_rates=(0.0, 0.3))
SHORT = Tuning(steps=3)


@pytest.mark.parametrize("n_before", [0, 1, 5])
def test_an_interrupted_run_goes_on_and_gives_the_same(n_before, contender, data, tmp_path):
    """Stopped while cell `n_before` of 8 trains; the finished ones are not run again."""
    settings = {"tasks": ("rte", "copa"), "data": data, "grid": GRID, "tuning": SHORT, "device": "cpu"}
    whole = run(contender(), out=tmp_path / "whole.json", **settings)
    losses = {cell["last_loss"] for cells in whole.settings["cells"].values() for cell in cells}
    assert len(losses) == 8
    heard = []

    def stop(message):
        heard.append(message)
        if len(heard) == n_before:
            raise KeyboardInterrupt

    out = tmp_path / "out.json"
    model = contender()
    if n_before:
        before = weights(model.model)
        with pytest.raises(KeyboardInterrupt):
            run(model, out=out, say=stop, **settings)
        assert all(torch.equal(tensor, model.model.state_dict()[name]) for name, tensor in before.items())
        assert not out.exists()
        with pytest.raises(FileExistsError, match="resume"):
            run(contender(), out=out, **settings)
    heard = []
    resumed = run(contender(), out=out, resume=True, say=heard.append, **settings)
    assert len(heard) == 8 - n_before
    assert same(resumed) == same(whole)
    assert sorted(file.name for file in tmp_path.glob("out*")) == ["out.cells.json", "out.json"]


def test_a_model_stopped_within_a_cell_is_what_it_was(contender, data, tmp_path, monkeypatch):
    given = contender()
    before = weights(given.model)
    steps = []

    def accumulate(classifier, batch, tuning):
        steps.append(whole(classifier, batch, tuning))
        if len(steps) == 2:
            raise KeyboardInterrupt
        return steps[-1]

    whole = tune.accumulate
    monkeypatch.setattr(tune, "accumulate", accumulate)
    with pytest.raises(KeyboardInterrupt):
        run(
            given,
            out=tmp_path / "out.json",
            tasks=("rte",),
            data=data,
            grid=ONE_CELL,
            tuning=SHORT,
            device="cpu",
        )
    after = given.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any(module.training for module in given.model.modules())
    assert all(p.grad is None for p in given.model.parameters())


def test_every_cell_starts_from_the_same_weights(contender, data, tmp_path):
    """What a cell gives does not depend on the cells and tasks before it."""
    settings = {"data": data, "tuning": SHORT, "device": "cpu"}
    many = run(contender(), out=tmp_path / "many.json", tasks=("copa", "rte"), grid=GRID, **settings)
    alone = Grid(learning_rates=(1e-2,), batch_sizes=(8,), dropout_rates=(0.3,))
    one = run(contender(), out=tmp_path / "one.json", tasks=("rte",), grid=alone, **settings)
    (wanted,) = one.settings["cells"]["rte"]
    found = many.settings["cells"]["rte"][3]
    assert {**found, "seconds": 0, "step_s": 0} == {**wanted, "seconds": 0, "step_s": 0}


def test_more_tasks_and_a_larger_grid_take_up_the_cells_of_fewer(contender, data, tmp_path):
    """What belongs to a task that is not run again stays, with what it was made of."""
    settings = {"out": tmp_path / "out.json", "data": data, "tuning": SHORT, "device": "cpu"}
    first = run(contender(), tasks=("rte",), grid=ONE_CELL, **settings)
    run(contender(), tasks=("wic",), grid=ONE_CELL, resume=True, **settings)
    heard = []
    last = run(contender(), tasks=("copa", "rte"), grid=GRID, resume=True, say=heard.append, **settings)
    assert len(heard) == 4 + 3
    assert last.settings["cells"]["rte"][2] == first.settings["cells"]["rte"][0]
    assert list(last.tasks) == ["superglue_copa", "superglue_rte"]
    assert Evaluation.load(tmp_path / "out.json") == last
    (data / "wic/dev.gold.txt").write_text("T\n" * 16)
    with pytest.raises(ValueError, match="begun with other settings: wic: examples was"):
        run(contender(), tasks=("wic",), grid=ONE_CELL, resume=True, **settings)


def test_the_best_cell_is_scored_and_a_failed_one_recorded(contender, data, tmp_path, monkeypatch):
    """1e-3 answers all with label 0, half right; 1e-2 all but one right; 5e-2 leaves the finite numbers."""

    def tune(model, task, train, dev, *, learning_rate, **rest):
        if learning_rate == 5e-2:
            raise NonFiniteError("step 2 has loss nan")
        answers = (
            [0] * len(dev) if learning_rate == 1e-3 else [1 - dev[0].label, *(one.label for one in dev[1:])]
        )
        return Tuned(answers=tuple(answers), first_loss=1.0, last_loss=0.5, steps=2, seconds=1.5, step_s=0.5)

    monkeypatch.setattr(protocol, "tune", tune)
    settings = {"out": tmp_path / "out.json", "tasks": ("rte",), "data": data, "device": "cpu"}
    three = Grid(learning_rates=(5e-2, 1e-3, 1e-2), batch_sizes=(8,), dropout_rates=(0.0,))
    found = run(contender(), grid=three, **settings)
    rte = found.tasks["superglue_rte"]
    assert (rte.value, rte.values) == (15 / 16, (0.0,) + (1.0,) * 15)
    assert rte.error == pytest.approx((15 / 16 * 1 / 16 / 15) ** 0.5)
    assert [cell["accuracy"] for cell in found.settings["cells"]["rte"]] == [None, 0.5, 15 / 16]
    assert found.settings["cells"]["rte"][0]["failure"] == "step 2 has loss nan"
    assert found.settings["best"]["rte"]["learning_rate"] == 1e-2
    assert found.seconds == 3.0
    one = Grid(learning_rates=(5e-2,), batch_sizes=(8,), dropout_rates=(0.0,))
    with pytest.raises(ValueError, match=r"no cell of rte stayed finite .*lr 0.05.*step 2 has loss nan"):
        run(contender(), grid=one, resume=True, **settings)


def test_equal_cells_go_to_the_first():
    settings = {"task": "rte", "batch_size": 8, "dropout_rate": 0.0, "accuracy": 0.5}
    cells = [Cell(learning_rate=rate, **settings) for rate in (2e-3, 1e-3)]
    assert protocol.best_of(cells).learning_rate == 2e-3


def test_limits_and_cut_texts_are_stated(contender, data, tmp_path):
    """Of the dev set the first; of the training set a draw that the seed decides."""
    settings = {
        "tasks": ("rte",),
        "data": data,
        "grid": ONE_CELL,
        "device": "cpu",
        "limit_train": 20,
        "limit_dev": 8,
    }
    short = Tuning(steps=1, max_tokens=50)
    found = [
        run(contender(), out=tmp_path / f"{i}.json", tuning=short, seed=seed, **settings)
        for i, seed in enumerate((0, 0, 1))
    ]
    texts = [f"rte premise: The {n} is {p}. hypothesis: It zz" for n, p in product(NOUNS[6:], PLACES)][:4]
    n_long = 2 * sum(len(text) > 50 for text in texts)
    rte = found[0].tasks["superglue_rte"]
    assert 0 < n_long < 8
    assert (rte.n, rte.n_truncated, found[0].settings["tuning"]["max_tokens"]) == (8, n_long, 50)
    examples = [one.settings["examples"]["rte"] for one in found]
    assert (examples[0]["n_train"], examples[0]["n_dev"], examples[0]["n_dev_truncated"]) == (20, 8, n_long)
    assert examples[0]["n_train_truncated"] > 0
    assert examples[0] == examples[1]
    assert examples[0]["examples"] != examples[2]["examples"]


def test_settings_of_another_run_are_not_continued(contender, data, tmp_path):
    settings = {
        "out": tmp_path / "out.json",
        "tasks": ("rte",),
        "data": data,
        "grid": ONE_CELL,
        "device": "cpu",
    }
    run(contender(), tuning=SHORT, **settings)
    with pytest.raises(FileExistsError, match=r"out.json exists; continue it with resume"):
        run(contender(), tuning=SHORT, **settings)
    with pytest.raises(ValueError, match="begun with other settings: seed was 0, now 1"):
        run(contender(), tuning=SHORT, seed=1, resume=True, **settings)
    with pytest.raises(ValueError, match="begun with other settings: model was"):
        run(contender(**DECODER_ONLY), tuning=SHORT, resume=True, **settings)
    (data / "rte/dev.tsv").write_text("0\tx\ty\tentailment\n")
    with pytest.raises(ValueError, match="begun with other settings: rte: examples was"):
        run(contender(), tuning=SHORT, resume=True, **settings)


def test_what_cannot_run(contender, data, tmp_path):
    settings = {"out": tmp_path / "out.json", "data": data, "device": "cpu"}
    with pytest.raises(ValueError, match=r"SuperGLUE's tasks are boolq, .*; got piqa"):
        run(contender(), tasks=("rte", "piqa"), **settings)
    with pytest.raises(ValueError, match="got none"):
        run(contender(), tasks=(), **settings)
    with pytest.raises(ValueError, match="limit_dev must be at least 1 or None, got 0"):
        run(contender(), limit_dev=0, **settings)
    with pytest.raises(
        ValueError, match=r"there is no task to run \(wsc: .* has no train and validation split"
    ):
        run(contender(), tasks=("wsc",), **settings)
    with pytest.raises(
        ValueError, match=r"none of the 1 training examples of rte has the label .*; raise limit_train"
    ):
        run(contender(), tasks=("rte",), limit_train=1, **settings)
    half = contender()
    half.model.bfloat16()
    with pytest.raises(ValueError, match="master weights are kept in float32"):
        run(half, tasks=("rte",), **settings)
    assert list(tmp_path.glob("out*")) == []


def test_a_grid_from_text():
    found = Grid.parse("lr=1e-5,3e-5 batch=8 dropout=0,0.1")
    assert found == Grid(learning_rates=(1e-5, 3e-5), batch_sizes=(8,), dropout_rates=(0.0, 0.1))
    assert list(found.points) == [(1e-5, 8, 0.0), (1e-5, 8, 0.1), (3e-5, 8, 0.0), (3e-5, 8, 0.1)]
    assert Grid.parse("batch=4") == Grid(batch_sizes=(4,))
    assert Grid.parse("") == Grid()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rate=1", "a grid looks like .* got 'rate=1'"),
        ("lr", "got 'lr'"),
        ("lr=1e-5 lr=2e-5", "got 'lr=2e-5'"),
        ("batch=1.5", "takes numbers with commas between them, got 'batch=1.5'"),
        ("lr=1e-5,", "takes numbers"),
        ("lr=0", "learning_rates needs"),
        ("batch=0", "batch_sizes needs"),
        ("dropout=1", "dropout_rates needs"),
        ("lr=1e-5,1e-5", "learning_rates needs at least one value and none twice"),
    ],
)
def test_text_that_is_no_grid(text, problem):
    with pytest.raises(ValueError, match=problem):
        Grid.parse(text)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"settings": {}, "tasks": {}, "cells": [{}]}', '{"settings": {}, "cells": []}']
)
def test_other_files_are_no_cells(text, tmp_path):
    (tmp_path / "x.cells.json").write_text(text)
    with pytest.raises(ValueError, match="does not hold cells of SuperGLUE"):
        CellFile(tmp_path / "x.cells.json", {}, {})
