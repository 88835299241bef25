"""Closed-form stitching, against least squares over all tokens at once and against donors that it must reproduce."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import twofold
from tests.models.hf import gemma3_config, llama_config, qwen2_config
from tests.models.tiny import assert_same, differ, random_ids
from twofold.adapt import Choices, adapt_to_folder
from twofold.adapt import stitch as module
from twofold.adapt.sample import token_rows
from twofold.adapt.stitch import Moments, ridge_maps, stitch

LETTERS = "the quick brown fox jumps over the lazy dog and runs away from it"
TEXTS = {
    "letters": [f"{LETTERS[i:]} {LETTERS[:i]}" for i in range(0, 60, 3)],
    "numbers": [" ".join(str((n * n + i) % 97) for n in range(60)) for i in range(20)],
}
SIZES = {"vocab_size": 258, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 257}
WIDE = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 5}


def fit(model, **settings):
    return stitch(model, TEXTS, **{"tokens": 8000, "length": 40} | settings)


@pytest.fixture
def make(save_donor, byte_tokenizer):
    """A donor folder with a tokenizer."""

    def save(config, name="donor", seed=0):
        folder, theirs = save_donor(config, name, seed)
        byte_tokenizer.save_pretrained(folder)
        return folder, theirs

    return save


def test_streamed_moments_give_the_ridge_regression_of_all_tokens():
    """500 tokens with large means, in uneven batches; the reference is least squares with rows for the penalty."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 30.0
    y = x @ torch.randn(6, 4, generator=generator) + torch.randn(500, 4, generator=generator) - 7.0
    moments = Moments(6, 4)
    for start, stop in ((0, 1), (1, 200), (200, 500)):
        moments.add(x[start:stop], y[start:stop])
    centred = x.double() - x.double().mean(0)
    mean_variance = centred.square().mean()
    strengths = (0.0, 0.3)
    for strength, (found, intercept) in zip(strengths, ridge_maps(moments, strengths), strict=True):
        penalty = torch.eye(6, dtype=torch.float64) * (500 * strength * mean_variance).sqrt()
        rows = torch.cat([centred, penalty])
        targets = torch.cat([y.double() - y.double().mean(0), torch.zeros(6, 4, dtype=torch.float64)])
        wanted = torch.linalg.lstsq(rows, targets).solution.T
        assert_same(found, wanted, 1e-9)
        residual = y.double() - x.double() @ wanted.T - intercept
        assert residual.mean(0).abs().max() < 1e-9
        assert_same(moments.residual(found, intercept), residual.T @ residual / 500, 1e-9)
        weight = torch.tensor([[1.0, -2.0, 0.5, 0.0]], dtype=torch.float64)
        left, whole = residual @ weight.T, y.double() @ weight.T
        explained = 1 - left.square().mean() / (whole - whole.mean()).square().mean()
        found_share = moments.explained(moments.residual(found, intercept), weight)
        assert found_share == pytest.approx(explained.item(), abs=1e-9)
        assert moments.explained(moments.residual(found, intercept), 0 * weight) == 1.0


def test_each_side_is_read_as_it_reads(make):
    """All text in one batch against batches of four rows, and against least squares of keys on the encoder's reads,
    padding and held-out rows left out."""
    big, _ = make(llama_config(**SIZES | WIDE), "big")
    small, _ = make(llama_config(**SIZES, attention_bias=True), "small", seed=1)
    model = twofold.adapt(big, small, start="stitched", encoder_mask="sink", stitcher=fit)
    config = model.config
    assert config.aligned_layers == (0, 1, 2, 4)
    reads, keys = [], []
    donor = twofold.adapt(small, start="lossless", encoder_mask="causal", tie_stacks=True)
    documents = [text for pair in zip(TEXTS["letters"], TEXTS["numbers"], strict=True) for text in pair]
    for i, text in enumerate(documents):
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), 40):
            if i % 10:
                row = torch.tensor([ids[start : start + 40]])
                with torch.no_grad():
                    reads.append(model.encode(row).memory[3][0])
                    keys.append(donor.encoder.layers[3].self_attn.k_proj(donor.encode(row).memory[3][0]))
    n_tokens = sum(map(len, reads))
    assert model.adaptation["stitch"]["tokens"] == n_tokens
    x = torch.cat(reads).double()
    y = torch.cat(keys).double()
    ridge = model.adaptation["stitch"]["layers"][3]["ridge"]
    centred = x - x.mean(0)
    penalty = torch.eye(48, dtype=torch.float64) * (n_tokens * ridge * centred.square().mean()).sqrt()
    wanted = torch.linalg.lstsq(
        torch.cat([centred, penalty]), torch.cat([y - y.mean(0), torch.zeros(48, y.shape[1]).double()])
    ).solution.T
    projection = model.decoder.layers[3].self_attn.source_k_proj
    assert_same(projection.weight.detach(), wanted.float(), 1e-4)
    assert_same(projection.bias.detach(), (y.mean(0) - wanted @ x.mean(0)).float(), 1e-4)


@torch.no_grad()
def test_all_layers_may_read_the_encoders_output(make):
    """Values of layer 2, against least squares on what the encoder hands over."""
    folder, _ = make(llama_config(**SIZES))
    model = twofold.adapt(folder, start="stitched", reads="final", stitcher=fit)
    report = model.adaptation["stitch"]
    assert (model.config.reads, model.config.aligned_layers) == ("final", None)
    assert {layer["encoder_layer"] for layer in report["layers"]} == {None}
    donor = twofold.adapt(folder, encoder_mask="causal", tie_stacks=True)
    rows, _ = token_rows(model, TEXTS, 8000, 40)
    read, values = [], []
    for row in rows:
        read.append(model.encode(row[None]).last_hidden_state[0])
        values.append(donor.encoder.layers[2].self_attn.v_proj(donor.encode(row[None]).memory[2][0]))
    x, y = torch.cat(read).double(), torch.cat(values).double()
    centred, ridge = x - x.mean(0), report["layers"][2]["ridge"]
    penalty = torch.eye(x.shape[1]).double() * (len(x) * ridge * centred.square().mean()).sqrt()
    targets = torch.cat([y - y.mean(0), torch.zeros(x.shape[1], y.shape[1]).double()])
    wanted = torch.linalg.lstsq(torch.cat([centred, penalty]), targets).solution.T
    assert_same(model.decoder.layers[2].self_attn.source_v_proj.weight, wanted.float(), 1e-4)


@pytest.mark.parametrize(
    "config",
    [llama_config(**SIZES), qwen2_config(**SIZES), gemma3_config(**SIZES)],
    ids=["llama", "qwen2-biases", "gemma3-norms-windows"],
)
@torch.no_grad()
def test_a_pair_of_one_donor_is_that_donor(config, make, monkeypatch):
    """The map between a stream and itself is the identity; with a ridge of 1e-12 logits are the donor's to 1e-3."""
    monkeypatch.setattr(module, "RIDGES", (1e-12,))
    folder, theirs = make(config)
    model = twofold.adapt(folder, start="stitched", stitcher=fit)
    for layer in model.adaptation["stitch"]["layers"]:
        assert min(layer[name] for name in ("reads", "keys", "values")) > 1 - 1e-6
    ids = random_ids(2, 20)
    expected = theirs(ids, use_cache=False).logits
    assert_same(model(ids[:, :9], None, ids[:, 9:]).logits, expected[:, 9:], 1e-3)
    model.decoder.layers[0].self_attn.source_v_proj.weight.zero_()
    assert differ(model(ids[:, :9], None, ids[:, 9:]).logits, expected[:, 9:])


@torch.no_grad()
def test_a_widened_donor_is_read_as_the_donor(make, monkeypatch):
    """The encoder's donor is the decoder's with a residual stream that was widened by a rotation (48 of 32): what its
    layers read is a linear function of what the donor's read, so the pair is the donor."""
    monkeypatch.setattr(module, "RIDGES", (1e-12,))
    small, theirs = make(llama_config(**SIZES), "small")
    generator = torch.Generator().manual_seed(3)
    axes = torch.linalg.qr(torch.randn(48, 32, generator=generator)).Q  # [48, 32], orthonormal columns
    wide = {}
    for name, x in theirs.state_dict().items():
        if "norm" in name:
            wide[name] = torch.full((48,), (32 / 48) ** 0.5)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            wide[name] = axes @ x
        elif name == "model.embed_tokens.weight":
            wide[name] = x @ axes.T
        else:
            norm = "model.norm.weight"
            if "layers" in name:
                kind = "input_layernorm" if "self_attn" in name else "post_attention_layernorm"
                norm = f"{name.rsplit('.', 3)[0]}.{kind}.weight"
            wide[name] = (x * theirs.state_dict()[norm]) @ axes.T
    eps = 1e-6 * 32 / 48
    big, _ = make(llama_config(**SIZES, hidden_size=48, rms_norm_eps=eps, num_attention_heads=4), "big")
    save_file(wide, big / "model.safetensors", {"format": "pt"})
    model = twofold.adapt(big, small, start="stitched", stitcher=fit)
    assert (model.config.encoder.hidden_size, model.config.decoder.hidden_size) == (48, 32)
    ids = random_ids(2, 20)
    expected = theirs(ids, use_cache=False).logits
    assert_same(model(ids[:, :9], None, ids[:, 9:]).logits, expected[:, 9:], 1e-3)


def test_folder_and_memory_agree_and_the_report_says_how(make, tmp_path):
    big, _ = make(llama_config(**SIZES | WIDE), "big")
    small, _ = make(llama_config(**SIZES, tie_word_embeddings=True), "small", seed=1)
    in_memory = twofold.adapt(big, small, stitcher=fit)  # the default where widths differ
    assert in_memory.adaptation["start"] == "stitched"
    report = adapt_to_folder(big, small, tmp_path / "pair", Choices(start="stitched"), stitcher=fit)
    loaded = twofold.load(tmp_path / "pair")
    assert loaded.config == in_memory.config
    config = loaded.config
    assert (config.layout, config.reads, config.source_projections) == ("merged", "aligned", "own")
    assert (config.cross_rope, config.decoder_positions) == (True, "continue")
    assert (config.decoder_start, set(config.encoder_mask)) == ("last_source_token", {"causal"})
    for (name, a), (_, b) in zip(loaded.named_parameters(), in_memory.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    for layer in loaded.decoder.layers:
        assert layer.self_attn.source_v_proj.weight.abs().max() > 0
    assert json.loads((tmp_path / "pair" / "adaptation.json").read_text()) == report
    assert set(report["tensors"]) == set(load_file(tmp_path / "pair" / "model.safetensors"))
    name = "model.decoder.layers.2.self_attn.source_k_proj"
    assert report["tensors"][f"{name}.weight"] == {
        "rule": "fitted",
        "shape": [16, 48],
        "donor": "decoder",
        "source": "model.layers.2.self_attn.k_proj.weight",
    }
    assert report["tensors"][f"{name}.bias"] == {"rule": "fitted", "shape": [16]}
    assert report["cross_attention"].endswith("fitted in closed form")
    found = report["stitch"]
    assert found["tokens"] > 5 * found["held_out_tokens"] > 0
    assert [layer["encoder_layer"] for layer in found["layers"]] == [0, 1, 2, 4]
    assert all(layer["values"] <= 1 for layer in found["layers"])


def test_tokens_are_those_asked_for_and_held_out_documents_are_others(make):
    folder, _ = make(llama_config(**SIZES))
    model = twofold.adapt(folder, start="stitched", stitcher=fit)
    for tokens, length in ((1000, 40), (1001, 7)):
        fitted, held_out = token_rows(model, TEXTS, tokens, length)
        rows = [row.tolist() for row in (*fitted, *held_out)]
        assert sum(map(len, rows)) == tokens
        assert max(map(len, rows)) == length
    fitted, held_out = token_rows(model, TEXTS, 10**6, 300)
    assert (len(fitted), len(held_out)) == (36, 4)
    assert not {tuple(row.tolist()) for row in fitted} & {tuple(row.tolist()) for row in held_out}
    model.config = model.config.model_copy(update={"source_bos": True})
    read = []
    hook = model.encoder.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    fit(model)
    hook.remove()
    read = [ids for ids in read if ids.shape[1]]  # the decoder's donor reads nothing beside its text
    assert {row[0].item() for ids in read for row in ids} == {256}
    assert max(ids.shape[1] for ids in read) == 40


class TestRefusals:
    def test_other_pairs(self, make):
        folder, _ = make(llama_config(**SIZES))
        with pytest.raises(ValueError, match="got layout='merged', source_projections='shared'"):
            stitch(twofold.adapt(folder, start="lossless", encoder_mask="causal"), TEXTS)

    def test_choices(self):
        with pytest.raises(ValueError, match="layout must be 'merged', got 'separate'"):
            Choices(start="stitched", layout="separate")
        for choice in ({"encoder_mask": "auto"}, {"decoder_depth": 2}):
            with pytest.raises(ValueError, match=r"must start as its donor.*got start='stitched'"):
                Choices(start="stitched", **choice)

    def test_tied_stacks(self, make):
        folder, _ = make(llama_config(**SIZES))
        with pytest.raises(ValueError, match=r"tie_stacks makes one stack of both.*source_projections='own'"):
            twofold.adapt(folder, start="stitched", tie_stacks=True)

    def test_too_little_text(self, make, tmp_path):
        folder, _ = make(llama_config(**SIZES))
        for texts, settings, match in (
            ({"one": [LETTERS]}, {}, "got 1, give at least 2"),
            ({"two": [LETTERS, LETTERS]}, {"tokens": 10}, "leave nothing to fit on"),
        ):

            def too_little(model, texts=texts, settings=settings):
                return stitch(model, texts, **settings)

            with pytest.raises(ValueError, match=match):
                adapt_to_folder(
                    folder, None, tmp_path / "pair", Choices(start="stitched"), stitcher=too_little
                )
            assert not (tmp_path / "pair").exists()

    @pytest.mark.filterwarnings("ignore:.*no tokenizer files.*")
    def test_no_tokenizer(self, save_donor):
        folder, _ = save_donor(llama_config())
        with pytest.raises(ValueError, match="no tokenizer, so it cannot be fitted on text"):
            twofold.adapt(folder, start="stitched")


def test_by_default_a_hundred_tokens_for_each_axis(make):
    folder, _ = make(llama_config(**SIZES))
    found = twofold.adapt(folder, start="stitched").adaptation["stitch"]  # texts that are on every machine
    assert found["tokens"] + found["held_out_tokens"] == 100 * 32


def test_mode_and_weights_are_left_as_they_were(make):
    folder, _ = make(llama_config(**SIZES))
    model = twofold.adapt(folder, start="stitched", stitcher=fit).train()
    before = [p.clone() for p in model.parameters()]
    seen = []
    found = fit(model, watch=lambda steps, total: (seen.append(n) or n for n in steps))
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert sum(seen) == found.tokens + found.held_out_tokens
