"""Exports: what is written computes what the model computes, or nothing is written."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import twofold
from tests.models.tiny import (
    MEETINGS,
    assert_same,
    build,
    gemma_stack,
    meeting_id,
    pair_config,
    random_ids,
    stack,
)
from twofold.config import RopeConfig
from twofold.export import TARGETS, export
from twofold.export.agreement import Written, in_float32, samples

GEMMA2 = {
    "qk_norm": False,
    "rope": {t: RopeConfig(theta=100.0) for t in ("full_attention", "sliding_attention")},
}
GEMMA3 = {"bidirectional_window": "total", "attn_logit_softcapping": None}


def t5gemma(**changes):
    return build(pair_config(gemma_stack(**GEMMA2), **changes), qk_factor=2.0)


def t5gemma2():
    config = pair_config(
        gemma_stack(**GEMMA3), layout="merged", tie_word_embeddings="all", eoi_token_id=7, source_bos=True
    )
    return build(config)


@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
@pytest.mark.parametrize("start", ["bos", "last_source_token"])
def test_any_pair_is_a_folder_of_transformers(meeting, start, tmp_path):
    pair = build(pair_config(gemma_stack(), decoder_start=start, **meeting))
    exported = export(pair, tmp_path / "out", to="hf")
    assert exported.difference < 1e-5
    assert exported.tokens_compared == 1 + 8 + 11 + 24
    assert exported.difference_rounded is None
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    ids, targets = random_ids(2, 6), random_ids(2, 5, seed=1)
    given = torch.ones_like(ids), targets, torch.ones_like(targets)
    assert torch.equal(loaded(ids, *given).logits, pair(ids, *given).logits)


@pytest.mark.parametrize(("make", "name"), [(t5gemma, "t5gemma"), (t5gemma2, "t5gemma2")])
def test_released_families(make, name, tmp_path):
    """The windows of 3 bind in the decoder; the encoder is compared within them."""
    pair = make()
    exported = export(pair, tmp_path / "out", to=name)
    assert exported.difference < 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == name
    with pytest.warns(UserWarning, match="no tokenizer files"):
        assert twofold.load(tmp_path / "out").config.encoder == pair.config.encoder


def test_a_bfloat16_model_is_compared_as_stored(tmp_path):
    pair = t5gemma().bfloat16()
    assert export(pair, tmp_path / "out", to="hf").difference < 1e-5
    assert pair.lm_head.out_proj.weight.dtype == torch.bfloat16
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": "all"}])
def test_in_float32(changes):
    pair = t5gemma(**changes).bfloat16()
    twin = in_float32(pair)
    ids = random_ids(1, 5)
    assert twin.lm_head.out_proj.weight is twin.decoder.embed_tokens.weight
    assert_same(twin(ids, None, ids).logits, pair.float()(ids, None, ids).logits)


@pytest.mark.parametrize("source_bos", [False, True])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_tokenizer_begins_sources_as_the_pair_does(text_model, source_bos, adds_bos, tmp_path):
    from tokenizers.processors import TemplateProcessing

    pair = text_model(source_bos=source_bos)
    pair.tokenizer = copy.deepcopy(pair.tokenizer)
    before = pair.tokenizer("ab")["input_ids"]
    if adds_bos:
        pair.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 256), ("<|im_end|>", 257)]
        )
        assert pair.tokenizer("ab")["input_ids"] == [256, *before, 257]
    export(pair, tmp_path / "out", to="hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("ab")["input_ids"] == ([256] if source_bos else []) + before
    assert tokenizer.pad_token_id == 257
    assert pair.tokenizer("ab")["input_ids"] == ([256, *before, 257] if adds_bos else before)
    assert tokenizer.chat_template == pair.tokenizer.chat_template


def test_samples_begin_as_the_pair_wants():
    config = pair_config(stack(max_position_embeddings=12), source_bos=True)
    found = samples(config)
    assert [(len(source), len(target)) for source, target in found] == [(2, 2), (6, 6), (6, 6), (6, 6)]
    assert all(source[0] == target[0] == 2 for source, target in found)
    assert not {0, 1, 2} & {token for source, target in found for token in (*source[1:], *target[1:])}
    assert max(len(source) for source, _ in samples(pair_config(stack()), max_source=3)) == 3
    assert found == samples(config)


def test_what_does_not_agree_is_removed(tmp_path, monkeypatch):
    right = TARGETS["hf"]

    def write(model, folder):
        with torch.no_grad():
            model.decoder.norm.weight.mul_(1.001)
            written = right.write(model, folder)
            model.decoder.norm.weight.div_(1.001)
        return written

    monkeypatch.setitem(TARGETS, "hf", replace(right, write=write))
    with pytest.raises(
        ValueError, match=r"differs from the model by up to 0\.00\d+ nats .*nothing was written"
    ):
        export(t5gemma(), tmp_path / "out", to="hf")
    nan = Written(run=lambda given: [torch.full((len(target) - 1,), torch.nan) for _, target in given])
    monkeypatch.setitem(TARGETS, "hf", replace(right, write=lambda model, folder: nan))
    with pytest.raises(ValueError, match="by up to nan"):
        export(t5gemma(), tmp_path / "out", to="hf")
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused(tmp_path):
    pair = t5gemma()
    with pytest.raises(
        ValueError, match="must be one of t5gemma, t5gemma2, hf, ctranslate2, openvino, got 'onnx'"
    ):
        export(pair, tmp_path / "out", to="onnx")
    with pytest.raises(ValueError, match="export to hf takes no options, got quantization"):
        export(pair, tmp_path / "out", to="hf", quantization="int8")
    with pytest.raises(ValueError, match="not a T5Gemma 2 model"):
        export(pair, tmp_path / "out", to="t5gemma2")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FileExistsError):
        export(pair, tmp_path / "out", to="hf")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
