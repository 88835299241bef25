"""An objective of one's own: what it counts is what sums are divided by, and what it notes is reported."""

import json
from functools import partial

import pytest
import torch

from tests.train.ranks import on_ranks
from tests.train.test_parallel import run
from tests.train.tiny_run import loader, tiny_model
from twofold.train import LossModule, Objective, evaluate, token_loss, train_step
from twofold.train.optimizer import trainable_parameters


class RowsObjective(Objective):
    """Every row counts once: the mean of its tokens' losses; and how many of its labels are of an even id."""

    metric_names = ("even", "tokens")

    def forward(self, batch, scored):
        logits = self.model(
            batch.input_ids,
            decoder_input_ids=batch.decoder_input_ids,
            segment_ids=batch.segment_ids,
            decoder_segment_ids=batch.decoder_segment_ids,
        ).logits
        rows = zip(logits, batch.labels, strict=True)
        losses = [token_loss(row[None], labels[None]) for row, labels in rows]
        even = ((batch.labels >= 0) & (batch.labels % 2 == 0)).sum()
        self.note(even, torch.tensor(len(scored), device=even.device))
        return torch.stack([total / n for total, n in losses]).sum()

    def count(self, batch):
        return len(batch.labels)


def batches_of(model):
    return list(loader(model, packing=False, rows_per_batch=3).one_pass())[:2]


def by_hand(model, batches):
    """Mean over rows, and both metrics per row."""
    totals, even, tokens = [], 0, 0
    for b in batches:
        with torch.no_grad():
            logits = model(b.input_ids, None, b.decoder_input_ids, segment_ids=b.segment_ids,
                           decoder_segment_ids=b.decoder_segment_ids).logits  # fmt: skip
        for row, labels in zip(logits, b.labels, strict=True):
            real = labels[labels >= 0]
            logprobs = row[labels >= 0].log_softmax(-1).gather(1, real[:, None])
            totals.append(-logprobs.mean().item())
            even, tokens = even + int((real % 2 == 0).sum()), tokens + len(real)
    n = len(totals)
    return sum(totals) / n, {"even": even / n, "tokens": tokens / n}


def test_a_step_and_an_evaluation_say_the_same():
    model = tiny_model()
    batches = batches_of(model)
    loss, metrics = by_hand(model, batches)
    found = evaluate(RowsObjective(model), batches)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.metrics == pytest.approx(metrics)
    assert found.scored_tokens == sum(b.num_scored_tokens for b in batches)
    module = RowsObjective(model).train()
    parameters = trainable_parameters(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values())
    result = train_step(module, optimizer, batches, step=1, learning_rate=1.0)
    assert (result.loss, result.metrics) == (pytest.approx(loss, rel=1e-5), pytest.approx(metrics))
    assert evaluate(module, batches).metrics == pytest.approx(metrics)  # nothing is left over from the step
    updates = [before[name] - p.detach() for name, p in parameters.items()]
    for p, old in zip(parameters.values(), before.values(), strict=True):
        p.data.copy_(old)
    model.eval()
    module = RowsObjective(model)
    rows = [module(b, torch.zeros(1)) for b in batches]
    (sum(rows) / sum(len(b.labels) for b in batches)).backward()
    for update, p in zip(updates, parameters.values(), strict=True):
        torch.testing.assert_close(update, p.grad, rtol=1e-4, atol=1e-6)


def test_metrics_are_written_and_do_not_depend_on_ranks(tmp_path):
    one = run(tmp_path / "one", objective=RowsObjective)
    two = on_ranks(partial(run, objective=RowsObjective), 2, tmp_path / "two")
    assert two[0][0] == pytest.approx(one[0], rel=1e-5)
    found = []
    for folder in ("one", "two"):
        lines = map(json.loads, (tmp_path / folder / "metrics.jsonl").read_text().splitlines())
        found.append([line["tokens"] for line in lines if "loss" in line])
    assert found[0] == pytest.approx(found[1])
    assert len(found[0]) == 4
    held = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert all("held_out_even" in line for line in held if "held_out_loss" in line)


def test_likelihood_has_no_metrics_of_its_own():
    model = tiny_model()
    assert evaluate(LossModule(model), batches_of(model)).metrics == {}
