"""The demo on a tiny random donor: interrupted in training, resumed, reported. It cannot be fluent, and says so."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.hf import donor, llama_config

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


@pytest.fixture
def tiny_donor(tmp_path, byte_tokenizer):
    config = llama_config(
        vocab_size=258,
        max_position_embeddings=1024,
        bos_token_id=256,
        eos_token_id=257,
        tie_word_embeddings=True,
    )
    donor(config).save_pretrained(tmp_path / "donor")
    byte_tokenizer.save_pretrained(tmp_path / "donor")
    return tmp_path / "donor"


def test_interrupted_demo_resumes_and_reports(tiny_donor, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", DEMO, "--out", out, "--donor", tiny_donor, "--steps", "40"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in first.stdout:
        if line.startswith("step 1/40"):
            first.send_signal(signal.SIGINT)
            break
    rest, _ = first.communicate(timeout=120)
    assert first.returncode == 130, rest
    assert "goes on from here" in rest
    assert not (out / "report.html").exists()

    second = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert "done before: Adapt" in second.stdout, second.stdout + second.stderr
    assert "going on after step" in second.stdout
    assert second.returncode == 1  # word salad
    assert "an answer is not fluent" in second.stdout
    state = json.loads((out / "demo.json").read_text())
    assert len(state["train"]["losses"]) == 40
    assert state["donor"]["loss"] > 0
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page
    for question in state["answers"]["questions"]:
        assert question[:20] in page
    train = set((out / "train.jsonl").read_text().splitlines())
    held_out = set((out / "held_out.jsonl").read_text().splitlines())
    assert len(held_out) >= 3
    paragraphs = [
        {p.strip() for line in lines for p in json.loads(line)["text"].split("\n\n") if p.strip()}
        for lines in (train, held_out)
    ]
    assert not paragraphs[0] & paragraphs[1]
