import json
import signal
import threading

import pytest
import torch

from tests.train.tiny_run import TEXTS, data_config, loader, settings, tiny_model
from twofold.checkpoint.load import load
from twofold.checkpoint.shards import ShardsSource
from twofold.train import Callback, NonFiniteError, fit, latest_checkpoint


class StopAfter(Callback):
    """Asks the run to stop as a signal would, at the end of one step."""

    def __init__(self, step):
        self.step = step

    def on_step(self, step, result):
        if step == self.step:
            signal.raise_signal(signal.SIGTERM)


class Recorder(Callback):
    def __init__(self):
        self.events = []
        self.runs = []

    def on_start(self, run):
        self.runs.append(run)

    def on_step(self, step, result):
        self.events.append(("step", step))

    def on_evaluation(self, step, evaluation):
        self.events.append(("evaluation", step))

    def on_checkpoint(self, step, path):
        self.events.append(("checkpoint", step))

    def on_end(self, result):
        self.events.append(("end", result.step))

    def close(self):
        self.events.append(("close",))


def run(output, config, *, callbacks=(), resume=False, dropout=0.0, seed=0):
    """A run with its own model and loaders, as a fresh process would have them."""
    model = tiny_model(seed, dropout=dropout)
    held_out = loader(model, TEXTS[-2:])
    train = loader(model, num_streams=config.accumulate_batches)
    return model, fit(model, train, held_out, config, output, callbacks, resume=resume)


def optimizer_tensors(checkpoint):
    source = ShardsSource(checkpoint / "optimizer")
    return {name: source.get(name) for name in source.names()}


def assert_same_run(one, other):
    """Bit for bit: weights, optimizer, losses, held-out losses, and where the data goes on."""
    (model, result), (other_model, other_result) = one, other
    assert result.losses == other_result.losses
    assert result.held_out == other_result.held_out
    assert result.tokens == other_result.tokens
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), other_model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    ours, theirs = optimizer_tensors(result.checkpoint), optimizer_tensors(other_result.checkpoint)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    states = [json.loads((r.checkpoint / "trainer.json").read_text()) for r in (result, other_result)]
    assert states[0] == states[1]


def test_a_memorised_text_has_a_low_loss(tmp_path):
    model = tiny_model()
    config = settings(steps=120, optimizer={"learning_rate": 1e-2}, schedule={"warmup_steps": 10})
    texts = ["to be or not to be, that is the question"]
    result = fit(model, loader(model, texts), loader(model, texts), config, tmp_path / "run")
    assert result.losses[0] == pytest.approx(5.56, abs=0.1)  # ln 259
    assert result.losses[-1] < 0.1
    assert result.held_out[-1][1] < 0.1
    assert [step for step, _ in result.held_out] == [0, 120]


@pytest.mark.parametrize(
    ("changes", "dropout"),
    [
        ({}, 0.0),
        ({"accumulate_batches": 2}, 0.3),
        ({"cross_attention_warmup_steps": 4, "accumulate_batches": 2}, 0.3),
        ({"cross_attention_warmup_steps": 3}, 0.0),  # stopped on the border of the phases
        ({"precision": "bfloat16"}, 0.3),
    ],
)
def test_a_resumed_run_equals_the_run_that_never_stopped(tmp_path, changes, dropout):
    config = settings(evaluate_every=3, schedule={"warmup_steps": 2}, **changes)
    whole = run(tmp_path / "whole", config, dropout=dropout)
    _, first = run(tmp_path / "parts", config, dropout=dropout, callbacks=[StopAfter(3)])
    assert (first.is_finished, first.step, first.model_path) == (False, 3, None)
    assert first.held_out[-1][0] == 0  # a stop does not wait for an evaluation
    # Another start, so that everything has to come from the checkpoint.
    resumed = run(tmp_path / "parts", config, dropout=dropout, seed=9, resume=True)
    assert resumed[1].is_finished
    assert_same_run(whole, resumed)


def test_steps_can_be_raised(tmp_path):
    schedule = {"decay": "constant"}
    whole = run(tmp_path / "whole", settings(steps=6, schedule=schedule), dropout=0.2)
    _, first = run(tmp_path / "parts", settings(steps=3, schedule=schedule), dropout=0.2)
    assert first.is_finished
    _, second = run(tmp_path / "parts", settings(steps=6, schedule=schedule), dropout=0.2, resume=True)
    assert second.losses == whole[1].losses
    assert torch.equal(load(second.model_path).encoder.norm.weight, whole[0].encoder.norm.weight)


def test_a_run_killed_after_its_checkpoint_repeats_the_lost_steps(tmp_path):
    class Die(Callback):
        def on_step(self, step, result):
            if step == 5:
                raise KeyboardInterrupt

    config = settings(save_every=2, evaluate_every=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", config, callbacks=[Die()])
    assert latest_checkpoint(tmp_path / "parts").name == "step-000004"
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut short in the middle of a line
    assert_same_run(run(tmp_path / "whole", config), run(tmp_path / "parts", config, resume=True))
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 2, 4, 6]


def test_only_cross_attention_moves_in_the_first_phase(tmp_path):
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved_by_step = {}

    class Watch(Callback):
        def on_step(self, step, result):
            moved_by_step[step] = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
            before.update({name: p.detach().clone() for name, p in model.named_parameters()})

    fit(
        model,
        loader(model),
        None,
        settings(steps=3, cross_attention_warmup_steps=2),
        tmp_path / "run",
        [Watch()],
    )
    cross = {name for name in before if "cross_attn" in name}
    assert len(cross) == 10
    assert moved_by_step == {1: cross, 2: cross, 3: set(before)}
    assert all(p.requires_grad for p in model.parameters())


def test_parameters_frozen_by_the_caller_stay_frozen(tmp_path):
    model = tiny_model()
    model.encoder.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model, loader(model), None, settings(steps=2), tmp_path / "run")
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name in before if not name.startswith("model.encoder")}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == moved


def test_what_watchers_see_and_what_is_written(tmp_path):
    seen = Recorder()
    config = settings(steps=4, evaluate_every=2, save_every=3, log_every=2)
    model, result = run(tmp_path / "run", config, callbacks=[seen])
    first = ("checkpoint", 3)  # written while training goes on, so it is complete at some time after step 3
    assert seen.events.index(first) > seen.events.index(("step", 3))
    assert [event for event in seen.events if event != first] == [
        ("evaluation", 0),
        ("step", 1),
        ("step", 2),
        ("evaluation", 2),
        ("step", 3),
        ("step", 4),
        ("evaluation", 4),
        ("checkpoint", 4),
        ("end", 4),
        ("close",),
    ]
    start = seen.runs[0]
    assert (start.steps, start.first_step, start.device) == (4, 1, "cpu")
    assert start.num_trainable == start.num_parameters == sum(p.numel() for p in model.parameters())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "loss.png",
        "metrics.jsonl",
        "model",
    ]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 2, 4, 4]
    assert lines[1]["loss"] == result.losses[1]
    final = load(result.model_path)
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(final.parameters(), model.parameters(), strict=True))


def test_callers_random_numbers_are_left_alone(tmp_path):
    model = tiny_model(dropout=0.3)
    before = torch.get_rng_state()
    fit(model, loader(model), None, settings(steps=1), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_decides_dropout(tmp_path):
    losses = [
        run(tmp_path / str(n), settings(steps=1, seed=seed), dropout=0.3)[1].losses
        for n, seed in enumerate((1, 1, 2))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_output_is_never_overwritten_unasked(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--resume"):
        run(tmp_path / "run", settings())
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        run(tmp_path / "run", settings(), resume=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_resume_without_a_folder_begins(tmp_path):
    assert run(tmp_path / "run", settings(steps=1), resume=True)[1].step == 1


def test_resume_with_other_settings_lists_them(tmp_path):
    run(tmp_path / "run", settings(steps=2))
    changed = settings(steps=3, seed=4, optimizer={"learning_rate": 1e-3}, save_every=1, log_every=2)
    with pytest.raises(ValueError, match=r"optimizer.learning_rate: 0.003 -> 0.001.*seed: 0 -> 4") as error:
        run(tmp_path / "run", changed, resume=True)
    assert "steps: " not in str(error.value)
    assert "save_every: " not in str(error.value)


def test_resume_beyond_the_last_step_is_refused(tmp_path):
    run(tmp_path / "run", settings(steps=2))
    with pytest.raises(ValueError, match="raise steps"):
        run(tmp_path / "run", settings(steps=1), resume=True)


def test_resume_of_a_finished_run_does_no_step(tmp_path):
    run(tmp_path / "run", settings(steps=2))
    seen = Recorder()
    _, result = run(tmp_path / "run", settings(steps=2), resume=True, callbacks=[seen])
    assert seen.events == [("end", 2), ("close",)]
    assert len(result.losses) == 2


def test_checks_come_before_anything_is_written(tmp_path):
    config = settings(cross_attention_warmup_steps=1)
    model = tiny_model(layout="merged")
    with pytest.raises(ValueError, match="merged"):
        fit(model, loader(model), None, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no CUDA device"):
        run(tmp_path / "run", settings(device="cuda"))


def test_a_non_finite_step_ends_the_run_and_closes_watchers(tmp_path):
    class Poison(Callback):
        def on_step(self, step, result):
            with torch.no_grad():
                model.encoder.norm.weight.fill_(float("nan"))

    model, seen = tiny_model(), Recorder()
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(NonFiniteError, match="step 2"):
        fit(model, loader(model), None, settings(), tmp_path / "run", [Poison(), seen])
    assert seen.events == [("step", 1), ("close",)]
    assert signal.getsignal(signal.SIGTERM) is handler
    assert latest_checkpoint(tmp_path / "run") is None


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT: a process started in the background inherits that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_acts_as_usual(tmp_path):
    class Twice(Callback):
        def on_step(self, step, result):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", settings(), callbacks=[Twice()])


def test_a_stop_before_the_first_step_is_resumable(tmp_path):
    class AtStart(Callback):
        def on_start(self, run):
            signal.raise_signal(signal.SIGINT)

    config = settings(steps=2)
    _, first = run(tmp_path / "run", config, callbacks=[AtStart()])
    assert (first.step, first.losses, first.checkpoint.name) == (0, [], "step-000000")
    assert_same_run(run(tmp_path / "whole", config), run(tmp_path / "run", config, resume=True))


def test_it_runs_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path / "run", settings(steps=1))))
    thread.start()
    thread.join()
    assert results[0][1].is_finished


def test_the_loader_goes_on_in_its_data(tmp_path):
    model = tiny_model()
    train = loader(model, num_streams=2)
    fit(model, train, None, settings(steps=3, accumulate_batches=2), tmp_path / "run")
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000003" / "trainer.json").read_text())
    assert [stream["counts"]["batches"] for stream in state["loader"]["streams"].values()] == [3, 3]
    assert data_config().rows_per_batch == 2
