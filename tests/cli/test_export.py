"""`twofold export` as a user types it."""

import json

import pytest

import twofold
from tests.models.tiny import build, pair_config, stack


@pytest.fixture
def run(run):
    """With stderr in one line."""

    def call(*arguments):
        status, out, err = run(*arguments)
        return status, out, " ".join(err.split())

    return call


@pytest.fixture
def pair(tmp_path, byte_tokenizer):
    one = stack(vocab_size=258, layer_types=("full_attention",) * 3)
    model = build(pair_config(one, bos_token_id=256, eos_token_ids=(257,), pad_token_id=257))
    model.tokenizer = byte_tokenizer
    twofold.save(model, tmp_path / "pair")
    return tmp_path / "pair"


@pytest.mark.parametrize("target", ["hf", "ctranslate2", "openvino"])
def test_export(run, pair, tmp_path, target):
    if target != "hf":
        pytest.importorskip(target)
    status, out, err = run("export", pair, "--to", target, "-o", tmp_path / "out", "--json")
    assert status == 0, err
    result = json.loads(out)
    assert (result["to"], result["out"], result["quantization"]) == (target, str(tmp_path / "out"), None)
    assert result["difference"] < 1e-4
    assert f"wrote {tmp_path / 'out'} ({target}); 44 tokens' log-probabilities are within" in err
    status, _, err = run("export", pair, "--to", target, "-o", tmp_path / "out")
    assert status == 2
    assert "exists and is not empty" in err


@pytest.mark.parametrize("target", ["ctranslate2", "openvino"])
def test_quantization(run, pair, tmp_path, target):
    pytest.importorskip(target)
    options = ["--to", target, "--quantization", "int8", "-o", tmp_path / "out"]
    status, out, err = run("export", pair, *options, "--json")
    assert status == 0, err
    assert "with weights rounded to int8 within" in err
    assert json.loads(out)["difference_rounded"] > json.loads(out)["difference"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "onnx"], "export target must be one of t5gemma, t5gemma2, hf, ctranslate2, openvino"),
        (["--to", "t5gemma"], "not a T5Gemma model"),
        (["--to", "hf", "--quantization", "int8"], "takes no options, got quantization"),
    ],
)
def test_errors_leave_nothing_behind(run, pair, tmp_path, options, message):
    status, _, err = run("export", pair, *options, "-o", tmp_path / "out")
    assert status == 2
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]
