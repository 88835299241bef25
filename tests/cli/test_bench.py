import json

import pytest

import twofold
from twofold.cli import bench as bench_cli
from twofold.infer.bench import bench, measure


@pytest.fixture
def call(tmp_path, text_model, monkeypatch):
    """The command in this process, on a tiny model."""
    folder = tmp_path / "model"
    twofold.save(text_model(), folder, format="twofold")
    monkeypatch.setattr(bench_cli.out, "width", 160)
    plans_seen = []

    def in_this_process(plans, watch):
        plans_seen.extend(plans)
        return bench(plans, run=measure, watch=watch)

    monkeypatch.setattr(bench_cli, "bench", in_this_process)

    def run(**options):
        defaults = {
            "precision": "float32", "backend": "auto", "source_tokens": 6, "new_tokens": 3, "batch": "1", "runs": 1,
            "threads": 1, "quality": None, "quality_texts": 2, "skip_vision": False, "json": True,
        }  # fmt: skip
        bench_cli.bench_command(str(folder), **(defaults | options))
        return plans_seen

    return run


def test_tables_and_one_json_object(call, capsys):
    call(precision="bfloat16", batch="2,1,2", quality=bench_cli.DOCUMENTATION)
    printed = capsys.readouterr()
    *shown, last = printed.out.splitlines()
    report = json.loads(last)
    assert list(report["precisions"]) == ["float32", "bfloat16"]
    assert [b["batch_size"] for b in report["precisions"]["bfloat16"]["batches"]] == [2, 1]
    assert report["precisions"]["float32"]["quality"]["identical"] == 1
    assert "float32 is measured too" in printed.err
    text = "\n".join(shown)
    assert "6 tokens read, 3 written" in text
    assert "+0.0000 ± 0.0000" in text


def test_a_file_of_texts(call, tmp_path, capsys):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "good morning"}\n{"prompt": "good", "completion": " night"}\n')
    (plan,) = call(quality=str(file), json=False)
    assert plan.records == ({"text": "good morning"}, {"prompt": "good", "completion": " night"})
    assert "perplexity" in capsys.readouterr().out
    call(json=False)
    assert "perplexity" not in capsys.readouterr().out


def test_what_is_not_available_says_why(call, capsys, monkeypatch):
    from twofold.infer import bench as infer_bench
    from twofold.infer.timing import NotAvailableError

    def refuse(*_, **__):
        raise NotAvailableError("pip install something")

    monkeypatch.setattr(infer_bench, "make_engine", refuse)
    call()
    printed = capsys.readouterr()
    assert "not available" in printed.out
    assert "float32: pip install something" in printed.err


def test_unknown_names_are_refused(call):
    with pytest.raises(ValueError, match=r"--precision takes float32, bfloat16, int8, int4; got 'fp8'"):
        call(precision="float32,fp8")
    with pytest.raises(ValueError, match="--backend takes auto, torch, openvino"):
        call(backend="onnx")
    with pytest.raises(ValueError, match="--batch takes whole numbers"):
        call(batch="1;2")
