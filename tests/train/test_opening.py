import signal

import pytest

import twofold
from tests.train.ranks import on_ranks
from tests.train.test_parallel import close, run
from tests.train.tiny_run import loader, settings, tiny_model
from twofold.config.opening import OpeningConfig
from twofold.train import Callback, fit
from twofold.train.opening import Masks, Opening, future_weight, num_open, open_share

CLOSED = ("causal", "causal", "causal")


def opening(kind, steps=10, seed=0, masks=CLOSED, weight=1.0, **settings):
    return Opening(OpeningConfig(kind=kind, steps=steps, **settings), Masks(masks, weight), seed)


def test_functions_are_exact_at_both_ends():
    assert [num_open(step, 10, 3) for step in (0, 1, 3, 4, 6, 7, 10, 99)] == [0, 1, 1, 2, 2, 3, 3, 3]
    assert [num_open(step, 3, 30) for step in range(4)] == [0, 10, 20, 30]
    assert [open_share(step, 4) for step in (-1, 0, 1, 4, 9)] == [0, 0, 0.25, 1, 1]
    assert [future_weight(step, 3, 1e-3) for step in (0, 3, 4)] == [0, 1, 1]
    assert [future_weight(step, 3, 1e-3) for step in (1, 2)] == pytest.approx([0.01, 0.1])


@pytest.mark.parametrize("kind", ["layers", "future_weight", "batches"])
@pytest.mark.parametrize("mask", ["sink", "bidirectional"])
def test_a_run_begins_with_the_models_masks_and_ends_open(kind, mask):
    schedule = opening(kind, mask=mask, masks=("sink", "causal", "causal"))
    assert schedule.after(0) == Masks(("sink", "causal", "causal"))
    for step in (10, 11, 1000):
        assert schedule.after(step) == schedule.of_batch(step, 5) == Masks((mask,) * 3)


def test_layers_open_in_their_order_and_from_the_top_by_default():
    assert [opening("layers", steps=3).after(n).masks for n in (1, 2)] == [
        ("causal", "causal", "sink"),
        ("causal", "sink", "sink"),
    ]
    given = opening("layers", steps=3, order=(1, 2, 0))
    assert given.of_batch(1, 0).masks == ("causal", "sink", "causal")
    assert given.of_batch(2, 7).masks == ("causal", "sink", "sink")


def test_a_growing_weight_is_over_all_layers():
    assert opening("future_weight", steps=2, lowest_weight=0.01).after(1) == Masks(("sink",) * 3, 0.1)
    # Without a lowest weight: from the model's own, so that the first step is no jump.
    schedule = opening("future_weight", steps=2, masks=("sink",) * 3, weight=0.25)
    assert [schedule.after(step).future_weight for step in range(3)] == [0.25, 0.5, 1.0]
    assert opening("future_weight", steps=3).after(2).future_weight == pytest.approx(0.1)


def test_batches_open_in_a_growing_share_that_follows_the_seed():
    schedule = opening("batches", steps=100)

    def share(step, seed=0):
        schedule = opening("batches", steps=100, seed=seed)
        return sum(schedule.of_batch(step, stream).masks == ("sink",) * 3 for stream in range(400)) / 400

    assert share(10) == pytest.approx(0.1, abs=0.05)
    assert share(80) == pytest.approx(0.8, abs=0.05)
    assert schedule.after(10) == Masks(("sink",) * 3)
    drawn = [schedule.of_batch(50, stream) for stream in range(20)]
    assert drawn == [opening("batches", steps=100).of_batch(50, stream) for stream in range(20)]
    assert drawn != [opening("batches", steps=100, seed=1).of_batch(50, stream) for stream in range(20)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": (0, 1)}, r"unknown: \[\], missing: \[2\]"),
        ({"order": (0, 1, 3)}, r"unknown: \[3\], missing: \[2\]"),
        ({"order": (0, 0, 1, 2)}, "twice"),
        ({"kind": "batches", "order": (0, 1, 2)}, "order is for kind 'layers'"),
        ({"lowest_weight": 0.1}, "lowest_weight is for kind 'future_weight'"),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_schedules_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        opening(**({"kind": "layers"} | changes))


def test_an_opening_must_end_within_the_run():
    with pytest.raises(ValueError, match=r"opening.steps \(7\) must not be more than steps \(6\)"):
        settings(opening={"kind": "layers", "steps": 7})


class Seen(Callback):
    """What the encoder saw in each forward pass."""

    def __init__(self, model):
        self.masks = []
        model.encoder.register_forward_pre_hook(
            lambda module, _: self.masks.append((module.layer_masks, module.future_weight))
        )


@pytest.mark.parametrize("kind", ["layers", "future_weight", "batches"])
def test_a_run_opens_its_encoder(tmp_path, kind):
    model = tiny_model(encoder_mask=("causal", "causal"))
    seen = Seen(model)
    config = settings(steps=5, opening={"kind": kind, "steps": 4}, save_every=1, keep_checkpoints=9)
    fit(model, loader(model), None, config, tmp_path / "run")
    schedule = Opening(config.opening, Masks(("causal", "causal")), 0)
    assert [Masks(*one) for one in seen.masks] == [schedule.of_batch(step, 0) for step in range(1, 6)]
    assert seen.masks[-1] == (("sink", "sink"), 1.0)
    assert Masks.of(model) == Masks(("sink", "sink"))
    for step in (1, 3, 5):
        saved = twofold.load(tmp_path / "run" / "checkpoints" / f"step-{step:06d}")
        assert Masks.of(saved) == schedule.after(step)


CLOSED_MODEL = {"encoder_mask": ("causal", "causal")}


@pytest.mark.parametrize("kind", ["layers", "future_weight", "batches"])
def test_ranks_open_alike(tmp_path, kind):
    changes = {"opening": {"kind": kind, "steps": 3}}
    one = run(tmp_path / "one", changes, CLOSED_MODEL)
    two = on_ranks(run, 2, tmp_path / "two", changes, CLOSED_MODEL)
    assert close(two[0][0], one[0])
    assert not close(run(tmp_path / "closed", {}, CLOSED_MODEL)[0], one[0])


class StopAfterTwo(Callback):
    def on_step(self, step, result):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("kind", ["layers", "future_weight", "batches"])
def test_a_resumed_run_opens_as_the_one_that_never_stopped(tmp_path, kind):
    """Resumed as `twofold train` does it: from a checkpoint, whose masks are those of its step."""
    changes = {"opening": {"kind": kind, "steps": 4}}
    whole = run(tmp_path / "whole", changes, CLOSED_MODEL)
    run(tmp_path / "parts", changes, CLOSED_MODEL, callbacks=[StopAfterTwo()])
    (checkpoint,) = (tmp_path / "parts" / "checkpoints").glob("step-*")
    masks = {"encoder_mask": twofold.load(checkpoint).config.encoder_mask}
    rest = run(tmp_path / "parts", changes, masks, resume=True)
    assert rest == whole
