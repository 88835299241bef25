"""The structure of what is measured, in this process and in one of its own; no figure is held to a value."""

import json

import pytest

import twofold
from twofold.infer.bench import Failed, Figures, Plan, bench, measure, measure_apart


@pytest.fixture
def folder(tmp_path, text_model):
    twofold.save(text_model(), tmp_path / "model", format="twofold")
    return str(tmp_path / "model")


RECORDS = ({"text": "the quick brown fox"}, {"prompt": "one, two,", "completion": " three"})
SMALL = {"source_tokens": 6, "new_tokens": 3, "batch_sizes": (1, 3), "runs": 2, "threads": 1}


def test_a_report_of_two_precisions(folder):
    plans = [Plan(model=folder, precision=p, records=RECORDS, **SMALL) for p in ("float32", "bfloat16")]
    report = bench(plans, run=measure)
    written = json.loads(json.dumps(report.as_json()))
    assert (written["model"], written["source_tokens"], written["runs"]) == (folder, 6, 2)
    assert list(written["precisions"]) == ["float32", "bfloat16"]
    for figures in written["precisions"].values():
        assert [batch["batch_size"] for batch in figures["batches"]] == [1, 3]
        for batch in figures["batches"]:
            for name in ("first_token_s", "decode_tokens_per_s"):
                low, middle, high = (batch[name][key] for key in ("min", "median", "max"))
                assert 0 < low <= middle <= high
            assert batch["peak_bytes"] > 10**7
        assert "measured" not in figures
    exact, rounded = (written["precisions"][p]["quality"] for p in ("float32", "bfloat16"))
    assert (exact["difference"], exact["identical"]) == (0, 1)
    assert 0 < abs(rounded["difference"]) < 0.2
    assert exact["nats_per_token"] + rounded["difference"] == pytest.approx(rounded["nats_per_token"])


def test_without_quality_and_with_what_is_not_available(folder, monkeypatch):
    from twofold.infer import bench as bench_module
    from twofold.infer.timing import NotAvailableError, make_engine

    def no_int4(model, *, precision, **settings):
        if precision == "int4":
            raise NotAvailableError("int4 is for another day")
        return make_engine(model, precision=precision, **settings)

    monkeypatch.setattr(bench_module, "make_engine", no_int4)
    plans = [Plan(model=folder, precision=p, **SMALL) for p in ("int4", "float32")]
    report = bench(plans, run=measure)
    failed, figures = report.results
    assert failed == Failed(precision="int4", reason="int4 is for another day")
    assert isinstance(figures, Figures)
    assert figures.measured is None
    assert report.quality(figures) is None
    assert report.as_json()["precisions"]["int4"] == {"failed": "int4 is for another day"}
    assert report.as_json()["precisions"]["float32"]["quality"] is None


def test_in_a_process_of_its_own(folder):
    found = measure_apart(Plan(model=folder, **(SMALL | {"batch_sizes": (2,), "new_tokens": 1, "runs": 1})))
    assert isinstance(found, Figures)
    assert found.batches[0].decode_tokens_per_s is None  # one token each: nothing is decoded after it
    with pytest.raises((ValueError, OSError), match="no-such-model"):
        measure_apart(Plan(model="./no-such-model"))


def test_numbers_below_one_are_refused():
    for changes, name in [
        ({"runs": 0}, "runs"),
        ({"batch_sizes": (1, 0)}, "batch size 0"),
        ({"threads": 0}, "threads"),
    ]:
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Plan(model="m", **changes)
    with pytest.raises(ValueError, match="no batch size given"):
        Plan(model="m", batch_sizes=())
