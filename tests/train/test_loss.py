import math

import pytest
import torch

from twofold.train import token_loss


def test_sum_over_scored_tokens_equals_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator) * 3
    labels = torch.tensor([[1, -100, 4], [-100, 0, 2]])
    expected = 0.0
    for row in range(2):
        for position in range(3):
            label = int(labels[row, position])
            if label != -100:
                weights = [math.exp(x) for x in logits[row, position].tolist()]
                expected -= math.log(weights[label] / sum(weights))
    total, count = token_loss(logits, labels)
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert total.dtype == torch.float32
    assert count.item() == 4


def test_nothing_scored_is_zero_and_not_nan():
    total, count = token_loss(torch.randn(1, 2, 3), torch.full((1, 2), -100))
    assert (total.item(), count.item()) == (0.0, 0)


def test_softmax_is_taken_in_float32():
    logits = torch.zeros(1, 1, 1000, dtype=torch.bfloat16)
    total, _ = token_loss(logits, torch.tensor([[3]]))
    assert total.item() == pytest.approx(math.log(1000), rel=1e-6)  # bfloat16 would give 6.90625
