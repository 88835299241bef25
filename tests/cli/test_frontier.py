"""The command, on two tiny models with evaluations made up for them."""

import json

import pytest

import twofold
from tests.evaluate.examples import evaluation, one_stack, result
from tests.models.tiny import build, pair_config, stack


@pytest.fixture
def files(tmp_path, byte_tokenizer):
    side = stack(vocab_size=258, max_position_embeddings=256)
    found = []
    for name, config, right in (("stack", one_stack(pair_config(side)), 20), ("pair", pair_config(side), 30)):
        model = build(config)
        model.tokenizer = byte_tokenizer
        twofold.save(model, tmp_path / name, format="twofold")
        kind = "decoder-only" if name == "stack" else "encoder-decoder"
        tasks = [
            result(task, [i < right for i in range(40)], source_tokens=10.0, target_tokens=3.0)
            for task in "ab"
        ]
        evaluation(name, tasks, path=str(tmp_path / name), kind=kind).save(tmp_path / f"{name}.json")
        found.append(str(tmp_path / f"{name}.json"))
    return found


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    monkeypatch.setattr("twofold.evaluate.latency.run_apart", lambda work, *arguments: work(*arguments))


def test_a_report_of_two_models(files, tmp_path, run):
    out = tmp_path / "out"
    options = ["-o", out, "--batch", 2, "--runs", 1, "--threads", 1, "--json"]
    status, printed, notes = run("frontier", *files, *options)
    assert status == 0, notes
    *table, last = printed.splitlines()
    numbers = json.loads(last)
    assert [entry["name"] for entry in numbers["entries"]] == ["pair", "stack"]
    assert [entry["score"]["value"] for entry in numbers["entries"]] == [75.0, 50.0]
    assert numbers["entries"][0]["difference"]["value"] == 25.0
    assert all(entry["latency_s"]["median"] > 0 for entry in numbers["entries"])
    assert numbers["report"] == str(out / "index.html")
    assert "+25.0" in "\n".join(table)
    assert "pair scores 75.0 points, 25.0 points above stack" in notes
    assert sorted(file.name for file in out.iterdir()) == [
        "comparison.json", "costs", "frontier.json", "index.html", "quality-flops.png", "quality-flops.svg",
        "quality-latency.png", "quality-latency.svg",
    ]  # fmt: skip
    assert "twofold frontier" in json.loads((out / "frontier.json").read_text())["command"]

    page = (out / "index.html").read_bytes()
    status, _, notes = run("frontier", *files, "-o", out, "--batch", 4, "--runs", 1, "--threads", 1)
    assert status == 2
    assert "batch_size was 2, now 4" in notes
    assert (out / "index.html").read_bytes() == page


def test_scores_alone(files, tmp_path, run):
    status, printed, notes = run(
        "frontier", f"base={files[0]}", files[1], "-o", tmp_path / "out", "--no-measure", "--tasks", "b",
        "--baseline", "pair",
    )  # fmt: skip
    assert status == 0, notes
    assert "against pair" in printed
    numbers = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert (numbers["tasks"], numbers["left_out"]) == (["b"], ["a"])
    assert not (tmp_path / "out" / "quality-latency.png").exists()
    assert (tmp_path / "out" / "quality-flops.png").exists()


def test_what_does_not_go_together(files, tmp_path, run):
    out = tmp_path / "out"
    for options, message in [
        (["--source-tokens", 5], "go together"),
        (["--source-tokens", 0, "--target-tokens", 2], "--source-tokens must be at least 1, got 0"),
        (["--tasks", "a", "--suite", "pt"], "give one of them"),
        (["--precision", "fp8"], "--precision takes float32, bfloat16, int8, int4; got 'fp8'"),
        (["--batch", 0], "batch_size must be at least 1, got 0"),
        (["--baseline", "nobody", "--no-measure"], "the baseline is one of stack, pair"),
    ]:
        status, _, notes = run("frontier", *files, "-o", out, *options)
        assert (status, message in notes) == (2, True), notes
    assert not (out / "index.html").exists()
