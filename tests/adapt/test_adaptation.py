"""Adaptation end to end: a donor folder in, an encoder-decoder out, in memory and on disk."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import twofold
from tests.models.hf import DONOR_CONFIGS, gemma2_config, llama_config, qwen3_config
from tests.models.tiny import VOCAB, assert_same, differ, random_ids
from twofold.adapt import Choices, adapt_to_folder
from twofold.models.families import donor_family

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no tokenizer files.*", "ignore:neither.*has tokenizer files"
)

NO_BOS = {"decoder_start": "last_source_token"}


@pytest.mark.parametrize("name", DONOR_CONFIGS)
@torch.no_grad()
def test_lossless_start_equals_its_donor(name, save_donor):
    folder, theirs = save_donor(DONOR_CONFIGS[name])
    model = twofold.adapt(folder, start="lossless")
    ids = random_ids(2, 20)
    expected = theirs(ids, use_cache=False).logits
    for cut in (1, 7, 19):
        assert_same(model(ids[:, :cut], None, ids[:, cut:]).logits, expected[:, cut:])


@torch.no_grad()
def test_an_opened_encoder_no_longer_equals_the_donor(save_donor):
    folder, theirs = save_donor(llama_config())
    ids = random_ids(2, 12)
    expected = theirs(ids, use_cache=False).logits[:, 6:]
    for mask in ("sink", "bidirectional"):
        model = twofold.adapt(folder, start="lossless", encoder_mask=mask)
        assert set(model.config.encoder_mask) == {mask}
        assert differ(model(ids[:, :6], None, ids[:, 6:]).logits, expected)


@torch.no_grad()
def test_published_start_reads_and_writes_as_its_donor(save_donor):
    """The two checks of the reference that need no training: a causal encoder gives the donor's hidden states; and
    with cross-attention silenced (post-norm weight -1) the decoder alone gives the donor's logits."""
    folder, theirs = save_donor(gemma2_config())
    model = twofold.adapt(folder, start="published", encoder_mask="causal")
    ids = random_ids(2, 12)
    expected = theirs(ids, use_cache=False, output_hidden_states=True)
    assert_same(model.encode(ids).last_hidden_state, expected.hidden_states[-1])
    for layer in model.decoder.layers:
        layer.post_cross_attn_layernorm.weight.fill_(-1.0)
    assert_same(model(ids[:, :3], None, ids).logits, expected.logits)


def test_published_start_copies_cross_attention_from_the_same_layer(save_donor):
    folder, theirs = save_donor(gemma2_config())
    model = twofold.adapt(folder, start="published")
    weights = theirs.state_dict()
    for i, layer in enumerate(model.decoder.layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            copied = getattr(layer.cross_attn, name).weight
            assert torch.equal(copied, weights[f"model.layers.{i}.self_attn.{name}.weight"])
        norm = weights[f"model.layers.{i}.post_attention_layernorm.weight"]
        assert torch.equal(layer.post_cross_attn_layernorm.weight, norm)
    assert model.config.tie_word_embeddings == "decoder"
    assert model.encoder.embed_tokens.weight is not model.decoder.embed_tokens.weight


def test_copies_do_not_share_memory(save_donor):
    """Encoder and decoder come from the same file; training one side must not move the other."""
    folder, _ = save_donor(gemma2_config())
    model = twofold.adapt(folder, encoder_mask="causal")
    storages = [p.data_ptr() for p in model.parameters()]
    assert len(set(storages)) == len(storages)


@torch.no_grad()
@pytest.mark.parametrize("config", [gemma2_config(), llama_config()], ids=["post-norms", "pre-norms"])
def test_scaled_copy_scales_what_cross_attention_adds(config, save_donor):
    folder, _ = save_donor(config)
    copied, scaled = (twofold.adapt(folder, start=s, **NO_BOS) for s in ("published", "scaled_copy"))
    ids = random_ids(2, 6)
    added = []
    for model in (copied, scaled):
        layer = model.decoder.layers[0]
        outputs = []
        handle = layer.post_cross_attn_layernorm.register_forward_hook(
            lambda _m, _i, out, outputs=outputs: outputs.append(out)
        )
        model(ids, None, ids)
        handle.remove()
        added.append(outputs[0])
    assert_same(added[1], 0.1 * added[0])


def test_random_start_draws_projections_and_copies_norms(save_donor):
    folder, theirs = save_donor(gemma2_config(initializer_range=0.05))
    model, again, other = (twofold.adapt(folder, start="random", seed=s) for s in (1, 1, 2))
    cross = model.decoder.layers[1].cross_attn
    weight = torch.cat([getattr(cross, f"{n}_proj").weight.flatten() for n in "qkvo"])
    assert weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert torch.equal(cross.q_proj.weight, again.decoder.layers[1].cross_attn.q_proj.weight)
    assert differ(cross.q_proj.weight, other.decoder.layers[1].cross_attn.q_proj.weight)
    norm = theirs.state_dict()["model.layers.1.input_layernorm.weight"]
    assert torch.equal(model.decoder.layers[1].pre_cross_attn_layernorm.weight, norm)


def test_unbalanced_pair_of_unequal_widths(save_donor):
    big, _ = save_donor(gemma2_config(hidden_size=48, num_attention_heads=6, num_hidden_layers=5), "big")
    small, _ = save_donor(gemma2_config(), "small", seed=1)
    model = twofold.adapt(big, small, start="published")
    assert (model.config.encoder.hidden_size, model.config.decoder.hidden_size) == (48, 32)
    assert model.decoder.layers[0].cross_attn.k_proj.weight.shape == (16, 48)
    assert model.adaptation["cross_attention"].startswith("random")
    assert model.adaptation["tensors"]["model.decoder.layers.0.cross_attn.q_proj.weight"]["rule"] == "normal"
    ids = random_ids(2, 6)
    assert torch.isfinite(model(ids, None, ids).logits).all()
    for start in ("scaled_copy", "lossless"):
        with pytest.raises(ValueError, match="encoder width 48 != decoder width 32"):
            twofold.adapt(big, small, start=start)


def test_layer_subsets_keep_the_chosen_layers_and_align_them(save_donor):
    folder, theirs = save_donor(llama_config())
    model = twofold.adapt(folder, start="lossless", decoder_layers=[0, 3], encoder_layers=[0, 1, 3])
    weights = theirs.state_dict()
    for layer, donor_layer in zip(model.decoder.layers, (0, 3), strict=True):
        assert torch.equal(
            layer.mlp.up_proj.weight, weights[f"model.layers.{donor_layer}.mlp.up_proj.weight"]
        )
    for layer, donor_layer in zip(model.encoder.layers, (0, 1, 3), strict=True):
        assert torch.equal(
            layer.mlp.up_proj.weight, weights[f"model.layers.{donor_layer}.mlp.up_proj.weight"]
        )
    assert model.config.aligned_layers == (0, 2)  # donor layers 0 and 3, by their place in the encoder
    unused = model.adaptation["unused_donor_tensors"]["encoder"]
    assert any("layers.2." in name for name in unused)
    assert not any("layers.1." in name or "layers.3." in name for name in unused)


def test_aligned_reads_with_a_separate_sub_layer(save_donor):
    folder, _ = save_donor(llama_config())
    model = twofold.adapt(
        folder, start="scaled_copy", reads="aligned", cross_rope=True, decoder_positions="continue"
    )
    assert model.config.aligned_layers == (0, 1, 2, 3)
    ids = random_ids(2, 6)
    assert torch.isfinite(model(ids, None, ids).logits).all()


def test_tables_of_different_padded_size_are_fitted(save_donor):
    """Qwen 2.5 0.5B and 7B share a tokenizer, with tables of 151,936 and 152,064 rows."""
    big, big_model = save_donor(qwen3_config(vocab_size=VOCAB + 8), "big")
    small, _ = save_donor(qwen3_config(), "small")
    for name in (big, small):
        _save_tokenizer(name)
    model = twofold.adapt(big, small, start="published")
    assert model.config.encoder.vocab_size == model.config.decoder.vocab_size == VOCAB
    expected = big_model.state_dict()["model.embed_tokens.weight"][:VOCAB]
    assert torch.equal(model.encoder.embed_tokens.weight, expected)
    grown = twofold.adapt(small, big, start="published")
    assert grown.encoder.embed_tokens.weight[VOCAB:].abs().max() == 0


def _save_tokenizer(folder: Path, words: str = "abc") -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = models.BPE({letter: i for i, letter in enumerate(words)}, [])
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)).save_pretrained(folder)


def test_different_tokenizers_are_refused(save_donor, tmp_path):
    a, _ = save_donor(llama_config(), "a")
    b, _ = save_donor(llama_config(), "b")
    _save_tokenizer(a, "abc")
    _save_tokenizer(b, "abd")
    with pytest.raises(ValueError, match="different tokenizers"):
        adapt_to_folder(a, b, tmp_path / "out", Choices())
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_folder_holds_the_same_model_as_memory(save_donor, tmp_path):
    folder, _ = save_donor(gemma2_config())
    _save_tokenizer(folder)
    report = adapt_to_folder(folder, None, tmp_path / "out", Choices(start="lossless", encoder_mask="sink"))
    from_disk = twofold.load(tmp_path / "out")
    in_memory = twofold.adapt(folder, start="lossless", encoder_mask="sink")
    assert from_disk.config == in_memory.config
    for (name, a), (_, b) in zip(from_disk.named_parameters(), in_memory.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert from_disk.tokenizer("abc")["input_ids"] == [0, 1, 2]
    written = json.loads((tmp_path / "out" / "adaptation.json").read_text())
    assert written == report
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written["tensors"]) == set(stored) == {name for name, _ in from_disk.named_parameters()}
    entry = written["tensors"]["model.decoder.layers.2.mlp.up_proj.weight"]
    assert entry == {
        "rule": "copy",
        "shape": [48, 32],
        "donor": "decoder",
        "source": "model.layers.2.mlp.up_proj.weight",
    }


def test_dtype_is_the_donors_unless_chosen(save_donor, tmp_path):
    folder, theirs = save_donor(gemma2_config())
    theirs.to(torch.bfloat16).save_pretrained(folder)
    assert {p.dtype for p in twofold.adapt(folder, encoder_mask="causal").parameters()} == {torch.bfloat16}
    chosen = twofold.adapt(folder, encoder_mask="causal", dtype=torch.float32)
    assert {p.dtype for p in chosen.parameters()} == {torch.float32}


def test_gemma3_pair_in_the_published_layout_gets_its_own_eoi_embedding(save_donor, monkeypatch):
    """T5Gemma 2 keeps the end-of-image embedding apart and does not scale it: the copy is scaled once."""
    from twofold.adapt import plan

    monkeypatch.setattr(plan, "EOI_TOKEN_ID", 7)
    folder, theirs = save_donor(DONOR_CONFIGS["gemma3"])
    model = twofold.adapt(folder, start="published", layout="merged")
    assert model.config.eoi_token_id == 7
    table = theirs.state_dict()["model.embed_tokens.weight"]
    assert_same(model.encoder.embed_tokens.eoi_embedding.detach(), table[7] * 32**0.5)
    ids = torch.tensor([[7, 8]])
    expected = torch.nn.functional.embedding(ids, table) * 32**0.5
    assert_same(model.encoder.embed_tokens(ids).detach(), expected)


@pytest.mark.parametrize(
    ("donor", "choices", "expected"),
    [
        ("gemma3", {"start": "published", "layout": "merged"}, True),  # T5Gemma 2 reads BOS
        ("gemma3", {"start": "published"}, False),
        ("gemma2", {"start": "published"}, False),  # T5Gemma does not
        ("gemma2", {"start": "lossless"}, True),  # the donor does
    ],
)
def test_the_source_begins_as_the_published_family_does(save_donor, donor, choices, expected):
    from twofold.adapt.plan import plan_config

    folder, _ = save_donor(DONOR_CONFIGS[donor])
    content = json.loads((folder / "config.json").read_text())
    config = donor_family(content).read_config(content)
    assert plan_config(config, None, Choices(**choices), adds_bos=True).source_bos is expected
    assert not plan_config(config, None, Choices(**choices), adds_bos=False).source_bos


class TestBadInput:
    """Each with a clear error, and nothing written."""

    def refuse(self, tmp_path, error, match, *donors, **choices):
        out = tmp_path / "out"
        encoder, decoder = (*donors, None)[:2]
        with pytest.raises(error, match=match):
            adapt_to_folder(encoder, decoder, out, Choices(**choices))
        assert not out.exists()
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], (
            "a partial folder was left behind"
        )

    def test_missing_donor(self, tmp_path):
        self.refuse(tmp_path, FileNotFoundError, "no such file or folder", tmp_path / "nowhere")

    def test_truncated_file(self, tmp_path, save_donor):
        folder, _ = save_donor(llama_config())
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        self.refuse(tmp_path, ValueError, "model.safetensors", folder)

    def test_wrong_shape(self, tmp_path, save_donor):
        folder, _ = save_donor(llama_config())
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(4, 4)
        save_file(tensors, folder / "model.safetensors")
        self.refuse(tmp_path, ValueError, r"up_proj.*has shape \[4, 4\].*asks for \[48, 32\]", folder)

    def test_unmapped_and_missing_tensors(self, tmp_path, save_donor):
        folder, _ = save_donor(llama_config())
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.extra.weight"] = torch.zeros(1)
        save_file(tensors, folder / "model.safetensors")
        self.refuse(tmp_path, ValueError, "model.layers.0.extra.weight", folder)
        del tensors["model.layers.0.extra.weight"], tensors["model.norm.weight"]
        save_file(tensors, folder / "model.safetensors")
        self.refuse(tmp_path, ValueError, "no tensor for 'norm.weight'", folder)

    def test_layer_subset_out_of_range(self, tmp_path, save_donor):
        folder, _ = save_donor(llama_config())
        self.refuse(tmp_path, ValueError, "from 0 to 3; out of range: .4.", folder, decoder_layers=[0, 4])
        self.refuse(tmp_path, ValueError, "it is empty", folder, encoder_layers=[])

    def test_unknown_config_key(self, tmp_path, save_donor):
        folder, _ = save_donor(llama_config())
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"attention_twist": 3}))
        self.refuse(tmp_path, ValueError, "attention_twist=3", folder)

    def test_pickle_is_never_read(self, tmp_path, save_donor):
        folder, theirs = save_donor(llama_config())
        (folder / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
        self.refuse(tmp_path, FileNotFoundError, "pickle", folder)

    def test_encoder_decoder_is_no_donor(self, tmp_path, save_donor):
        folder, _ = save_donor(llama_config())
        adapt_to_folder(folder, None, tmp_path / "pair", Choices(start="lossless"))
        self.refuse(tmp_path, ValueError, "encoder-decoder already", tmp_path / "pair")

    def test_no_bos_for_a_decoder_that_starts_with_one(self, tmp_path, save_donor):
        folder, _ = save_donor(llama_config(bos_token_id=None))
        self.refuse(tmp_path, ValueError, "decoder_start='bos' needs bos_token_id", folder, start="published")

    def test_choices(self):
        with pytest.raises(ValueError, match="start must be one of"):
            Choices(start="magic")
        with pytest.raises(ValueError, match="encoder_mask must be of"):
            Choices(encoder_mask="open")
        with pytest.raises(ValueError, match="does not have"):
            Choices(start="scaled_copy", layout="merged")

    def test_mask_of_the_wrong_length(self, tmp_path, save_donor):
        folder, _ = save_donor(llama_config())
        self.refuse(tmp_path, ValueError, "2 entries for 4 encoder", folder, encoder_mask=["sink", "causal"])


def test_existing_folder_is_not_touched(save_donor, tmp_path):
    folder, _ = save_donor(llama_config())
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="exists"):
        adapt_to_folder(folder, None, out, Choices(start="lossless"))
    with pytest.raises(ValueError, match="not a checkpoint folder"):
        adapt_to_folder(folder, None, out, Choices(start="lossless"), overwrite=True)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_an_old_checkpoint_is_replaced_when_asked(save_donor, tmp_path):
    folder, _ = save_donor(llama_config())
    out = tmp_path / "out"
    adapt_to_folder(folder, None, out, Choices(start="lossless"))
    (out / "old.txt").write_text("goes")
    adapt_to_folder(folder, None, out, Choices(start="lossless", encoder_mask="sink"), overwrite=True)
    assert not (out / "old.txt").exists()
    assert set(twofold.load(out).config.encoder_mask) == {"sink"}


_PEAK = """
import resource, sys
from twofold.adapt import Choices, adapt_to_folder
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
adapt_to_folder(sys.argv[1], None, sys.argv[2], Choices(start="lossless"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.filterwarnings("ignore")
def test_streaming_needs_little_more_than_one_tensor(tmp_path):
    """A pair of 230 MB is written from a donor of 120 MB; the largest tensor has 8 MB."""
    config = llama_config(
        vocab_size=2048, hidden_size=1024, intermediate_size=2048, num_hidden_layers=3,
        num_attention_heads=16, num_key_value_heads=16, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "donor")
    rng = np.random.default_rng(0)
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        names = {n: p.shape for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    save_file(
        {n: torch.from_numpy(rng.standard_normal(tuple(s), dtype=np.float32)) for n, s in names.items()},
        tmp_path / "donor" / "model.safetensors",
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PEAK, tmp_path / "donor", tmp_path / "out"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    peak_kb = int(result.stdout)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 200e6
    assert peak_kb < 60_000, f"peak memory rose by {peak_kb / 1e3:.0f} MB"
