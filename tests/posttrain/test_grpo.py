"""Advantages, losses, gradients and metrics of GRPO and relatives against one answer at a time, in plain PyTorch."""

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.models.tiny import MEETINGS, gemma_stack, pair_config
from tests.train.tiny_run import BOS, EOS, PAD, VOCAB, byte_tokenizer
from twofold.config.grpo import PolicyConfig, RolloutConfig
from twofold.data import Example
from twofold.models import EncoderDecoder
from twofold.posttrain.answers import answer_tensors
from twofold.posttrain.grpo import PolicyObjective, RolloutBatch, advantages, placed_logprobs
from twofold.train import evaluate
from twofold.train.step import scored_positions, train_step

REWARDS = np.array([[0.0, 1.0, 0.25, 0.0], [0.1, 0.1, 0.1, 0.1], [-2.0, 3.0, 0.5, 0.5]])
MAX_NEW = 6
PROMPTS = [[5, 9, 30], [7, 8], [60, 61, 62, 63, 64]]
ANSWERS = [
    [[10, 11, EOS], [12, 13, 14, 15, 16, 17], [EOS], [10, 12, EOS]],
    [[20, EOS], [21, 22, EOS], [20, EOS], [23, 24, 25, EOS]],
    [[31, 32, 33, 34, 35, 36], [40, 41, EOS], [50, EOS], [51, 52, EOS]],
]


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["std", "batch", "none"])
def test_advantages_are_those_of_one_answer_at_a_time(baseline, scale):
    config = PolicyConfig(baseline=baseline, scale=scale)
    batch_std = statistics.stdev(REWARDS.flatten())
    found = advantages(REWARDS, config, batch_std)
    for rewards, row in zip(REWARDS.tolist(), found.tolist(), strict=True):
        for i, reward in enumerate(rewards):
            others = rewards[:i] + rewards[i + 1 :]
            expected = reward - statistics.mean(rewards if baseline == "group_mean" else others)
            if scale != "none":
                expected /= 1e-4 + (statistics.stdev(rewards) if scale == "std" else batch_std)
            assert row[i] == pytest.approx(expected, abs=1e-9)
    assert found[1].tolist() == [0.0] * 4  # though the mean of 0.1 four times may be off by a rounding


def model_of(meeting, moved=0.0):
    """With soft-caps; weights large enough that tokens differ, and moved by so much at random."""
    side = gemma_stack(vocab_size=VOCAB, final_logit_softcapping=4.0)
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_ids": (EOS,)}
    model = EncoderDecoder(pair_config(side, **(special | meeting)))
    model.initialise_randomly(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
        for p in model.parameters():
            p.add_(moved * torch.randn(p.shape, generator=generator))
    model.tokenizer = byte_tokenizer()
    return model.eval()


def batch_of(config, rewards=REWARDS, old=None, reference=None, prompts=slice(None)):
    groups = [
        [Example(np.array(source), np.array([BOS]), np.array(a), ends=a[-1] == EOS) for a in answers]
        for source, answers in zip(PROMPTS, ANSWERS, strict=True)
    ]
    found = advantages(rewards, config, statistics.stdev(rewards.flatten()))
    each = np.stack([rewards.flatten(), rewards.flatten() * 2], axis=1)
    batch = RolloutBatch(
        **answer_tensors(groups[prompts], PAD),
        advantages=torch.tensor(found[prompts]).float().flatten(),
        rewards=torch.tensor(each).view(3, 4, 2)[prompts].flatten(0, 1),
        is_truncated=torch.tensor([a[-1] != EOS for group in ANSWERS[prompts] for a in group]),
        seconds=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
    )
    if old is not None:
        batch = replace(batch, old_logprobs=placed_logprobs(old, batch, "float32", 0.7))
    if reference is not None:
        batch = replace(batch, reference_logprobs=placed_logprobs(reference, batch, "float32", 0.7))
    return batch


def token_logprobs(model, source, answer, temperature):
    """Of each token of one answer, from all logits."""
    logits = model(torch.tensor([source]), None, torch.tensor([[BOS, *answer[:-1]]])).logits[0]
    return torch.stack(
        [(row / temperature).log_softmax(-1)[t] for row, t in zip(logits, answer, strict=True)]
    )


def naive(model, config, old, reference, temperature):
    """The loss of a step, and sums over tokens: -log p, k3, how many are clipped."""
    found = advantages(REWARDS, config, statistics.stdev(REWARDS.flatten()))
    sums, tokens, told = [], 0, [0.0, 0.0, 0]
    for g, (source, group) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        for k, answer in enumerate(group):
            logprobs = token_logprobs(model, source, answer, temperature)
            with torch.no_grad():
                before = logprobs if old is None else token_logprobs(old, source, answer, temperature)
                base = None if reference is None else token_logprobs(reference, source, answer, temperature)
            total = 0.0
            for t in range(len(answer)):
                ratio = (logprobs[t] - before[t].detach()).exp()
                advantage = found[g, k]
                gain = ratio * advantage
                if advantage > 0 and ratio > 1 + config.clip_high:
                    gain, is_clipped = torch.tensor((1 + config.clip_high) * advantage), True
                elif advantage < 0 and ratio < 1 - config.clip_low:
                    gain, is_clipped = torch.tensor((1 - config.clip_low) * advantage), True
                else:
                    is_clipped = False
                told[2] += is_clipped
                loss = -gain
                if base is not None:
                    q = (base[t] - logprobs[t]).exp()
                    k3 = q - q.log() - 1
                    told[1] += k3.item()
                    loss = loss + config.kl_coefficient * k3
                told[0] -= logprobs[t].item()
                total = total + loss
            tokens += len(answer)
            is_masked = config.mask_truncated and answer[-1] != EOS
            scale = {"token": 1.0, "sequence": 1 / len(answer), "constant": 1 / MAX_NEW}[config.aggregation]
            sums.append(0.0 if is_masked else total * scale)
    return sum(sums) / (tokens if config.aggregation == "token" else len(sums)), told, tokens


CASES = {
    "dapo": PolicyConfig(aggregation="token", num_iterations=2, clip_high=0.28, mask_truncated=True),
    "grpo": PolicyConfig(aggregation="sequence", num_iterations=2, kl_coefficient=0.3),
    "dr-grpo": PolicyConfig(aggregation="constant", scale="none", mask_truncated=True, kl_coefficient=0.1),
    "rloo": PolicyConfig(aggregation="sequence", baseline="leave_one_out", scale="none"),
    "batch": PolicyConfig(aggregation="constant", scale="batch", num_iterations=3),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("meeting", [MEETINGS[0], MEETINGS[15]], ids=["published", "lossless"])
def test_losses_gradients_and_metrics_are_those_of_single_answers(name, meeting):
    config, model = CASES[name], model_of(meeting)
    old = model_of(meeting, moved=0.02) if config.num_iterations > 1 else None
    reference = model_of(meeting, moved=0.03) if config.kl_coefficient else None
    rollout = RolloutConfig(max_new_tokens=MAX_NEW, temperature=0.7)
    objective = PolicyObjective(model, config=config, rollout=rollout, reward_names=("double",)).train()
    batch = batch_of(config, old=old, reference=reference)
    loss = objective(batch, scored_positions(batch)) / objective.count(batch)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    expected, told, tokens = naive(model, config, old, reference, 0.7)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5, check_dtype=False)
    scale = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    assert scale > 1e-3
    for n, p in model.named_parameters():
        torch.testing.assert_close(found[n], p.grad, atol=2e-5 * scale, rtol=1e-3, msg=n)

    sums = objective.take_metrics() / objective.count(batch)
    said = objective.reported(dict(zip(objective.metric_names, sums.tolist(), strict=True)))
    expected_metrics = {
        "reward": REWARDS.mean(),
        "reward_double": 2 * REWARDS.mean(),
        "reward_std": statistics.mean(statistics.stdev(row) for row in REWARDS.tolist()),
        "no_variance": 1 / 3,
        "length": tokens / 12,
        "truncated": 2 / 12,
        "entropy": told[0] / tokens,
        "rollout_seconds": 1.0,
        "reward_seconds": 2.0,
        "scoring_seconds": 3.0,
    }
    if config.kl_coefficient:
        expected_metrics["kl"] = told[1] / tokens
    if config.num_iterations > 1:
        expected_metrics["clipped"] = told[2] / tokens
        assert 0 < told[2] < tokens
    assert said == pytest.approx(expected_metrics, rel=1e-4)


def test_the_first_update_on_a_rollout_needs_no_old_probabilities():
    config, model = PolicyConfig(kl_coefficient=0.2), model_of(MEETINGS[0])
    rollout = RolloutConfig(max_new_tokens=MAX_NEW, temperature=0.7)
    gradients = []
    for old in (None, model):
        objective = PolicyObjective(model, config=config, rollout=rollout, reward_names=("double",)).train()
        batch = batch_of(config, old=old, reference=model_of(MEETINGS[0], moved=0.03))
        objective(batch, scored_positions(batch)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_how_groups_are_dealt_out_to_batches_changes_nothing(aggregation):
    """Nor does padding: groups have other longest answers."""
    results = []
    for parts in ([slice(0, 3)], [slice(0, 1), slice(1, 3)]):
        model = model_of(MEETINGS[0])
        config = PolicyConfig(aggregation=aggregation)
        objective = PolicyObjective(
            model, config=config, rollout=RolloutConfig(max_new_tokens=MAX_NEW), reward_names=("double",)
        ).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = [batch_of(config, prompts=part) for part in parts]
        results.append(train_step(objective, optimizer, batches, step=1, learning_rate=0.1))
    one, other = results
    assert one.loss == pytest.approx(other.loss, abs=1e-6)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    assert one.metrics == pytest.approx(other.metrics, rel=1e-5)
    assert one.scored_tokens == other.scored_tokens == sum(len(a) for group in ANSWERS for a in group)


def test_an_evaluation_is_the_mean_reward():
    config, model = CASES["grpo"], model_of(MEETINGS[0])
    objective = PolicyObjective(
        model, config=config, rollout=RolloutConfig(max_new_tokens=MAX_NEW), reward_names=("double",)
    )
    found = evaluate(
        objective, [batch_of(config, prompts=slice(0, 1)), batch_of(config, prompts=slice(1, 3))]
    )
    assert found.loss == pytest.approx(-REWARDS.mean())
    assert found.metrics["reward"] == pytest.approx(REWARDS.mean())
    assert found.metrics["no_variance"] == pytest.approx(1 / 3)
    assert not {"kl", "entropy", "clipped"} & found.metrics.keys()


def test_truncated_answers_alone_teach_nothing():
    config, model = PolicyConfig(mask_truncated=True), model_of(MEETINGS[0])
    objective = PolicyObjective(
        model, config=config, rollout=RolloutConfig(max_new_tokens=MAX_NEW), reward_names=("double",)
    ).train()
    batch = batch_of(config)
    batch.is_truncated.fill_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = train_step(objective, optimizer, [batch], step=1, learning_rate=0.1)
    assert (result.loss, result.grad_norm, result.metrics["truncated"]) == (0.0, 0.0, 1.0)
    assert math.isfinite(result.metrics["entropy"])
