"""A decoder-only model, opened as a pair, computes its own logits; and results survive their file."""

from dataclasses import replace

import pytest
import torch

import twofold
from tests.models import hf
from tests.models.tiny import build, pair_config, random_ids, stack
from twofold.evaluate import Evaluation, TaskResult, kind_of, open_contender

LOSSLESS = {
    "layout": "merged",
    "reads": "aligned",
    "cross_rope": True,
    "decoder_positions": "continue",
    "decoder_start": "last_source_token",
    "tie_word_embeddings": "all",
    "encoder_mask": ("causal",) * 3,
}


@pytest.mark.filterwarnings("ignore:.*no tokenizer files")
@pytest.mark.parametrize("family", hf.DONOR_CONFIGS)
@torch.no_grad()
def test_a_decoder_only_model_is_itself(family, tmp_path):
    donor = hf.donor(hf.DONOR_CONFIGS[family]).eval()
    donor.save_pretrained(tmp_path / "small-3.2")
    found = open_contender(tmp_path / "small-3.2")
    assert (found.name, found.kind) == ("small-3.2", "decoder-only")
    ids = random_ids(2, 12)
    wanted = donor(ids).logits[:, 6:]
    logits = found.model(ids[:, :6], None, ids[:, 6:]).logits
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*no tokenizer files")
def test_a_tuned_donor_stays_one(tmp_path):
    """What training saves of it is a pair's folder; it is known by what it computes."""
    config = pair_config(stack(), **LOSSLESS, tie_stacks=True)
    twofold.save(build(config), tmp_path / "tuned")
    assert open_contender(tmp_path / "tuned").kind == "decoder-only"


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_stacks": False},
        {"encoder_mask": ("causal", "sink", "causal")},
        {"aligned_layers": (0, 1, 1)},
        {"decoder_positions": "restart"},
        {"decoder_start": "bos"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_pairs_are_pairs(changes):
    config = pair_config(stack(), **(LOSSLESS | {"tie_stacks": True} | changes))
    assert kind_of(config) == "encoder-decoder"


def evaluation() -> Evaluation:
    task = TaskResult(
        task="piqa", metric="acc", value=0.5, error=0.5, n=2, values=(1.0, 0.0), others={"acc_norm": 1.0}
    )
    return Evaluation(
        model="small", path="a/small", kind="decoder-only", parameters=7, tasks={"piqa": task},
        settings={"limit": 2}, versions={}, hardware={}, command="twofold eval", date="2026-01-01", seconds=1.0,
    )  # fmt: skip


def test_results_come_back_from_their_file(tmp_path):
    evaluation().save(tmp_path / "new" / "results.json")
    assert Evaluation.load(tmp_path / "new" / "results.json") == evaluation()
    replace(evaluation(), seconds=2.0).save(tmp_path / "new" / "results.json")
    assert Evaluation.load(tmp_path / "new" / "results.json").seconds == 2.0
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["results.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "tasks": {"a": {}}}', "{"])
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="not an evaluation"):
        Evaluation.load(tmp_path / "results.json")
