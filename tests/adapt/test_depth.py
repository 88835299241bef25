import pytest
import torch

import twofold
from tests.models.tiny import MEETINGS, build, gemma_stack, meeting_id, pair_config, random_ids
from twofold.adapt.depth import choose_decoder_layers, cut_decoder
from twofold.adapt.sample import Sample

TEXTS = {
    "letters": ["the quick brown fox jumps over the lazy dog", "a stitch in time saves nine, they say"],
    "numbers": ["1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89", "2 4 8 16 32 64 128 256 512 1024 2048"],
}
LENGTHS = {"source_length": 10, "target_length": 8, "examples": 2}


@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
@torch.no_grad()
def test_a_cut_decoder_is_the_pair_without_these_layers(meeting, tmp_path):
    """Against a new pair with the cut configuration and copied weights."""
    model = build(pair_config(gemma_stack(), **meeting))
    cut = cut_decoder(model, (2, 0))
    assert cut.config.decoder.layer_types == ("full_attention", "full_attention")
    fresh = twofold.EncoderDecoder(cut.config).eval()
    kept = {
        "model.decoder.layers.0.": "model.decoder.layers.2.",
        "model.decoder.layers.1.": "model.decoder.layers.0.",
    }
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in fresh.named_parameters():
        source = next(
            (name.replace(ours, theirs) for ours, theirs in kept.items() if name.startswith(ours)), name
        )
        parameter.copy_(weights[source])
    ids, target = random_ids(2, 7), random_ids(2, 5, seed=1)
    assert torch.equal(cut(ids, None, target).logits, fresh(ids, None, target).logits)
    assert cut.decoder.layers[0] is model.decoder.layers[2]
    twofold.save(cut, tmp_path / "cut")
    assert torch.equal(
        twofold.load(tmp_path / "cut")(ids, None, target).logits, cut(ids, None, target).logits
    )
    assert len(model.decoder.layers) == 3


def test_a_layer_that_does_nothing_costs_nothing(text_model):
    """Its output projections are zero; the others move a random model's loss up or down."""
    model = text_model()
    with torch.no_grad():
        for projection in (model.decoder.layers[1].self_attn.o_proj, model.decoder.layers[1].mlp.down_proj):
            projection.weight.zero_()
    (found,) = choose_decoder_layers(model, 2, TEXTS, at_once=1, **LENGTHS).rounds
    assert found.cost[1] == pytest.approx(0.0, abs=1e-6)
    assert min(abs(found.cost[0]), abs(found.cost[2])) > 1e-3


def test_costs_are_those_of_pairs_that_were_cut(text_model):
    model = text_model(encoder_mask=("sink",) * 3)
    found = choose_decoder_layers(model, 1, TEXTS, at_once=1, **LENGTHS)
    sample = Sample(model, TEXTS, **LENGTHS)

    def loss(layers):
        losses = sample.losses(cut_decoder(model, layers))
        return sum(x.mean().item() for x in losses.values()) / 2

    first, second = found.rounds
    for out in range(3):
        without = [i for i in range(3) if i != out]
        assert first.cost[out] == pytest.approx(loss(without) - loss((0, 1, 2)), abs=1e-6)
    assert first.removed == (min(range(3), key=lambda i: first.cost[i]),)
    assert second.left == tuple(i for i in range(3) if i not in first.removed)
    assert sum(found.loss.values()) / 2 == pytest.approx(loss(found.layers), abs=1e-6)
    both = choose_decoder_layers(model, 1, TEXTS, at_once=2, **LENGTHS)
    assert len(both.rounds) == 1
    assert set(both.rounds[0].removed) == set(sorted(range(3), key=lambda i: first.cost[i])[:2])


def test_what_cannot_be_cut_is_refused(text_model):
    for keep in (0, 4):
        with pytest.raises(ValueError, match=f"between 1 and the decoder's 3 layers.*got {keep} and 2"):
            choose_decoder_layers(text_model(), keep, TEXTS, **LENGTHS)
    with pytest.raises(ValueError, match="tied stacks have one depth"):
        cut_decoder(text_model(tie_stacks=True, tie_word_embeddings="all"), (0, 1))
    with pytest.raises(ValueError, match="out of range: \\[3\\]"):
        cut_decoder(text_model(), (0, 3))
