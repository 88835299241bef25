import pytest
import torch
from pydantic import ValidationError

from twofold.infer.sampling import Sampler, Sampling, filtered_probabilities

LOGITS = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
PROBABILITIES = LOGITS.softmax(-1)  # .032 .087 .237 .644


def test_greedy_is_the_default():
    assert Sampler(Sampling(), 1, torch.device("cpu")).choose(LOGITS).tolist() == [3]


def test_temperature_divides_logits():
    found = filtered_probabilities(LOGITS, Sampling(temperature=2.0))
    assert torch.allclose(found, (LOGITS / 2).softmax(-1))


def test_top_k_keeps_the_k_most_likely():
    found = filtered_probabilities(LOGITS, Sampling(temperature=1.0, top_k=2))
    assert found[0, :2].tolist() == [0.0, 0.0]
    assert torch.allclose(found[0, 2:], PROBABILITIES[0, 2:] / PROBABILITIES[0, 2:].sum())


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.644, 2), (0.88, 2), (0.9, 3), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, kept):
    found = filtered_probabilities(LOGITS, Sampling(temperature=1.0, top_p=top_p))
    assert int((found > 0).sum()) == kept
    assert found.sum().item() == pytest.approx(1.0)


def test_rows_draw_from_their_own_streams():
    """What a row gets depends on seed + row alone, not on how many rows there are."""
    flat = torch.zeros(3, 50)
    together = [
        Sampler(Sampling(temperature=1.0, seed=7), 3, torch.device("cpu")).choose(flat) for _ in range(2)
    ]
    assert torch.equal(together[0], together[1])
    alone = Sampler(Sampling(temperature=1.0, seed=9), 1, torch.device("cpu")).choose(flat[:1])
    assert alone[0] == together[0][2]


def test_draws_follow_the_probabilities():
    sampler = Sampler(Sampling(temperature=1.0, seed=0), 1, torch.device("cpu"))
    draws = torch.cat([sampler.choose(LOGITS) for _ in range(4000)])
    shares = torch.bincount(draws, minlength=4) / len(draws)
    assert (shares - PROBABILITIES[0]).abs().max() < 0.03


@pytest.mark.parametrize("setting", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_q": 1}])
def test_bad_settings(setting):
    with pytest.raises(ValidationError):
        Sampling(**setting)
