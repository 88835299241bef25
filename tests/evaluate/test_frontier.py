"""Scores and costs brought together; the expected figures are worked out apart."""

from dataclasses import replace

import numpy as np
import pytest

from tests.evaluate.examples import SIX, cost, evaluation, one_stack, result, six_models
from tests.models.test_flops import t5gemma
from twofold.evaluate.comparable import differences, latency_differences, shared_tasks
from twofold.evaluate.cost import answer_flops
from twofold.evaluate.finding import clear_ratios, cost_ratios, expense, finding, told, verdict
from twofold.evaluate.frontier import Lengths, frontier, pareto, reference_lengths, wanted_timings
from twofold.evaluate.latency import LatencySettings

SMALL, PAIR = one_stack(t5gemma("S", "S")), t5gemma("S", "S")


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, 5)], [0]),
        ([(1, 5), (2, 6), (3, 5.5)], [0, 1]),
        ([(3, 6), (1, 5), (2, 4)], [1, 0]),
        ([(1, 5), (2, 5)], [0]),  # as good, dearer
        ([(2, 5), (2, 6)], [1]),  # as dear, worse
        ([(2, 6), (2, 6), (1, 6)], [2]),
        ([(2, 6), (2, 6), (1, 5)], [2, 0, 1]),  # equal points stay together
        ([], []),
    ],
)
def test_the_pareto_set(points, expected):
    assert pareto(points) == expected


def two_models(**changes):
    """A stack and a pair on two tasks, with values of single examples."""
    random = np.random.default_rng(1)
    base = {"a": random.random(400) < 0.5, "b": 100 * random.random(300)}
    better = {"a": base["a"] | (random.random(400) < 0.1), "b": base["b"] * 0.9 + 10 + random.random(300)}
    models = []
    for name, values, kind in (("stack", base, "decoder-only"), ("pair", better, "encoder-decoder")):
        tasks = [
            result("a", values["a"], source_tokens=99.6, target_tokens=3.2),
            result("b", values["b"], metric="rougeL", scale=100.0, source_tokens=300.0, target_tokens=40.0),
        ]
        models.append(evaluation(name, tasks, kind=kind, **changes))
    return models, base, better


def test_scores_are_means_of_points():
    models, base, better = two_models()
    found = frontier(models, {})
    assert [entry.name for entry in found.entries] == ["pair", "stack"]
    assert (found.baseline, found.tasks) == ("stack", ("a", "b"))
    stack, pair = found.entry("stack"), found.entry("pair")
    assert stack.tasks["a"].score.value == pytest.approx(100 * base["a"].mean())
    assert stack.tasks["b"].score.value == pytest.approx(base["b"].mean())
    assert pair.score.value == pytest.approx((100 * better["a"].mean() + better["b"].mean()) / 2)
    assert stack.difference is None
    assert pair.difference.value == pytest.approx(pair.score.value - stack.score.value)
    # The closed form of the paired difference, both tasks weighing half.
    spreads = [100 * (better["a"] * 1.0 - base["a"]), better["b"] - base["b"]]
    error = np.sqrt(sum((x.std() / np.sqrt(len(x))) ** 2 for x in spreads)) / 2
    assert pair.difference.low == pytest.approx(pair.difference.value - 1.96 * error, abs=0.15 * error)
    assert pair.difference.high == pytest.approx(pair.difference.value + 1.96 * error, abs=0.15 * error)
    assert verdict(pair) == "better"
    assert (pair.flops, pair.latency_s, found.on_flops) == (None, None, ())


def test_costs_are_those_of_each_tasks_own_lengths():
    models, _, _ = two_models()
    reference = reference_lengths(models, ("a", "b"))
    assert reference == (200, 22)
    wanted = wanted_timings(models[0], ("a", "b"), reference, 8)
    assert wanted == [((100, 3), 1), ((300, 40), 1), ((200, 22), 1), ((200, 22), 8)]
    costs = {"stack": cost(SMALL, wanted), "pair": cost(PAIR, wanted, speed=0.5)}
    found = frontier(models, costs)
    stack, pair = found.entry("stack"), found.entry("pair")
    flops = [answer_flops(PAIR, *lengths).total for lengths in ((100, 3), (300, 40))]
    assert [pair.tasks[task].flops for task in "ab"] == flops
    assert pair.flops == sum(flops) / 2
    # A machine that reads 400 tokens a second and writes one in 22.5 ms at batch 1.
    seconds = [100 / 400 + 2 * 0.0225, 300 / 400 + 39 * 0.0225]
    assert stack.latency_s["median"] == pytest.approx(sum(seconds) / 2)
    assert pair.latency_s["median"] == pytest.approx(sum(seconds))
    assert stack.reference.first_token_s["median"] == pytest.approx(0.5)
    assert stack.throughput.tokens_per_s == pytest.approx(8 * 22 / (8 * 0.5 + 21 * 0.04))
    assert found.on_latency == ("stack", "pair")
    assert cost_ratios(pair, stack)["latency"] == pytest.approx(2.0)


def test_latency_at_lengths_that_were_asked_for():
    models, _, _ = two_models()
    reference = Lengths(50, 20)
    wanted = wanted_timings(models[0], ("a", "b"), reference, 8, at_reference=True)
    assert wanted == [(reference, 1), (reference, 8)]
    found = frontier(models, {"stack": cost(SMALL, wanted)}, reference=reference)
    assert found.is_at_reference
    assert found.entry("stack").latency_s["median"] == pytest.approx(50 / 400 + 19 * 0.0225)
    assert found.on_latency == ("stack",)
    assert found.entry("stack").tasks["a"].latency_s is None


def test_reference_lengths_fit_every_model():
    models, _, _ = two_models()
    short = PAIR.model_copy(
        update={"decoder": PAIR.decoder.model_copy(update={"max_position_embeddings": 150})}
    )
    assert reference_lengths(models, ("a", "b"), [cost(SMALL), cost(short)]) == (150 - 22 - 1, 22)
    brief = [evaluation("m", [result("a", [1.0], source_tokens=7.0, target_tokens=1.0)])]
    assert reference_lengths(brief, ("a",)) == (7, 16)


def test_metrics_without_single_examples_have_no_interval():
    models, _, _ = two_models()
    bleu = result("c", [31.0], metric="bleu", scale=100.0, n=200, values=())
    models = [replace(model, tasks=model.tasks | {"c": bleu}) for model in models]
    found = frontier(models, {})
    pair = found.entry("pair")
    assert pair.tasks["c"].score.value == 31.0
    assert pair.tasks["c"].score.low is None
    assert pair.tasks["c"].difference.low is None
    assert pair.tasks["a"].score.low is not None
    assert pair.score.low is None
    assert pair.difference.low is None
    assert verdict(pair) == "not told apart"
    assert frontier(models, {}, tasks=["a", "b"]).entry("pair").score.low is not None


def test_settings_that_differ_are_an_error_or_a_warning():
    models, _, _ = two_models()
    stack, pair = models
    other = replace(pair, settings=pair.settings | {"limit": 50, "kind": "encoder-decoder", "tasks": ["a"]})
    with pytest.raises(
        ValueError, match=r"not evaluated alike:\n  limit: stack has 200, pair has 50\n"
    ) as raised:
        frontier([stack, other], {})
    assert "--allow-differences" in str(raised.value)
    assert "kind" not in str(raised.value)
    assert frontier([stack, other], {}, allows_differences=True).warnings == (
        "limit: stack has 200, pair has 50",
    )
    shots = replace(pair, settings=pair.settings | {"shots": {"a": 5, "b": 0, "not shared": 3}})
    assert differences([stack, shots], ("a", "b")) == ["shots of a: stack has 0, pair has 5"]
    fewer = replace(pair, tasks=pair.tasks | {"a": replace(pair.tasks["a"], n=7, metric="f1")})
    assert differences([stack, fewer], ("a", "b")) == [
        "examples of a: stack has 400, pair has 7",
        "metric of a: stack has acc, pair has f1",
    ]


def test_other_examples_are_not_paired():
    models, _, _ = two_models()
    stack, pair = models
    cut = replace(pair.tasks["a"], n=200, values=pair.tasks["a"].values[:200])
    found = frontier([stack, replace(pair, tasks=pair.tasks | {"a": cut})], {}, allows_differences=True)
    assert found.entry("pair").tasks["a"].difference.low is None
    assert found.entry("pair").tasks["a"].score.low is not None
    assert found.entry("pair").tasks["b"].difference.low is not None


def test_latencies_of_other_settings_or_machines():
    first = cost(SMALL, [(Lengths(5, 2), 1)]).latency
    second = replace(
        first, settings=LatencySettings(precision="int8"), hardware=first.hardware | {"cores": 64}
    )
    assert latency_differences({"a": first, "b": second}) == [
        "latency, cores: a has 2, b has 64",
        "latency, precision: a has float32, b has int8",
    ]
    assert latency_differences({"a": first, "b": first}) == latency_differences({}) == []


def test_which_tasks():
    models, _, _ = two_models()
    models[1] = replace(models[1], tasks={"b": models[1].tasks["b"]})
    assert shared_tasks(models) == ("b",)
    found = frontier(models, {})
    assert (found.tasks, found.left_out) == (("b",), ("a",))
    with pytest.raises(ValueError, match="pair was not evaluated on a; it has b"):
        frontier(models, {}, tasks=["b", "a"])
    models[1] = replace(models[1], tasks={"c": models[1].tasks["b"]})
    with pytest.raises(ValueError, match=r"no task in common \(stack: a, b; pair: c\)"):
        frontier(models, {})


def test_less_is_better_has_no_place_in_the_mean():
    models, _, _ = two_models()
    for n, model in enumerate(models):
        bits = replace(model.tasks["a"], task="a", metric="bits_per_byte", higher_is_better=False)
        models[n] = replace(model, tasks=model.tasks | {"a": bits})
    found = frontier(models, {})
    assert (found.tasks, found.left_out) == (("b",), ("a",))
    with pytest.raises(ValueError, match="less is better on a, so"):
        frontier(models, {}, tasks=["a", "b"])


def test_names():
    models, _, _ = two_models()
    with pytest.raises(ValueError, match="no model is named 'nobody'; the baseline is one of stack, pair"):
        frontier(models, {}, baseline="nobody")
    with pytest.raises(ValueError, match="two models have the same name"):
        frontier([models[0], models[0]], {})
    with pytest.raises(ValueError, match="no evaluations"):
        frontier([], {})
    assert frontier(models, {}, baseline="pair").entry("stack").difference.value < 0


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({}, "unknown"),
        ({"FLOPs": 0.9, "latency": 1.0}, "less"),
        ({"FLOPs": 1.01, "latency": 0.99}, "the same"),
        ({"FLOPs": 1.1, "latency": 1.0}, "more"),
        ({"FLOPs": 1.1, "latency": 0.8}, "mixed"),
    ],
)
def test_costs_in_a_word(ratios, expected):
    assert expense(ratios) == expected


def test_latencies_that_overlap_are_no_difference_in_cost():
    models, _, _ = two_models()
    wanted = wanted_timings(models[0], ("a", "b"), reference_lengths(models, ("a", "b")), 8)
    for speed, expected in [(1.06, 1.0), (1.5, 1 / 1.5)]:
        found = frontier(models, {"stack": cost(SMALL, wanted), "pair": cost(PAIR, wanted, speed=speed)})
        stack, pair = found.entry("stack"), found.entry("pair")
        assert cost_ratios(pair, stack)["latency"] == pytest.approx(1 / speed)
        assert clear_ratios(pair, stack)["latency"] == pytest.approx(expected)


def test_the_finding_claims_what_the_intervals_allow():
    models, _, _ = two_models()
    costs = {"stack": cost(SMALL), "pair": cost(PAIR)}
    sentence = finding(frontier(models, costs))
    assert sentence.startswith("Over 2 tasks, pair scores ")
    assert sentence.endswith(" times its FLOPs: better, at more cost.")
    assert finding(frontier(models, costs, baseline="pair")).endswith(": worse, at less cost.")
    same = replace(models[0], model="twin", kind="encoder-decoder")
    twin = finding(frontier([models[0], same], {"stack": cost(SMALL), "twin": cost(SMALL)}))
    assert "0.0 points above stack (95% interval +0.0 to +0.0), at 1.00 times its FLOPs" in twin
    assert twin.endswith("no difference that these examples show, at the same cost.")
    assert finding(frontier(models[:1], {})).startswith("stack scores ")


def test_the_finding_is_about_the_pair_of_the_baselines_cost():
    models = six_models()
    costs = {name: cost(config) for name, (config, _, _) in SIX.items()}
    assert told(frontier(models, costs)).name == "t5gemma-2b-2b"
    assert told(frontier(models, costs, baseline="gemma-2-9b")).name == "t5gemma-9b-9b-prefixlm-it"
