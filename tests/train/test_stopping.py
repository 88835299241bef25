"""Early stopping, and the best weights."""

import pytest

from tests.posttrain.tiny_pairs import dpo_recipe
from tests.train.test_loop import StopAfter
from tests.train.tiny_run import TEXTS, loader, settings, tiny_model
from twofold.checkpoint.load import load
from twofold.config.watching import EarlyStoppingConfig
from twofold.posttrain.pair_runs import train_preferences
from twofold.train import LossModule, evaluate, fit
from twofold.train.stopping import Best, judge


def judged(values, **config):
    best = None
    for step, value in enumerate(values):
        best = judge(best, EarlyStoppingConfig(patience=2, **config), step, value)
    return best


def test_the_best_evaluation():
    assert judged([3.0]) == Best(0, 3.0)
    assert judged([3.0, 2.0, 2.5, 2.0]) == Best(1, 2.0, 2)  # as good is no better
    assert judged([3.0, 2.9, 2.7], min_delta=0.2) == Best(2, 2.7)  # 2.9 did not count, so 2.7 is 0.3 better
    assert judged([3.0, 2.9, 2.85], min_delta=0.2) == Best(0, 3.0, 2)
    assert judged([0.5, 0.7, 0.6], goal="higher") == Best(1, 0.7, 1)
    assert judged([3.0, float("nan"), 2.0]) == Best(2, 2.0)


STOPPING = {"patience": 2}


def overfit(output, *, callbacks=(), resume=False, **changes):
    """One text, learned by heart at a high rate: held-out texts become less likely after a while."""
    model = tiny_model()
    values = {
        "steps": 40,
        "evaluate_every": 3,
        "optimizer": {"learning_rate": 1e-2},
        "early_stopping": STOPPING,
    }
    texts = loader(model, [TEXTS[0]])
    held_out = loader(model, TEXTS[-3:])
    return fit(
        model, texts, held_out, settings(**(values | changes)), output, callbacks, resume=resume
    ), held_out


def test_a_run_ends_when_evaluations_get_worse_and_keeps_the_best(tmp_path):
    result, held_out = overfit(tmp_path / "run")
    steps = [step for step, _ in result.held_out]
    best_step, best_loss = min(result.held_out, key=lambda evaluation: evaluation[1])
    assert result.is_finished
    assert result.best_step == best_step
    assert 0 < best_step < result.step < 40
    assert result.step == best_step + 2 * 3 == steps[-1]
    assert result.model_path == tmp_path / "run" / "model-best"
    best = evaluate(LossModule(load(result.model_path)), held_out.one_pass())
    assert best.loss == pytest.approx(best_loss, rel=1e-6)
    last = evaluate(LossModule(load(tmp_path / "run" / "model")), held_out.one_pass())
    assert last.loss == pytest.approx(result.held_out[-1][1], rel=1e-6)

    again, _ = overfit(tmp_path / "run", resume=True)
    assert (again.step, again.best_step) == (result.step, best_step)

    parts = tmp_path / "parts"
    assert not overfit(parts, callbacks=[StopAfter(best_step + 2)])[0].is_finished
    resumed, _ = overfit(parts, resume=True)
    assert (resumed.losses, resumed.held_out, resumed.best_step) == (
        result.losses,
        result.held_out,
        best_step,
    )


def test_what_could_not_be_judged_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="set evaluate_every"):
        settings(early_stopping=STOPPING)
    with pytest.raises(ValueError, match=r"metric is 'rouge', but evaluations of this stage have loss$"):
        overfit(tmp_path / "run", early_stopping=STOPPING | {"metric": "rouge"})
    model, config = tiny_model(), settings(early_stopping=STOPPING, evaluate_every=1)
    with pytest.raises(ValueError, match="nothing is held out; set"):
        fit(model, loader(model), None, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metrics_of_other_stages(tmp_path):
    stopping = {"metric": "accuracy", "goal": "higher", "patience": 1, "min_delta": 1.0}
    result = train_preferences(dpo_recipe(tmp_path, early_stopping=stopping))
    assert (result.step, result.best_step) == (3, 0)  # accuracy cannot rise by 1 from a half
