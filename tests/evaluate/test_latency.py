"""Latencies come from the engine's steps: with steps of known length every figure is known."""

import json
import os
from dataclasses import asdict

import pytest
import torch

import twofold
from tests.models import hf
from tests.models.tiny import pair_config, stack
from twofold.evaluate import latency as latency_module
from twofold.evaluate.cost import Cost
from twofold.evaluate.latency import Latency, LatencySettings, Lengths, Timing, measure_latency, time_plans
from twofold.infer import timing as timing_module
from twofold.infer.bench import EndedError, Plan, run_apart, time_batches
from twofold.infer.request import Delta


class Clock:
    """Stands still but for what `work` does."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class StepEngine:
    """Reads 1000 tokens a second, one row after another, then writes a token for every row in 20 ms a step."""

    device = torch.device("cpu")

    def __init__(self, clock):
        self.clock, self.loop = clock, self
        self.rows = []

    def submit(self, request):
        row = Row(len(request.source_ids), request.max_new_tokens)
        self.rows.append(row)
        return row

    def step(self):
        fresh = [row for row in self.rows if row.n_written == 0]
        self.clock.now += sum(row.n_source for row in fresh) / 1000 if fresh else 0.020
        for row in self.rows:
            row.write()
        self.rows = [row for row in self.rows if row.n_written < row.n_new]
        return bool(self.rows)


class Row:
    def __init__(self, n_source, n_new):
        self.n_source, self.n_new, self.n_written = n_source, n_new, 0

    def listen(self, note):
        self.note = note

    def write(self):
        self.n_written += 1
        self.note(Delta(token_ids=(7,), text="", index=0))

    def result(self):
        return ()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing_module, "time", clock)
    return clock


def test_figures_of_steps_of_known_length(clock):
    plan = Plan(model="m", source_tokens=300, new_tokens=11, batch_sizes=(1, 4), runs=2)
    one, four = (
        latency_module._timing(Lengths(300, 11), figures)
        for figures in time_batches(StepEngine(clock), pair_config(stack()), plan)
    )
    assert one.first_token_s == pytest.approx({"median": 0.3, "min": 0.3, "max": 0.3})
    assert one.total_s["median"] == pytest.approx(0.3 + 10 * 0.020)
    assert one.token_s == pytest.approx(0.020)
    assert one.tokens_per_s == pytest.approx(11 / 0.5)
    assert four.first_token_s["median"] == pytest.approx(4 * 0.3)
    assert four.total_s["median"] == pytest.approx(4 * 0.3 + 10 * 0.020)
    assert four.token_s == pytest.approx(0.020)
    assert four.tokens_per_s == pytest.approx(4 * 11 / 1.4)


def test_targets_of_one_token_have_no_rate(clock):
    plan = Plan(model="m", source_tokens=50, new_tokens=1, batch_sizes=(1,), runs=1)
    (figures,) = time_batches(StepEngine(clock), pair_config(stack()), plan)
    timing = latency_module._timing(Lengths(50, 1), figures)
    assert timing.token_s is None
    assert timing.total_s["median"] == pytest.approx(0.05)


def timing(source, target, batch_size=1):
    seconds = {"median": 1.0, "min": 0.5, "max": 2.0}
    return Timing(
        lengths=Lengths(source, target), batch_size=batch_size, first_token_s=seconds, total_s=seconds,
        decode_tokens_per_s=None,
    )  # fmt: skip


def test_what_is_missing_is_measured_once():
    latency = Latency(settings=LatencySettings(), hardware={}, timings=(timing(5, 2), timing(5, 2, 8)))
    a, b = Lengths(5, 2), Lengths(6, 2)
    assert latency.missing([(a, 1), (b, 1), (a, 8), (b, 1), (a, 4)]) == [(b, 1), (a, 4)]
    more = latency.also(Latency(settings=LatencySettings(), hardware={}, timings=(timing(6, 2),)))
    assert more.missing([(a, 1), (b, 1), (a, 8)]) == []
    assert more.at(b) == timing(6, 2)


def test_means_become_whole_lengths():
    assert Lengths.nearest(12.6, 3.4) == (13, 3)
    assert Lengths.nearest(0.0, 0.2) == (1, 1)


def test_numbers_below_one_are_refused():
    for name in ("batch_size", "runs", "threads"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            LatencySettings(**{name: 0})


@pytest.fixture
def folder(tmp_path, text_model):
    twofold.save(text_model(), tmp_path / "model", format="twofold")
    return str(tmp_path / "model")


def test_a_model_in_a_process_of_its_own(folder, tmp_path):
    settings = LatencySettings(batch_size=2, runs=1, threads=1)
    wanted = [(Lengths(9, 3), 1), (Lengths(5, 2), 1), (Lengths(9, 3), 2), (Lengths(5, 2), 1)]
    found = measure_latency(folder, settings, wanted)
    assert [(t.lengths, t.batch_size) for t in found.timings] == [((9, 3), 1), ((9, 3), 2), ((5, 2), 1)]
    for one in found.timings:
        assert 0 < one.first_token_s["median"] < one.total_s["median"]
    assert Latency.read(json.loads(json.dumps(asdict(found)))) == found
    cost = Cost(path=folder, config=pair_config(stack()), latency=found)
    cost.save(tmp_path / "costs" / "a.json")
    assert Cost.load(tmp_path / "costs" / "a.json") == cost
    (tmp_path / "bad.json").write_text('{"format": 7}')
    with pytest.raises(ValueError, match=r"bad.json is not a cost file .* its format is 7"):
        Cost.load(tmp_path / "bad.json")


@pytest.mark.filterwarnings("ignore:.*no tokenizer files")
def test_a_donor_is_timed_too(tmp_path):
    hf.donor(hf.DONOR_CONFIGS["llama"]).save_pretrained(tmp_path / "donor")
    plans = [
        Plan(
            model=str(tmp_path / "donor"), source_tokens=n, new_tokens=2, batch_sizes=(1,), runs=1, threads=1
        )
        for n in (6, 9)
    ]
    machine, found = time_plans(plans)
    assert [[figures.batch_size for figures in batches] for batches in found] == [[1], [1]]
    assert machine["device"] == "cpu" or "gpu" in machine


def _end() -> None:
    os._exit(9)


def test_a_process_that_is_ended_says_so():
    with pytest.raises(EndedError, match="where memory is short"):
        run_apart(_end)
