"""Answers with the weights as they are: after an update, under any backend, with their log-probabilities."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from tests.models.tiny import MEETINGS
from tests.posttrain.test_grpo import model_of
from tests.train.tiny_run import BOS, EOS, PAD
from twofold.config.grpo import RolloutConfig
from twofold.data import Example
from twofold.infer import Engine, Request, Sampling, generate
from twofold.posttrain.answers import AnswersBatch, answer_tensors
from twofold.posttrain.grpo import placed_logprobs
from twofold.posttrain.prompts import Prompt
from twofold.posttrain.rollouts import RolloutEngine, answer_seed
from twofold.train.world import ONE_PROCESS

PROMPTS = [
    Prompt(np.array(ids), np.array([BOS]), "", {}, f"row {n}")
    for n, ids in enumerate([[5, 9, 30], [7, 8], [60, 61, 62, 63, 64]])
]
SEEDS = [11, 500, 7]
needs_openvino = pytest.mark.skipif(
    find_spec("openvino") is None or find_spec("numba") is None, reason="the extra cpu is not installed"
)


def move(model, seed):
    """As an optimizer does: in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


def tokens_of(answers):
    return [[answer.token_ids for answer in group] for group in answers]


def alone(model, num_samples, temperature=1.0):
    """By the plain generator, each prompt for itself."""
    found = []
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        rows = generate(
            model,
            [prompt.source.tolist()] * num_samples,
            [prompt.prefix.tolist()] * num_samples,
            max_new_tokens=8,
            sampling=Sampling(temperature=temperature, seed=seed),
            stop_token_ids=[EOS],
        )
        found.append([row.token_ids for row in rows])
    return found


def anew(model, config):
    """By an engine that has just been made, in the same batches: bfloat16 rounds in each batch differently."""
    engine = RolloutEngine(model, config, ONE_PROCESS)
    engine.refresh()
    return tokens_of(engine.answer(PROMPTS, SEEDS, num_samples=3, temperature=1.0))


BACKENDS = [
    pytest.param({}, id="shared"),
    pytest.param({"backend": "openvino"}, id="openvino", marks=needs_openvino),
    pytest.param({"precision": "bfloat16"}, id="bfloat16"),
]


@pytest.mark.parametrize("options", BACKENDS)
def test_answers_are_those_of_the_weights_after_each_update(options):
    model = model_of(MEETINGS[15]).train()
    config = RolloutConfig(max_new_tokens=8, num_samples=3, batch_size=7, **options)
    engine = RolloutEngine(model, config, ONE_PROCESS)
    seen = []
    for step in range(2):
        engine.refresh()
        found = tokens_of(engine.answer(PROMPTS, SEEDS, num_samples=3, temperature=1.0))
        if "precision" in options:
            assert engine.policy is not model
            for own, parameter in zip(engine.policy.parameters(), model.parameters(), strict=True):
                assert torch.equal(own, parameter.bfloat16())
            expected = anew(model, config)
        else:
            assert engine.policy is model
            with torch.no_grad():
                expected = alone(model.eval(), 3)
            model.train()
        assert found == [[tuple(row) for row in group] for group in expected]
        assert model.training
        assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
        assert found not in seen
        seen.append(found)
        move(model, step)


def test_stop_tokens_are_actions_and_answers_without_one_are_truncated():
    model = model_of(MEETINGS[0])
    engine = RolloutEngine(model, RolloutConfig(max_new_tokens=30, num_samples=8), ONE_PROCESS)
    with torch.no_grad():
        model.lm_head.out_proj.weight[EOS] *= 3  # so that some stop
    engine.refresh()
    answers = [a for group in engine.answer(PROMPTS, SEEDS, num_samples=8, temperature=1.0) for a in group]
    assert {a.is_truncated for a in answers} == {True, False}
    for answer in answers:
        assert EOS not in answer.token_ids[:-1]
        assert answer.is_truncated == (answer.token_ids[-1] != EOS)
        assert len(answer.token_ids) == 30 or not answer.is_truncated
        assert "<eos>" not in answer.text


@pytest.mark.parametrize("meeting", [MEETINGS[0], MEETINGS[15]], ids=["published", "lossless"])
def test_the_engine_and_the_training_model_agree_on_log_probabilities(meeting):
    """At temperature 1, where the engine reports those of the policy."""
    model = model_of(meeting)
    engine = Engine(model, backend="torch", device="cpu")
    handles = [
        engine.submit(
            Request(
                source_ids=p.source.tolist(),
                prefix_ids=p.prefix.tolist(),
                max_new_tokens=8,
                sampling=Sampling(temperature=1.0, seed=seed),
                n=3,
                logprobs=0,
            )
        )
        for p, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    completions = [handle.result() for handle in handles]
    groups = [
        [Example(p.source, p.prefix, np.asarray(c.token_ids), ends=False) for c in group]
        for p, group in zip(PROMPTS, completions, strict=True)
    ]
    batch = AnswersBatch(**answer_tensors(groups, PAD))
    found = placed_logprobs(model, batch, "float32", 1.0)
    rows = [c for group in completions for c in group]
    for row, completion in zip(found, rows, strict=True):
        expected = torch.tensor([token.logprob for token in completion.logprobs])
        torch.testing.assert_close(row[: len(expected)], expected, atol=2e-5, rtol=1e-5)
        assert not row[len(expected) :].any()


def test_a_seed_is_of_the_run_the_rollout_and_the_place():
    seeds = {answer_seed(*key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]}
    assert len(seeds) == 5
    assert max(seeds) + 1000 < 2**63
    assert answer_seed(3, 4, 5) == answer_seed(3, 4, 5)


def test_what_a_prompt_gets_does_not_depend_on_the_others():
    model = model_of(MEETINGS[0])
    engine = RolloutEngine(model, RolloutConfig(max_new_tokens=8), ONE_PROCESS)
    engine.refresh()
    together = tokens_of(engine.answer(PROMPTS, SEEDS, num_samples=4, temperature=0.8))
    for n in range(3):
        single = engine.answer(PROMPTS[n : n + 1], SEEDS[n : n + 1], num_samples=4, temperature=0.8)
        assert tokens_of(single) == together[n : n + 1]
    assert len({tuple(row) for row in together[0]}) > 1


def test_masks_that_open_reach_the_copy():
    model = model_of(MEETINGS[0] | {"encoder_mask": ("causal",) * 3})
    config = RolloutConfig(max_new_tokens=8, precision="bfloat16")
    engine = RolloutEngine(model, config, ONE_PROCESS)
    engine.refresh()
    closed = tokens_of(engine.answer(PROMPTS, SEEDS, num_samples=3, temperature=1.0))
    model.set_encoder_mask("bidirectional")
    engine.refresh()
    opened = tokens_of(engine.answer(PROMPTS, SEEDS, num_samples=3, temperature=1.0))
    assert closed != opened
    assert opened == anew(model, config)
    assert engine.policy.config == model.config
