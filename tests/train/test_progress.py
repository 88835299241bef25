import io
import re

from rich.console import Console

from tests.train.tiny_run import loader, settings, tiny_model
from twofold.train import StepResult, fit, progress_for
from twofold.train.progress import Smoothed, duration


def result(loss=2.0, scored=10, real=100, seconds=0.5):
    return StepResult(loss, scored, real, 1.0, 0.1, seconds)


def test_loss_is_weighted_by_tokens_and_time_left_follows_the_speed():
    smoothed = Smoothed(steps=10)
    smoothed.add(result(loss=1.0, scored=30))
    smoothed.add(result(loss=2.0, scored=10, real=300))
    assert smoothed.describe(2) == "loss 1.2500, 400 tokens/s, 0:04 left"


def test_only_the_last_twenty_steps_count():
    smoothed = Smoothed(steps=100)
    smoothed.add(result(loss=1000.0))
    for _ in range(20):
        smoothed.add(result(loss=3.0))
    assert smoothed.describe(21).startswith("loss 3.0000")


def test_duration():
    assert [duration(s) for s in (0, 59.6, 3599, 3723)] == ["0:00", "1:00", "59:59", "1:02:03"]


def test_the_reference_is_waited_for_in_lines():
    stream = io.StringIO()
    lines = progress_for(Console(file=stream, width=120, highlight=False))
    for done in (400, 800, 1200):  # within five seconds
        lines.on_reference(done, 1200)
    assert stream.getvalue() == "log-probabilities under the reference: 1,200 of 1,200 pairs\n"


def text_of(tmp_path, *, terminal, **changes):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120, highlight=False)
    model = tiny_model()
    fit(model, loader(model), loader(model), settings(**changes), tmp_path / "run", [progress_for(console)])
    return stream.getvalue()


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    text = text_of(tmp_path, terminal=False, steps=3)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0] == "0.1M parameters on cpu"
    assert lines[1].startswith("step 0: held-out loss 5.")
    assert lines[2].startswith("step 1/3: loss 5.")  # step 2 comes within ten seconds
    assert lines[3].startswith("step 3/3: loss 5.")
    assert re.search(r"tokens in 3 steps; this part took 0:\d\d$", lines[-1])


def test_a_bar_on_a_terminal(tmp_path):
    text = text_of(tmp_path, terminal=True, steps=2)
    assert "2/2" in text
    assert "tokens/s" in text
    assert "\x1b[?25h" in text  # the cursor is back


def test_a_resumed_run_says_so_and_frozen_parameters_too(tmp_path):
    text_of(tmp_path, terminal=False, steps=1)
    model = tiny_model()
    stream = io.StringIO()
    watcher = progress_for(Console(file=stream, width=120))
    fit(model, loader(model), loader(model), settings(steps=2), tmp_path / "run", [watcher], resume=True)
    assert "going on after step 1" in stream.getvalue()
    model = tiny_model()
    model.encoder.requires_grad_(False)
    fit(model, loader(model), None, settings(steps=1), tmp_path / "other", [watcher])
    assert "of them train" in stream.getvalue()
