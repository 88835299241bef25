"""Whole models to folders and back, and into transformers."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import twofold
from tests.models.hf import VISION
from tests.models.tiny import (
    MEETINGS,
    VOCAB,
    assert_same,
    build,
    gemma_stack,
    meeting_id,
    pair_config,
    random_ids,
    stack,
)
from twofold.adapt.vocabulary import resize_vocabulary
from twofold.config import EncoderDecoderConfig
from twofold.models import EncoderDecoder

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer files.*")


def t5gemma_like(**changes) -> EncoderDecoderConfig:
    gemma2 = gemma_stack(
        qk_norm=False, rope={t: {"theta": 1e4} for t in ("full_attention", "sliding_attention")}
    )
    return pair_config(gemma2, **changes)


def t5gemma2_like() -> EncoderDecoderConfig:
    gemma3 = gemma_stack(
        bidirectional_window="total", attn_logit_softcapping=None, final_logit_softcapping=None
    )
    return pair_config(gemma3, layout="merged", tie_word_embeddings="all", eoi_token_id=9, source_bos=True)


@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
@torch.no_grad()
def test_save_and_load_give_the_same_model(meeting, tmp_path):
    model = build(pair_config(gemma_stack(), encoder_mask=("sink", "causal", "bidirectional"), **meeting))
    twofold.save(model, tmp_path / "m")
    loaded = twofold.load(tmp_path / "m")
    assert loaded.config == model.config
    ids = random_ids(2, 7)
    assert torch.equal(loaded(ids, None, ids).logits, model(ids, None, ids).logits)
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("tie", ["all", "decoder", "none"])
def test_shared_parameters_are_stored_once_and_shared_again(tie, tmp_path):
    model = build(pair_config(stack(), tie_word_embeddings=tie))
    twofold.save(model, tmp_path / "m")
    tables = [n for n in load_file(tmp_path / "m" / "model.safetensors") if "embed" in n or "lm_head" in n]
    assert len(tables) == {"all": 1, "decoder": 2, "none": 3}[tie]
    loaded = twofold.load(tmp_path / "m")
    assert (loaded.lm_head.out_proj.weight is loaded.decoder.embed_tokens.weight) == (tie != "none")
    assert (loaded.encoder.embed_tokens.weight is loaded.decoder.embed_tokens.weight) == (tie == "all")


def test_tied_stacks_are_stored_once(tmp_path):
    config = pair_config(stack(), layout="merged", tie_word_embeddings="all", tie_stacks=True)
    model = build(config)
    twofold.save(model, tmp_path / "m")
    assert not [name for name in load_file(tmp_path / "m" / "model.safetensors") if "decoder" in name]
    loaded = twofold.load(tmp_path / "m")
    ids = random_ids(2, 7)
    assert torch.equal(loaded(ids, None, ids).logits, model(ids, None, ids).logits)
    assert loaded.decoder.layers[1].mlp is loaded.encoder.layers[1].mlp
    resize_vocabulary(loaded, 50)
    assert loaded(ids, None, ids).logits.shape[-1] == 50


def test_an_encoder_that_is_being_opened_is_saved_as_it_is(tmp_path):
    model = build(pair_config(stack()))
    model.set_encoder_mask(["causal", "sink", "sink"], future_share=0.25)
    twofold.save(model, tmp_path / "m")
    loaded = twofold.load(tmp_path / "m")
    ids = random_ids(2, 7)
    assert torch.equal(loaded(ids, None, ids).logits, model(ids, None, ids).logits)
    with pytest.raises(ValueError, match=r"encoder_future_share is 0\.25"):
        twofold.save(model, tmp_path / "t5", format="t5gemma")


def test_sharded_folder_loads(tmp_path):
    model = build(pair_config(stack()))
    twofold.save(model, tmp_path / "m", max_shard_bytes=20_000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 3
    loaded = twofold.load(tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.decoder.norm.weight, model.decoder.norm.weight.bfloat16())


@pytest.mark.parametrize(
    ("config", "format", "theirs"),
    [
        (t5gemma_like(), "t5gemma", "T5GemmaForConditionalGeneration"),
        (t5gemma_like(tie_word_embeddings="none"), "t5gemma", "T5GemmaForConditionalGeneration"),
        (t5gemma2_like(), "t5gemma2", "T5Gemma2ForConditionalGeneration"),
    ],
    ids=["t5gemma", "t5gemma-untied", "t5gemma2"],
)
@torch.no_grad()
def test_transformers_loads_our_file_unchanged(config, format, theirs, tmp_path):
    """A file of ours, through `from_pretrained`: equal logits and greedy output. Sources stay within the window,
    where transformers 5.4 and later agree with the published rule."""
    model = build(config)
    twofold.save(model, tmp_path / "m", format=format)
    loaded, info = getattr(transformers, theirs).from_pretrained(
        tmp_path / "m", attn_implementation="eager", output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert all("vision" in key or "multi_modal" in key for key in info["missing_keys"])
    loaded.eval()
    ids, target = random_ids(2, 3), random_ids(2, 9, seed=1)
    assert_same(
        model(ids, None, target).logits,
        loaded(input_ids=ids, decoder_input_ids=target, use_cache=False).logits,
    )
    again = twofold.load(tmp_path / "m")
    assert again.config == model.config
    assert torch.equal(again(ids, None, target).logits, model(ids, None, target).logits)
    if format == "t5gemma":
        auto = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
        generated = auto.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
        from twofold.infer import generate

        ours = generate(model, ids.tolist(), [[2], [2]], max_new_tokens=5)
        for row, theirs_row in zip(ours, generated.tolist(), strict=True):
            assert list(row.token_ids) == theirs_row[1 : 1 + len(row.token_ids)]


@torch.no_grad()
def test_their_files_load_here(tmp_path):
    blocks = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4,
    }  # fmt: skip
    config = transformers.T5GemmaConfig(
        encoder=blocks, decoder=blocks, vocab_size=VOCAB, attn_implementation="eager"
    )
    theirs = transformers.T5GemmaForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path / "t5gemma")
    ours = twofold.load(tmp_path / "t5gemma")
    ids = random_ids(2, 4)
    assert_same(ours(ids, None, ids).logits, theirs(input_ids=ids, decoder_input_ids=ids).logits)

    config2 = transformers.T5Gemma2Config(
        encoder={"text_config": blocks, "vision_config": VISION, "eoi_token_index": 9},
        decoder=blocks,
        attn_implementation="eager",
    )
    theirs2 = transformers.T5Gemma2ForConditionalGeneration(config2).eval()
    theirs2.save_pretrained(tmp_path / "t5gemma2")
    with pytest.raises(ValueError, match=r"vision tensors.*vision_tower.*skip_vision=True"):
        twofold.load(tmp_path / "t5gemma2")
    ours2 = twofold.load(tmp_path / "t5gemma2", skip_vision=True)
    assert_same(ours2(ids, None, ids).logits, theirs2(input_ids=ids, decoder_input_ids=ids).logits)


def test_a_model_of_another_design_is_not_written_in_a_released_format(tmp_path):
    model = build(pair_config(stack(), layout="merged"))
    for format in ("t5gemma", "t5gemma2"):
        with pytest.raises(ValueError, match=r"cannot write its config: .*(layout|norm_adds_one)"):
            twofold.save(model, tmp_path / "m", format=format)
    with pytest.raises(ValueError, match="format must be one of twofold, t5gemma, t5gemma2, got 'onnx'"):
        twofold.save(model, tmp_path / "m", format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_output_is_never_overwritten_unasked(tmp_path):
    model = build(pair_config(stack()))
    twofold.save(model, tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(FileExistsError):
        twofold.save(model, tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").stat().st_mtime_ns == before
    twofold.save(model, tmp_path / "m", overwrite=True)


class TestBadFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        twofold.save(build(pair_config(stack())), tmp_path / "m")
        return tmp_path / "m"

    def test_unknown_missing_and_misshapen_tensors_are_listed(self, folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["extra"] = torch.zeros(1)
        del tensors["model.encoder.norm.weight"]
        tensors["model.decoder.norm.weight"] = torch.zeros(7)
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ValueError, match="does not fit its config") as error:
            twofold.load(folder)
        message = str(error.value)
        assert "unknown tensor extra" in message
        assert "no tensor for model.encoder.norm.weight" in message
        assert "model.decoder.norm.weight has shape [7], config.json asks for [32]" in message

    def test_unknown_config_key(self, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"twist": 1}))
        with pytest.raises(ValueError, match="twist"):
            twofold.load(folder)

    def test_truncated_weights(self, folder):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            twofold.load(folder)

    def test_a_pickle_is_never_unpickled(self, folder, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (open, (str(tmp_path / "exploded"), "w"))

        (folder / "model.safetensors").unlink()
        torch.save(Bomb(), folder / "pytorch_model.bin")
        with pytest.raises(FileNotFoundError, match="pickle"):
            twofold.load(folder)
        assert not (tmp_path / "exploded").exists()

    def test_other_models(self, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
        with pytest.raises(ValueError, match="decoder-only model"):
            twofold.load(folder)
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "bart"}))
        with pytest.raises(ValueError, match="'bart'; twofold loads twofold, t5gemma, t5gemma2"):
            twofold.load(folder)


def test_random_initialisation_is_seeded_and_neutral():
    config = pair_config(gemma_stack(), tie_word_embeddings="none")
    a, b, c = (EncoderDecoder(config) for _ in range(3))
    for model, seed in ((a, 1), (b, 1), (c, 2)):
        model.initialise_randomly(seed)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.out_proj.weight, c.lm_head.out_proj.weight)
    assert a.encoder.norm.weight.abs().max() == 0
    assert a.decoder.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
