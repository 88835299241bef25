"""What the training benchmark relies on: counts of bytes, fair samples, parts that merge, contenders that agree."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_live_bytes_are_those_of_the_largest_moment():
    from training_loss import LiveBytes

    x = torch.ones(1000)
    with LiveBytes([x]) as live:
        a = x + 1  # 4000 bytes
        b = a + 1  # 8000
        del a  # 4000
        view = b[:10]  # no storage of its own
        c = torch.cat([b, b])  # 12000
        del b, view
        d = c + 1  # 16000, or, had the view not kept b alive until here, the same
        del c
        x.add_(1)  # in place, and known before
    assert live.peak() == 16_000
    assert live.peak(without=[d]) == 12_000


def test_plain_loss_holds_four_times_its_logits_on_every_device():
    from training_loss import measure_memory, plain_loss

    real = measure_memory(plain_loss, 64, 16, 4096, "cpu")
    assert measure_memory(plain_loss, 64, 16, 4096, "meta") == real
    # tanh of the logits, their log-softmax and its two gradients, and a few scalars.
    assert 4 * 64 * 4096 * 4 <= real["extra_bytes"] < 4 * 64 * 4096 * 4 + 100


def test_plain_loss_is_capped_cross_entropy():
    from training_loss import inputs, plain_loss

    states, labels, weight = inputs(8, 16, 100, "cpu")
    logits = (states.double() @ weight.double().T) / 30
    expected: Tensor = -(30 * logits.tanh()).log_softmax(-1)[torch.arange(8), labels].sum()
    torch.testing.assert_close(plain_loss(states, labels, weight).double(), expected, rtol=1e-6, atol=0)
    assert (logits * 30).abs().max() > 15  # the cap matters


def test_a_sample_is_spread_over_the_lengths():
    from training_cases import spread

    lengths = [5, 1, 9, 3, 7, 2, 8, 4, 6, 10]
    assert spread(lengths, lengths, 5) == [2, 4, 6, 8, 10]
    with pytest.raises(ValueError, match="10 pairs to choose from, 11"):
        spread(lengths, lengths, 11)


def test_parts_merge_into_one_file(tmp_path: Path):
    import training

    out = tmp_path / "training.json"
    training.merge({"a": {"metrics": {"x": 1.0}}, "b": {"metrics": {"y": 2.0}}}, out, "cpu")
    training.merge({"b": {"metrics": {"y": 3.0}}}, out, "cpu")
    training.merge({"b": {"metrics": {"y": 4.0}}}, out, "cuda")
    written = json.loads(out.read_text())
    assert written["metrics"] == {"x": 1.0, "y": 3.0, "cuda_y": 4.0}
    assert list(written["parts"]) == ["a", "b", "b on cuda"]


def test_contenders_that_compute_different_losses_are_not_compared():
    from training_throughput import Comparison

    ours = {"loss": 10.0, "scored_tokens": 5, "real_tokens": 50}
    assert Comparison._compare_losses(ours, ours | {"loss": 10.0005}) == pytest.approx(5e-5, rel=1e-3)
    for other in ({"loss": 10.01}, {"scored_tokens": 6}, {"real_tokens": 51}):
        with pytest.raises(RuntimeError, match="differ in what they compute"):
            Comparison._compare_losses(ours, ours | other)


def test_both_contenders_do_the_same_work(tmp_path: Path, byte_tokenizer, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("accelerate", reason="Seq2SeqTrainer needs accelerate")
    import training_cases
    import training_peer
    from training_contend import contend
    from training_throughput import LOSS_TOLERANCE
    from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq

    byte_tokenizer = type(byte_tokenizer)(
        tokenizer_object=byte_tokenizer.backend_tokenizer, pad_token="<|im_end|>"
    )
    monkeypatch.setattr(training_cases, "smollm2_tokenizer", lambda: byte_tokenizer)
    training_cases.write_model(training_cases.Shape(2, 256, 64, 4, 4, 64), 258, tmp_path / "model")
    pairs = [{"prompt": "abc " * n, "completion": "de" * (n % 5 + 1)} for n in range(1, 9)]
    training_cases.write_pairs(tmp_path / "pairs.jsonl", pairs)
    common = {
        "model": str(tmp_path / "model"),
        "pool": str(tmp_path / "pairs.jsonl"),
        "check": str(tmp_path / "pairs.jsonl"),
        "warmup_steps": 1,
    }
    row = {"source_length": 64, "target_length": 32, "measured_steps": 3}
    ours = contend({"contender": "ours", **row, **common})
    default = contend({"contender": "peer", "batch_size": 4, **common})
    tuned = contend({"contender": "peer", "tuned": True, "batch_size": 2, "accumulate": 2, **common})

    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):  # a model without one is told apart
        changed = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
        for stack in (changed.config.encoder, changed.config.decoder):
            setattr(stack, cap, None)
        for module in changed.modules():
            if hasattr(module, cap):
                setattr(module, cap, None)
        features = training_cases.read_features(tmp_path / "pairs.jsonl", byte_tokenizer)
        collator = DataCollatorForSeq2Seq(byte_tokenizer, model=changed)
        without = training_peer.pool_loss(changed, features, collator)["loss"]
        assert abs(without / ours["check"]["loss"] - 1) > LOSS_TOLERANCE

    targets = sum(len(pair["completion"]) + 1 for pair in pairs)
    sources = sum(len(pair["prompt"]) for pair in pairs)
    for report in (ours, default):
        assert report["check"]["scored_tokens"] == targets
        assert report["check"]["real_tokens"] == targets + sources
    assert ours["check"]["loss"] == pytest.approx(default["check"]["loss"], rel=1e-5)
    assert default["chosen"]["attention"] == "eager"
    for report in (default, tuned):  # the whole pool, and none of the warm-up
        assert report["real_tokens"] == targets + sources
        assert report["steps"] == 2
    assert tuned["positions"] < default["positions"]
    assert tuned["chosen"]["gradient_accumulation_steps"] == 2
    assert ours["real_tokens"] <= ours["positions"] == 3 * (64 + 32)
    with pytest.raises(KeyError, match="unknown settings"):
        contend({"batchsize": 4})


def test_commands_name_no_folder_of_the_machine():
    from common import command

    root = Path(__file__).parents[2]
    typed = [
        str(root / "benchmarks" / "study" / "study.py"),
        "/data/donor.gguf",
        "--part",
        "start",
        "--arm",
        "a b",
    ]
    wanted = "python benchmarks/study/study.py donor.gguf --part start --arm 'a b'"
    assert command(typed) == wanted
    assert command(["benchmarks/training.py", "--quick"]) == "python benchmarks/training.py --quick"
