import builtins
import json

import pytest

from tests.train.tiny_run import loader, settings, tiny_model
from twofold.train import RunStart, StepResult, fit
from twofold.train.trackers import MetricsFile

RESULT = StepResult(loss=2.5, scored_tokens=8, real_tokens=20, grad_norm=0.5, learning_rate=0.1, seconds=0.25)


def start(tmp_path, first_step=1):
    return RunStart(9, first_step, 1, 1, "cpu", tmp_path)


def test_lines_are_on_the_disk_as_they_come(tmp_path):
    metrics = MetricsFile(tmp_path / "m.jsonl", every=1)
    metrics.on_start(start(tmp_path))
    metrics.on_step(1, RESULT)
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {
        "step": 1,
        "loss": 2.5,
        "scored_tokens": 8,
        "real_tokens": 20,
        "grad_norm": 0.5,
        "learning_rate": 0.1,
        "seconds": 0.25,
    }
    metrics.close()


def test_a_resumed_run_keeps_only_lines_before_its_first_step(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    metrics = MetricsFile(path, every=1)
    metrics.on_start(start(tmp_path, first_step=3))
    metrics.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_tensorboard_and_plot_are_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = tiny_model()
    config = settings(steps=2, tensorboard=True)
    result = fit(model, loader(model), loader(model), config, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2]
    assert [event.value for event in losses] == pytest.approx(result.losses, rel=1e-6)
    assert [event.step for event in events.Scalars("held_out/loss")] == [0, 2]
    assert (tmp_path / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_missing_packages_warn_with_the_name_of_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith(("matplotlib", "torch.utils.tensorboard")):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    model = tiny_model()
    with (
        pytest.warns(UserWarning, match=r"twofold\[plot\]"),
        pytest.warns(UserWarning, match=r"twofold\[tensorboard\]"),
    ):
        result = fit(
            model, loader(model), loader(model), settings(steps=1, tensorboard=True), tmp_path / "run"
        )
    assert result.is_finished
    assert not (tmp_path / "run" / "loss.png").exists()
