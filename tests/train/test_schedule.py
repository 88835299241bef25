import pytest

from twofold.config.recipe import ScheduleConfig
from twofold.train.schedule import learning_rate_factor


def factors(total_steps, **schedule):
    return [
        learning_rate_factor(s, ScheduleConfig(**schedule), total_steps) for s in range(1, total_steps + 1)
    ]


def test_linear_with_warmup():
    expected = [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert factors(6, warmup_steps=2, decay="linear", final_share=0.2) == pytest.approx(expected)


def test_cosine_passes_the_middle_halfway_and_ends_at_the_final_share():
    # 0.1 + 0.9 * (1 + cos(pi * k / 4)) / 2
    expected = [0.868198, 0.55, 0.231802, 0.1]
    assert factors(4, decay="cosine", final_share=0.1) == pytest.approx(expected, abs=1e-6)


def test_constant_stays_at_one():
    assert factors(4, warmup_steps=2, decay="constant") == [0.5, 1.0, 1.0, 1.0]


def test_a_run_of_warmup_alone():
    assert factors(2, warmup_steps=2) == [0.5, 1.0]
