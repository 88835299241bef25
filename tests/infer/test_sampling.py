import math
from collections import Counter

import pytest
import torch
import transformers
from pydantic import ValidationError

from twofold.infer.sampling import Sampler, Sampling, filtered_probabilities, penalised

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


@pytest.mark.parametrize(
    "setting", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_q": 1}, {"min_p": 1.1}]
)
def test_bad_settings(setting):
    with pytest.raises(ValidationError):
        Sampling(**setting)


def naive_distribution(logits: list[float], generated: list[int], s: Sampling) -> list[float]:
    """The chain of filters in plain Python, one token at a time."""
    logits = list(logits)
    for token in set(generated):
        x = logits[token]
        x = x / s.repetition_penalty if x > 0 else x * s.repetition_penalty
        x -= s.presence_penalty
        for seen in generated:
            if seen == token:
                x -= s.frequency_penalty
        logits[token] = x
    logits = [x / s.temperature for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = set(order[: s.top_k]) if s.top_k is not None else set(order)
    weights = [math.exp(x - max(logits)) if i in kept else 0.0 for i, x in enumerate(logits)]
    weights = [w / sum(weights) for w in weights]
    if s.top_p is not None:
        reached = 0.0
        for i in order:
            if reached >= s.top_p:
                weights[i] = 0.0
            reached += weights[i]
    if s.min_p is not None:
        weights = [w if w >= s.min_p * max(weights) else 0.0 for w in weights]
    return [w / sum(weights) for w in weights]


SETTINGS = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"frequency_penalty": 0.8},
    {"presence_penalty": 1.1},
    {
        "temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.05,
        "repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": -0.4,
    },
]  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(s))
def test_filters_equal_plain_loops(setting):
    sampling = Sampling(**({"temperature": 1.0} | setting))
    logits_BV = 2 * torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
    generated = [[], [3], [3, 3, 7, 3], [0, 19, 0, 5, 5]]
    rows = [penalised(row, Counter(ids), sampling) for row, ids in zip(logits_BV, generated, strict=True)]
    found = filtered_probabilities(torch.stack(rows), sampling)
    for row, logits, ids in zip(found, logits_BV, generated, strict=True):
        expected = naive_distribution(logits.tolist(), ids, sampling)
        assert row.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("setting", "processor"),
    [
        ({"temperature": 0.7}, transformers.TemperatureLogitsWarper(0.7)),
        ({"top_k": 5}, transformers.TopKLogitsWarper(5)),
        ({"top_p": 0.6}, transformers.TopPLogitsWarper(0.6)),
        ({"min_p": 0.2}, transformers.MinPLogitsWarper(0.2)),
        ({"repetition_penalty": 1.7}, transformers.RepetitionPenaltyLogitsProcessor(1.7)),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_filters_equal_those_of_transformers(setting, processor):
    sampling = Sampling(**({"temperature": 1.0} | setting))
    logits_BV = 2 * torch.randn(3, 30, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([[3, 3], [7, 29], [0, 1]])
    rows = [penalised(row, Counter(i.tolist()), sampling) for row, i in zip(logits_BV, ids, strict=True)]
    found = filtered_probabilities(torch.stack(rows), sampling)
    assert torch.allclose(found, processor(ids, logits_BV.clone()).softmax(-1), atol=1e-6)


def test_the_sampler_counts_what_it_chose():
    """Greedy, each token at most twice: a large frequency penalty makes it walk down the list."""
    sampler = Sampler(Sampling(frequency_penalty=0.6), 2, torch.device("cpu"))
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0]])
    chosen = torch.stack([sampler.choose(logits) for _ in range(4)])
    assert chosen.T.tolist() == [[0, 0, 1, 0], [1, 1, 2, 1]]
    sampler.keep([1])
    assert sampler.choose(logits[1:]).tolist() == [2]


def test_rows_that_are_kept_keep_their_streams():
    flat = torch.zeros(3, 50)
    whole, part = (Sampler(Sampling(temperature=1.0), 3, torch.device("cpu")) for _ in range(2))
    assert torch.equal(whole.choose(flat), part.choose(flat))
    part.keep([2, 0])
    assert part.choose(flat[:2]).tolist() == whole.choose(flat)[[2, 0]].tolist()


@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_a_nucleus_larger_than_the_head_of_the_vocabulary(top_p):
    """3000 almost equally likely tokens: 0.3 takes fewer than the 1024 looked at first, 0.9 more."""
    logits = 0.01 * torch.randn(2, 3000, generator=torch.Generator().manual_seed(3))
    found = filtered_probabilities(logits, Sampling(temperature=1.0, top_p=top_p))
    expected = transformers.TopPLogitsWarper(top_p)(torch.zeros(2, 1), logits).softmax(-1)
    assert ((found > 0) != (expected > 0)).sum() <= 2  # rounding at the edge of the nucleus
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_large_vocabulary_is_drawn_from_as_if_cumulated_one_by_one():
    """900 tokens in blocks, the last one not whole; most have no probability, and those are never drawn."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 900, generator=generator) * 3
    logits[:, torch.rand(900, generator=generator) < 0.7] = -torch.inf
    logits[:, 640:] = -torch.inf
    cumulated = logits.double().softmax(-1).cumsum(-1)
    found = set()
    for seed in range(300):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), 1, torch.device("cpu"))
        chosen = sampler.choose(logits).item()
        uniform = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert (
            chosen
            == torch.searchsorted(cumulated, (uniform * cumulated[0, -1])[None, None], right=True).item()
        )
        found.add(chosen // 256)
    assert found == {0, 1, 2}


@pytest.mark.parametrize("setting", [{"top_p": 1e-48}, {"temperature": 1e-300}, {"min_p": 1.0}])
def test_settings_that_float32_rounds_to_nothing_leave_the_likeliest(setting):
    """Seen: a top_p of 1.9e-48 kept no token, and an id beyond the vocabulary was drawn."""
    logits = torch.tensor([[0.5, 3.0, 1.0], [2.0, -torch.inf, 0.0]])
    sampling = Sampling(**{"temperature": 1.0, "seed": 3} | setting)
    assert filtered_probabilities(logits, sampling).tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    assert Sampler(sampling, 2, torch.device("cpu")).choose(logits).tolist() == [1, 0]
