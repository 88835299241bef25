"""Losses, gradients and metrics of DPO, IPO and ORPO against one reply at a time, in plain PyTorch."""

import math

import pytest
import torch

from tests.models.tiny import MEETINGS
from tests.posttrain.tiny_pairs import data_config, pairs_of
from tests.train.tiny_run import PAD, settings, tiny_model
from twofold.config.preferences import PreferenceConfig
from twofold.posttrain.pairs import PairLoader
from twofold.posttrain.preferences import PreferenceObjective, collate_pairs
from twofold.posttrain.reference import ReferenceModel, compute_reference
from twofold.train import evaluate, fit
from twofold.train.step import scored_positions
from twofold.train.world import ONE_PROCESS

CPU = torch.device("cpu")
KINDS = {
    "dpo": PreferenceConfig(beta=0.5),
    "smoothed": PreferenceConfig(beta=0.5, label_smoothing=0.2),
    "ipo": PreferenceConfig(kind="ipo", beta=0.3),
    "orpo": PreferenceConfig(kind="orpo", beta=0.7),
}


def token_logprobs(model, example):
    """Of each target token of one example, from all logits."""
    prefix, target = example.decoder_prefix.tolist(), example.target.tolist()
    ids = torch.tensor([prefix + target[:-1]])
    logits = model(torch.from_numpy(example.source)[None], None, ids).logits[0]
    return torch.stack([logits[len(prefix) - 1 + n].log_softmax(-1)[t] for n, t in enumerate(target)])


def naive(name, model, reference, pair):
    """Loss of a pair, and the rewards of its replies."""
    config = KINDS[name]
    tokens = [token_logprobs(model, reply) for reply in (pair.chosen, pair.rejected)]
    if name == "orpo":
        chosen, rejected = (t.mean() for t in tokens)
        odds = chosen.exp() / (1 - chosen.exp()), rejected.exp() / (1 - rejected.exp())
        return -chosen - config.beta * torch.sigmoid((odds[0] / odds[1]).log()).log(), [
            config.beta * chosen.item(),
            config.beta * rejected.item(),
        ]
    with torch.no_grad():
        base = [token_logprobs(reference, reply).sum() for reply in (pair.chosen, pair.rejected)]
    ratios = [t.sum() - b for t, b in zip(tokens, base, strict=True)]
    h = ratios[0] - ratios[1]
    rewards = [config.beta * ratio.item() for ratio in ratios]
    if name == "ipo":
        return (h - 1 / (2 * config.beta)) ** 2, rewards
    right, wrong = torch.sigmoid(config.beta * h).log(), torch.sigmoid(-config.beta * h).log()
    return -(1 - config.label_smoothing) * right - config.label_smoothing * wrong, rewards


def models(meeting):
    """A model, and a reference that is another; weights large enough that replies differ."""
    made = []
    for seed in (0, 1):
        model = tiny_model(seed, **meeting)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
        made.append(model)
    return made


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("meeting", [MEETINGS[0], MEETINGS[15]], ids=["published", "lossless"])
def test_losses_gradients_and_metrics_are_those_of_single_replies(name, meeting, tmp_path):
    model, reference = models(meeting)
    pairs = pairs_of(model, tmp_path)[:7]
    objective = PreferenceObjective(
        model, config=KINDS[name], reference=ReferenceModel(reference, "float32", CPU)
    )
    batch = collate_pairs(PAD)(pairs, range(7))
    loss = objective(batch, scored_positions(batch))
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    losses, rewards = zip(*(naive(name, model, reference, pair) for pair in pairs), strict=True)
    sum(losses).backward()
    torch.testing.assert_close(loss, sum(losses), atol=1e-4, rtol=1e-5)
    scale = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    for n, p in model.named_parameters():
        if p.grad is None:
            assert found[n] is None
        else:
            torch.testing.assert_close(found[n], p.grad, atol=2e-5 * scale, rtol=1e-3, msg=n)
    assert objective.count(batch) == 7
    told = dict(zip(objective.metric_names, objective.take_metrics().tolist(), strict=True))
    chosen, rejected = (sum(r[i] for r in rewards) for i in (0, 1))
    assert told == pytest.approx(
        {
            "accuracy": sum(c > r for c, r in rewards),
            "margin": chosen - rejected,
            "reward_chosen": chosen,
            "reward_rejected": rejected,
        },
        rel=1e-4,
        abs=1e-4,
    )
    assert 0 < told["accuracy"] < 7


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_a_precomputed_reference_is_the_one_in_the_loop(name, tmp_path):
    model, reference = models(MEETINGS[15])
    pairs = pairs_of(model, tmp_path)
    data = data_config("unused")
    plain = PairLoader(pairs, data, collate_pairs(PAD))
    told: list[tuple[int, int]] = []
    known = compute_reference(reference, plain, "float32", ONE_PROCESS, lambda *done: told.append(done))
    assert told == [(done, 16) for done in (3, 6, 9, 12, 15, 16)]
    alone = [[token_logprobs(reference, r).sum().item() for r in (p.chosen, p.rejected)] for p in pairs]
    torch.testing.assert_close(known, torch.tensor(alone), atol=1e-4, rtol=1e-5)
    stored = PairLoader(pairs, data, collate_pairs(PAD, known))
    in_loop = PreferenceObjective(
        model, config=KINDS[name], reference=ReferenceModel(reference, "float32", CPU)
    )
    for _ in range(7):  # into the second epoch
        losses = []
        for objective, loader in (
            (in_loop, plain),
            (PreferenceObjective(model, config=KINDS[name]), stored),
        ):
            (batch,) = loader.next_step()
            losses.append(objective(batch, scored_positions(batch)).item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # other padding, other rounding


def test_the_reference_itself_is_at_the_start_of_every_curve(tmp_path):
    model = tiny_model()
    pairs = pairs_of(model, tmp_path)
    loader = PairLoader(pairs, data_config("unused"), collate_pairs(PAD))
    known = compute_reference(model, loader, "float32", ONE_PROCESS)
    start = PairLoader(pairs, data_config("unused"), collate_pairs(PAD, known))
    found = evaluate(PreferenceObjective(model, config=KINDS["dpo"]), start.one_pass())
    assert found.loss == pytest.approx(math.log(2), rel=1e-6)
    assert found.metrics == {"accuracy": 0.5, "margin": 0.0, "reward_chosen": 0.0, "reward_rejected": 0.0}
    found = evaluate(PreferenceObjective(model, config=KINDS["ipo"]), start.one_pass())
    assert found.loss == pytest.approx((1 / 0.6) ** 2, rel=1e-6)


@pytest.mark.parametrize("name", ["dpo", "ipo", "orpo"])
def test_a_tiny_model_learns_to_prefer(name, tmp_path):
    model = tiny_model()
    pairs = pairs_of(model, tmp_path)
    loader = PairLoader(pairs, data_config("unused"), collate_pairs(PAD))
    known = compute_reference(model, loader, "float32", ONE_PROCESS)
    collate = collate_pairs(PAD, known)
    data = data_config("unused", pairs_per_batch=16)
    config = settings(steps=30, optimizer={"learning_rate": 3e-3}, schedule={"decay": "constant"})
    result = fit(
        model,
        PairLoader(pairs, data, collate),
        PairLoader(pairs, data, collate),
        config,
        tmp_path / "run",
        objective=lambda model, precision: PreferenceObjective(model, precision, config=KINDS[name]),
    )
    assert result.held_out[-1][1] < 0.6 * result.held_out[0][1]
    found = evaluate(
        PreferenceObjective(model, config=KINDS[name]), PairLoader(pairs, data, collate).one_pass()
    )
    assert found.metrics["accuracy"] == 1.0
    assert found.metrics["margin"] > 0


def test_odds_stay_finite_where_a_reply_is_certain(tmp_path):
    model = tiny_model()
    pairs = pairs_of(model, tmp_path)[:2]
    batch = collate_pairs(PAD)(pairs, range(2))
    objective = PreferenceObjective(model, config=KINDS["orpo"])
    losses, _ = objective._odds_ratio(torch.tensor([[0.0, -5.0], [-4.0, 0.0]]), batch)
    assert torch.isfinite(losses).all()
    assert losses[0] < 1e-4 < 1 < losses[1]
