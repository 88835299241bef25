"""Answers that share a source against the same model on one example at a time."""

import numpy as np
import pytest
import torch

from tests.models.tiny import MEETINGS, build, gemma_stack, meeting_id, pair_config
from twofold.data import Example
from twofold.posttrain.answers import AnswersBatch, answer_tensors, label_logprobs, per_answer
from twofold.train.step import scored_positions

LENGTHS = ((6, (2, 5, 3)), (1, (4,)), (9, (1, 6)))
"""Of each source, and of its answers."""


def groups(seed=0):
    draw = np.random.default_rng(seed)

    def ids(n):
        return draw.integers(3, 40, n)

    found = []
    for n_source, targets in LENGTHS:
        source, prefix = ids(n_source), ids(2)
        found.append([Example(source, prefix, ids(n), False) for n in targets])
    return found


def batch_of(answers):
    return AnswersBatch(**answer_tensors(answers, pad_token_id=0))


@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
def test_log_probabilities_and_gradients_are_those_of_single_examples(meeting):
    model = build(pair_config(gemma_stack(), **meeting))
    answers = groups()
    batch = batch_of(answers)
    scored = scored_positions(batch)
    logprobs = label_logprobs(model, batch, scored)
    sums = per_answer(logprobs, batch, scored)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 2.0])
    (sums * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    alone = []
    for example in (example for group in answers for example in group):
        logits = model(
            torch.from_numpy(example.source)[None], None, torch.from_numpy(example.decoder_input_ids)[None]
        ).logits[0]
        target = torch.from_numpy(example.target)
        chosen = logits[-len(target) :].log_softmax(-1).gather(1, target[:, None])
        alone.append(chosen.sum())
    torch.testing.assert_close(sums, torch.stack(alone), atol=1e-5, rtol=1e-5)
    (torch.stack(alone) * weights).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:  # aligned reads: what comes after the last layer read
            assert found[name] is None
            continue
        torch.testing.assert_close(found[name], parameter.grad, atol=2e-4, rtol=1e-4, msg=name)


def test_what_is_counted():
    batch = batch_of(groups())
    assert batch.num_answers == 6
    assert batch.num_scored_tokens == 2 + 5 + 3 + 4 + 1 + 6
    assert batch.num_real_tokens == 6 + 1 + 9 + (3 + 6 + 4 + 5 + 2 + 7)
    assert batch.source_of.tolist() == [0, 0, 0, 1, 2, 2]
    assert isinstance(batch.to("cpu"), AnswersBatch)


def test_mixed_and_empty_groups_are_refused():
    first, second, third = groups()
    with pytest.raises(ValueError, match="group 1 are to different sources"):
        batch_of([first, [*second, *third]])
    with pytest.raises(ValueError, match="source 0 has no answer"):
        batch_of([[], first])
