"""The commands as a user types them: in a process of their own, or called with their arguments."""

import json
import subprocess
import sys

import pytest

import twofold
from tests.models.hf import donor, gemma2_config, llama_config


@pytest.fixture
def donor_folder(tmp_path, byte_tokenizer):
    folder = tmp_path / "donor"
    config = llama_config(vocab_size=258, max_position_embeddings=256, bos_token_id=256, eos_token_id=257)
    donor(config).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def test_adapt_inspect_generate(run, donor_folder, tmp_path):
    pair = tmp_path / "pair"
    status, out, err = run(
        "adapt", donor_folder, "-o", pair, "--start", "lossless", "--encoder-mask", "sink", "--json"
    )
    assert status == 0, err
    summary = json.loads(out)
    assert summary["out"] == str(pair)
    assert summary["start"] == "lossless"

    status, out, _ = run("inspect", pair, "--json")
    report = json.loads(out)
    assert status == 0
    assert report["encoder_mask"] == "4 sink"
    assert report["parameters"]["total"] == summary["num_parameters"]
    assert report["problems"] == []
    assert report["adapted_from"]["start"] == "lossless"

    status, out, _ = run("generate", pair, "hello", "good bye", "--max-new-tokens", "4", "--json")
    assert status == 0
    lines = [json.loads(line) for line in out.splitlines()][:-1]
    expected = twofold.Engine(twofold.load(pair), device="cpu").generate(
        ["hello", "good bye"], max_new_tokens=4
    )
    assert [line["token_ids"] for line in lines] == [list(c.token_ids) for c in expected]


def test_adapt_options_reach_the_plan(run, donor_folder, tmp_path):
    out = tmp_path / "pair"
    options = "--start scaled_copy --reads aligned --cross-rope --decoder-positions continue --decoder-layers 0,2-3 "
    options += "--encoder-mask sink,sink,causal,bidirectional --dtype bfloat16 --output-scale 0.2 --decoder-start bos"
    status, _, err = run("adapt", donor_folder, "-o", out, *options.split())
    assert status == 0, err
    config = twofold.load(out).config
    assert (config.reads, config.cross_rope, config.decoder_positions) == ("aligned", True, "continue")
    assert config.aligned_layers == (0, 2, 3)
    assert config.encoder_mask == ("sink", "sink", "causal", "bidirectional")


def test_profile_and_auto(run, donor_folder, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{n} " * 300}) + "\n" for n in range(3)))
    options = ["--profile-text", f"counts={texts}", "--budget", "9"]
    status, out, err = run("adapt", donor_folder, "-o", tmp_path / "profile", "--profile", *options)
    assert status == 0, err
    assert "counts" in out
    written = json.loads((tmp_path / "profile" / "profile.json").read_text())
    assert written["encoder_mask"] == ["sink"] * 4
    assert written["examples"] == {"counts": 3}
    assert (tmp_path / "profile" / "profile.png").stat().st_size > 1000
    status, _, err = run("adapt", donor_folder, "-o", tmp_path / "profile", "--profile", *options)
    assert status == 2
    assert "profile.json" in err

    auto = ["--start", "lossless", "--encoder-mask", "auto", *options]
    status, _, err = run("adapt", donor_folder, "-o", tmp_path / "pair", *auto, "--tie-stacks")
    assert status == 0, err
    assert "4 of 4 layers open, later tokens with a share of 1" in err
    config = twofold.load(tmp_path / "pair").config
    assert config.encoder_mask == ("sink",) * 4
    assert config.tie_stacks
    status, _, err = run("adapt", donor_folder, "-o", tmp_path / "short", *auto, "--decoder-depth", "2")
    assert status == 0, err
    config = twofold.load(tmp_path / "short").config
    assert f"layers {', '.join(map(str, config.aligned_layers))} of the pair stay" in err
    assert (config.encoder.num_hidden_layers, config.decoder.num_hidden_layers) == (4, 2)


def test_stitched_donors_of_two_widths(run, donor_folder, tmp_path, byte_tokenizer):
    big = tmp_path / "big"
    config = llama_config(
        vocab_size=258, max_position_embeddings=256, bos_token_id=256, eos_token_id=257, hidden_size=48,
        num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=5,
    )  # fmt: skip
    donor(config, seed=1).save_pretrained(big)
    byte_tokenizer.save_pretrained(big)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{n} and {n * n}, " * 30}) + "\n" for n in range(20)))
    options = ["--start", "stitched", "--profile-text", f"counts={texts}", "--stitch-tokens", "3000"]
    status, out, err = run("adapt", big, donor_folder, "-o", tmp_path / "pair", *options, "--json")
    assert status == 0, err
    assert json.loads(out)["cross_attention"].endswith("fitted in closed form")
    report = json.loads((tmp_path / "pair" / "adaptation.json").read_text())["stitch"]
    assert report["tokens"] + report["held_out_tokens"] == 3000
    status, out, _ = run("inspect", tmp_path / "pair", "--json")
    assert status == 0
    assert json.loads(out)["source_projections"] == "own"
    status, _, err = run("adapt", big, donor_folder, "-o", tmp_path / "again", *options)
    assert status == 0
    assert "fitted on 2," in err
    assert "variance explained" in err
    prompt = ["generate", tmp_path / "pair", "hello", "--max-new-tokens", "4"]
    assert run(*prompt)[0] == 0


def test_inspect_shows_a_donor_and_a_table(run, donor_folder, tmp_path):
    status, out, _ = run("inspect", donor_folder)
    assert status == 0
    assert "decoder-only donor (llama)" in out
    assert "hidden_size" in out
    donor(gemma2_config()).save_pretrained(tmp_path / "gemma")
    assert "soft_caps" in run("inspect", tmp_path / "gemma")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapt", "nowhere", "-o", "x"], "no such file or folder"),
        (["inspect", "nowhere"], "no such file or folder"),
        (["generate", "nowhere"], "exactly one of them"),
        (["adapt", "nowhere", "-o", "x", "--dtype", "float8"], "--dtype must be one of"),
        (["adapt", "nowhere", "-o", "x", "--decoder-layers", "a"], "such as 0,3,6 or 0-9"),
        (["adapt", "nowhere", "-o", "x", "--start", "magic"], "start must be one of"),
    ],
)
def test_errors_are_one_message_and_status_2(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*arguments)
    assert status == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_command_is_installed():
    result = subprocess.run(
        [sys.executable, "-c", "from twofold.cli import main; main()", "--help"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0
    for verb in ("adapt", "inspect", "generate", "train"):
        assert verb in result.stdout
