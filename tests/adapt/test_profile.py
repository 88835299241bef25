import dataclasses
import json
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import twofold
from tests.models.hf import donor, llama_config
from twofold.adapt import Choices, adapt_to_folder
from twofold.adapt import profile as profile_module
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


def naive_loss(model, text, masks, weight=1.0):
    """One text, by hand: 10 tokens read (the last of them by the decoder), 8 written."""
    ids = torch.tensor([model.tokenizer(text, add_special_tokens=False)["input_ids"][:18]])
    model.set_encoder_mask(masks, future_weight=weight)
    logits = model(ids[:, :9], None, ids[:, 9:17]).logits[0]
    return F.cross_entropy(logits, ids[0, 10:]).item()


@torch.no_grad()
def test_costs_are_those_of_a_naive_loop(pair):
    found = profiled(pair, mask="sink", each_layer=True)
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


@torch.no_grad()
def test_all_layers_are_measured_with_the_whole_weight_and_a_tenth(pair):
    pair.set_encoder_mask("sink", future_weight=0.5)
    found = profiled(pair, budget=9.0)
    assert (pair.config.encoder_mask, pair.config.encoder_future_weight) == (("sink",) * 3, 0.5)  # as it was
    assert found.alone == found.order == ()
    for opened, weight in ((found.whole, 1.0), (found.faint, 0.1)):
        assert (opened.layers, opened.future_weight) == ((0, 1, 2), weight)
        for name, texts in TEXTS.items():
            above = [naive_loss(pair, t, "sink", weight) - naive_loss(pair, t, "causal") for t in texts[:2]]
            assert opened.cost[name] == pytest.approx(sum(above) / 2, abs=2e-5)
    assert found.whole.cost != found.faint.cost


class Costs:
    """Stands in for the measurement: what each layer costs, and the share of it at a tenth of the weight."""

    def __init__(self, by_layer, faint):
        self.by_layer, self.faint, self.closed = by_layer, faint, {"x": torch.ones(2)}
        self.asked = []

    def opened(self, layers, future_weight=1.0):
        self.asked.append((tuple(layers), future_weight))
        cost = sum(self.by_layer[i] for i in layers) * (self.faint if future_weight < 1 else 1.0)
        return Opened(tuple(layers), future_weight, {"x": cost}, {"x": 0.0})


@pytest.mark.parametrize(
    ("by_layer", "faint", "layers", "weight"),
    [
        ([0.01, 0.01, 0.01], 2.0, (0, 1, 2), 1.0),  # whatever it costs with less weight
        ([0.01, 0.02, 0.01], 0.5, (0, 1, 2), 0.1),
        ([0.02, 0.09, 0.01], 0.5, (0, 2), 1.0),
        ([0.09, 0.02, 0.09], 0.5, (1,), 1.0),
        ([0.05, 0.04, 0.09], 0.5, (), 1.0),
    ],
)
@pytest.mark.parametrize("each_layer", [False, True])
def test_as_open_as_the_budget_allows(pair, monkeypatch, by_layer, faint, layers, weight, each_layer):
    costs = Costs(by_layer, faint)
    monkeypatch.setattr(profile_module, "_Meter", lambda *_: costs)
    found = profiled(pair, budget=0.03, each_layer=each_layer)
    assert (set(found.chosen.layers), found.chosen.future_weight) == (set(layers), weight)
    assert found.encoder_mask == tuple("sink" if i in layers else "causal" for i in range(3))
    assert len(costs.asked) == 2 or each_layer or len(layers) < 3
    if found.alone:
        assert list(found.order) == sorted(range(3), key=lambda i: by_layer[i])


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
    everything = tuple(range(model.config.encoder.num_hidden_layers))
    assert set(model.config.encoder_mask) == {"causal"}

    def cost(layers, weight=1.0):
        return Opened(layers, weight, {"x": 0.0}, {"x": 0.0})

    chosen, faint = cost(opened, 0.5), cost(everything, 0.1)
    return Profile("sink", 0.1, {"x": 1.0}, {"x": 2}, 8, 8, chosen, cost(everything), faint, (), (), ())


@pytest.fixture
def folder(tmp_path, byte_tokenizer):
    config = llama_config(vocab_size=258, max_position_embeddings=256)
    donor(config).save_pretrained(tmp_path / "donor")
    byte_tokenizer.save_pretrained(tmp_path / "donor")
    return tmp_path / "donor"


def test_auto_opens_what_the_profile_says_in_memory_and_on_disk(folder, tmp_path):
    model = twofold.adapt(folder, start="lossless", encoder_mask="auto", profile=stub)
    assert model.config.encoder_mask == ("causal", "sink", "sink", "causal")
    assert model.config.encoder_future_weight == 0.5
    assert model.adaptation["profile"]["chosen"]["layers"] == (1, 2)
    report = adapt_to_folder(
        folder, None, tmp_path / "out", Choices(start="lossless", encoder_mask="auto"), profile=stub
    )
    loaded = twofold.load(tmp_path / "out")
    assert loaded.config == model.config
    assert report["profile"]["chosen"]["layers"] == (1, 2)
    written = json.loads((tmp_path / "out" / "adaptation.json").read_text())
    assert written["profile"]["encoder_mask"] == ["causal", "sink", "sink", "causal"]


def test_a_lossless_pair_is_measured_unless_a_mask_is_chosen(folder, tmp_path):
    asked = []

    def measure(model):
        asked.append(model.config.tie_stacks)
        return stub(model)

    assert twofold.adapt(folder, profile=measure).config.encoder_mask == ("causal", "sink", "sink", "causal")
    adapt_to_folder(folder, None, tmp_path / "out", Choices(decoder_layers=(0, 2)), profile=measure)
    adapt_to_folder(folder, None, tmp_path / "whole", Choices(), profile=measure)
    assert asked == [False, False, True]  # on the way to a folder one copy of the donor is enough
    assert twofold.load(tmp_path / "out").config.encoder_future_weight == 0.5
    for chosen in ({"encoder_mask": "sink"}, {"start": "published"}, {"layout": "separate"}):
        assert "profile" not in twofold.adapt(folder, **chosen, profile=measure).adaptation
    assert len(asked) == 3
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.warns(UserWarning, match="no tokenizer.*stays causal"):
        model = twofold.adapt(folder, profile=measure)
    assert model.config.encoder_mask == ("causal",) * 4


def test_depth_is_measured_after_the_encoder_is_open(folder, tmp_path):
    seen = []

    def choose(model, keep):
        seen.append((model.config.encoder_mask, model.config.encoder_future_weight))
        return DepthChoice((0, 3)[:keep], {"x": 1.0}, ())

    asked = {"start": "lossless", "encoder_mask": "auto", "decoder_depth": 2}
    model = twofold.adapt(folder, **asked, profile=stub, choose=choose)
    assert seen == [(("causal", "sink", "sink", "causal"), 0.5)]
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


def test_a_weight_may_be_given_but_not_beside_auto(folder):
    model = twofold.adapt(folder, start="lossless", encoder_mask="sink", future_weight=0.25)
    assert model.config.encoder_future_weight == 0.25
    with pytest.raises(ValueError, match=r"finds the weight .* itself, got future_weight=0\.25"):
        Choices(start="lossless", encoder_mask="auto", future_weight=0.25)


def test_auto_is_for_pairs_that_start_as_their_donor():
    for asked in ({"encoder_mask": "auto"}, {"decoder_depth": 2}):
        for changes in ({"start": "published"}, {"layout": "separate"}, {"reads": "final"}):
            with pytest.raises(ValueError, match="measure what a change costs next to the donor"):
                Choices(**({"start": "lossless"} | asked | changes))


def test_tied_stacks_have_the_donors_parameters_and_its_logits(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder)
    model = twofold.adapt(folder, encoder_mask="causal", tie_stacks=True)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
    ids = torch.randint(3, 250, (2, 14), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = theirs(ids).logits[:, 6:], model(ids[:, :6], None, ids[:, 6:]).logits
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    report = adapt_to_folder(folder, None, tmp_path / "out", Choices(encoder_mask="causal", tie_stacks=True))
    assert report["num_parameters"] == sum(p.numel() for p in theirs.parameters())
    assert twofold.load(tmp_path / "out").config.tie_stacks
