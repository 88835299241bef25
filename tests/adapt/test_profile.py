import dataclasses
import json
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import twofold
from tests.models.hf import donor, llama_config
from twofold.adapt import Choices, adapt_to_folder
from twofold.adapt.depth import DepthChoice
from twofold.adapt.profile import Opened, Profile, profile_encoder
from twofold.adapt.sample import default_texts

TEXTS = {
    "letters": [
        "the quick brown fox jumps over the lazy dog",
        "a stitch in time saves nine, they say",
        "short",
    ],
    "numbers": ["1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89", "2 4 8 16 32 64 128 256 512 1024 2048"],
}
profiled = partial(profile_encoder, texts=TEXTS, source_length=10, target_length=8)


@pytest.fixture
def pair(text_model):
    return text_model(encoder_mask=("causal",) * 3)


def naive_loss(model, text, masks):
    """One text, by hand: 10 tokens read (the last of them by the decoder), 8 written."""
    ids = torch.tensor([model.tokenizer(text, add_special_tokens=False)["input_ids"][:18]])
    model.set_encoder_mask(masks)
    logits = model(ids[:, :9], None, ids[:, 9:17]).logits[0]
    return F.cross_entropy(logits, ids[0, 10:]).item()


@torch.no_grad()
def test_costs_are_those_of_a_naive_loop(pair):
    found = profiled(pair, mask="sink")
    assert pair.config.encoder_mask == ("causal",) * 3  # as it was
    assert found.examples == {"letters": 2, "numbers": 2}
    closed = {name: [naive_loss(pair, t, "causal") for t in texts[:2]] for name, texts in TEXTS.items()}
    for name in TEXTS:
        assert found.loss[name] == pytest.approx(sum(closed[name]) / 2, rel=1e-5)
    for layer in range(3):
        masks = ["sink" if i == layer else "causal" for i in range(3)]
        for name, texts in TEXTS.items():
            above = [naive_loss(pair, t, masks) - base for t, base in zip(texts, closed[name], strict=False)]
            assert found.alone[layer].cost[name] == pytest.approx(sum(above) / 2, abs=2e-5)
            # The standard error of two values is half their distance.
            assert found.alone[layer].noise[name] == pytest.approx(abs(above[0] - above[1]) / 2, abs=2e-5)
    assert found.alone[2].cost == {"letters": 0.0, "numbers": 0.0}  # nothing reads what the last layer makes
    assert sorted(found.order, key=lambda i: found.alone[i].worst) == list(found.order)
    assert found.order[0] in (2, *(i for i in range(3) if found.alone[i].worst <= 0))


@pytest.mark.parametrize("budget", [-9.0, 0.0, 0.02, 9.0])
def test_what_is_opened_was_measured_and_is_within_the_budget(pair, budget):
    found = profiled(pair, budget=budget)
    if budget == 9.0:
        assert found.encoder_mask == ("sink",) * 3
    if budget == -9.0:
        assert found.encoder_mask == ("causal",) * 3
    opened = {layer for layer, mask in enumerate(found.encoder_mask) if mask == "sink"}
    assert opened == set(found.order[: found.num_opened])
    if found.num_opened:
        (measured,) = [one for one in found.together if len(one.layers) == found.num_opened]
        assert set(measured.layers) == opened
        assert measured.worst <= budget
    too_many = [one for one in found.together if len(one.layers) == found.num_opened + 1]
    assert all(one.worst > budget for one in too_many)
    assert found.num_opened == 3 or too_many


def test_pairs_that_are_not_their_donor_are_refused(text_model):
    with pytest.raises(ValueError, match=r"start='lossless'.*got 'separate' and 'aligned'"):
        profiled(text_model(layout="separate"))
    with pytest.raises(ValueError, match="'sink' or 'bidirectional', got 'causal'"):
        profiled(text_model(), mask="causal")
    with pytest.raises(ValueError, match="domain 'tiny' has 0 documents of 18 tokens"):
        profiled(text_model(), texts={"tiny": ["no", "no"]})
    model = text_model()
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        profiled(model)


def test_the_default_texts_are_long_and_many():
    (texts,) = default_texts().values()
    assert len(texts) > 20
    assert min(map(len, texts)) > 1500


def stub(model, opened=(1, 2)):
    """A profile that opens given layers, for what is done with one."""
    n_layers = model.config.encoder.num_hidden_layers
    assert set(model.config.encoder_mask) == {"causal"}
    alone = tuple(Opened((i,), {"x": 0.0 if i in opened else 1.0}, {"x": 0.0}) for i in range(n_layers))
    order = (*opened, *(i for i in range(n_layers) if i not in opened))
    return Profile("sink", 0.1, {"x": 1.0}, {"x": 2}, 8, 8, alone, order, (alone[0],), len(opened))


@pytest.fixture
def folder(tmp_path, byte_tokenizer):
    config = llama_config(vocab_size=258, max_position_embeddings=256)
    donor(config).save_pretrained(tmp_path / "donor")
    byte_tokenizer.save_pretrained(tmp_path / "donor")
    return tmp_path / "donor"


def test_auto_opens_what_the_profile_says_in_memory_and_on_disk(folder, tmp_path):
    model = twofold.adapt(folder, start="lossless", encoder_mask="auto", profile=stub)
    assert model.config.encoder_mask == ("causal", "sink", "sink", "causal")
    assert model.adaptation["profile"]["order"] == (1, 2, 0, 3)
    report = adapt_to_folder(
        folder, None, tmp_path / "out", Choices(start="lossless", encoder_mask="auto"), profile=stub
    )
    assert report["profile"]["num_opened"] == 2
    loaded = twofold.load(tmp_path / "out")
    assert loaded.config.encoder_mask == model.config.encoder_mask
    written = json.loads((tmp_path / "out" / "adaptation.json").read_text())
    assert written["profile"]["encoder_mask"] == ["causal", "sink", "sink", "causal"]


def test_depth_is_measured_after_the_encoder_is_open(folder, tmp_path):
    seen = []

    def choose(model, keep):
        seen.append(model.config.encoder_mask)
        return DepthChoice((0, 3)[:keep], {"x": 1.0}, ())

    asked = {"start": "lossless", "encoder_mask": "auto", "decoder_depth": 2}
    model = twofold.adapt(folder, **asked, profile=stub, choose=choose)
    assert seen == [("causal", "sink", "sink", "causal")]
    assert model.config.aligned_layers == (0, 3)
    assert model.adaptation["depth"]["layers"] == (0, 3)
    rule = model.adaptation["tensors"]["model.decoder.layers.1.mlp.up_proj.weight"]
    assert rule["source"] == "model.layers.3.mlp.up_proj.weight"
    report = adapt_to_folder(folder, None, tmp_path / "out", Choices(**asked), profile=stub, choose=choose)
    assert report["num_parameters"] == sum(p.numel() for p in model.parameters())
    loaded = twofold.load(tmp_path / "out")
    ids = torch.randint(3, 250, (2, 6), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(ids, None, ids).logits, model(ids, None, ids).logits)


def test_auto_profiles_for_real(folder):
    model = twofold.adapt(
        folder, start="lossless", encoder_mask="auto", profile=partial(profiled, budget=9.0)
    )
    assert set(model.config.encoder_mask) == {"sink"}
    assert set(model.adaptation["profile"]) == {f.name for f in dataclasses.fields(Profile)} | {
        "encoder_mask"
    }


def test_auto_is_for_pairs_that_start_as_their_donor():
    for asked in ({"encoder_mask": "auto"}, {"decoder_depth": 2}):
        for changes in ({"start": "published"}, {"layout": "separate"}, {"reads": "final"}):
            with pytest.raises(ValueError, match="measure what a change costs next to the donor"):
                Choices(**({"start": "lossless"} | asked | changes))


def test_tied_stacks_have_the_donors_parameters_and_its_logits(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder)
    model = twofold.adapt(folder, start="lossless", tie_stacks=True)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
    ids = torch.randint(3, 250, (2, 14), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = theirs(ids).logits[:, 6:], model(ids[:, :6], None, ids[:, 6:]).logits
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    report = adapt_to_folder(folder, None, tmp_path / "out", Choices(start="lossless", tie_stacks=True))
    assert report["num_parameters"] == sum(p.numel() for p in theirs.parameters())
    assert twofold.load(tmp_path / "out").config.tie_stacks
