import json

import pytest
import yaml

from tests.train.tiny_run import recipe
from twofold.cli.plan import _bytes, _count, _seconds, plan_command
from twofold.train.plan import DEVICES


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe(tmp_path, steps=4).model_dump(mode="json")))
    return path


def call(recipe_file, *overrides, **options):
    defaults = {
        "gpus": 1, "gpu": "h100", "efficiency": 0.5, "mean_source": None, "mean_target": None, "price_per_hour": None,
        "measure": False, "json": True,
    }  # fmt: skip
    plan_command(recipe_file, list(overrides), **(defaults | options))


def test_a_table_and_one_json_object(recipe_file, capsys):
    call(recipe_file, "cross_attention_warmup_steps=1", gpus=2, price_per_hour=3.0)
    printed = capsys.readouterr()
    *shown, last = printed.out.splitlines()
    report = json.loads(last)
    assert report["fits"] is True
    assert report["steps"] == 4
    assert report["tokens"] == 4 * 2 * 2 * 48
    assert [phase["name"] for phase in report["phases"]] == ["cross-attention alone", "everything"]
    assert report["cost"] == pytest.approx(report["seconds"] / 3600 * 6)
    text = "\n".join(shown)
    assert "peak per device" in text
    assert "fits" in text
    assert "H100" in printed.err


def test_what_does_not_fit_says_what_to_change(recipe_file, monkeypatch, capsys):
    from dataclasses import replace

    tiny = replace(DEVICES["l4"], memory_bytes=400_000)
    monkeypatch.setitem(DEVICES, "l4", tiny)
    call(recipe_file, gpu="l4")
    text = capsys.readouterr().out
    assert "does not fit" in text
    assert "activation_checkpointing=full" in text


def test_lengths_go_together(recipe_file):
    with pytest.raises(ValueError, match="--mean-source and --mean-target go together"):
        call(recipe_file, mean_source=10)


def test_numbers_are_short():
    assert [_count(n) for n in (999, 12_345, 12.3e9)] == ["999", "12.3k", "12.3B"]
    assert [_bytes(n) for n in (500, 73.6e9)] == ["0.5 kB", "73.6 GB"]
    assert [_seconds(s) for s in (0.0021, 5, 90, 36_000, 200_000)] == [
        "2.1 ms", "5.0 s", "1.5 min", "10.0 h", "2.3 days",
    ]  # fmt: skip
