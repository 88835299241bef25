"""Predicted peaks against every storage that a real training step holds."""

import pytest

import twofold.train.loss
from tests.models.tiny import pair_config, stack
from tests.train.plan.account import small, step_peak
from twofold.models import EncoderDecoder
from twofold.train.plan.memory import Setup, gets_gradient, peak_memory, weights_of

needs_chunks = pytest.mark.skipif(
    not hasattr(twofold.train.loss, "chunked_loss"), reason="the loss is not made in chunks yet"
)


def setup(**changes):
    settings = {
        "rows": 2, "source_length": 96, "target_length": 64, "scored": 128, "precision": "float32",
        "checkpointing": "none", "shards": 1, "accumulates": False, "is_cpu": True,
    }  # fmt: skip
    return Setup(**(settings | changes))


@needs_chunks
@pytest.mark.parametrize(
    ("gemma", "precision", "accumulate", "checkpointing", "vocab"),
    [
        (False, "float32", 1, "none", 1024),
        (False, "float32", 2, "none", 1024),
        (True, "bfloat16", 1, "none", 16384),
        (False, "bfloat16", 2, "none", 1024),
        (False, "float32", 1, "full", 1024),
        (True, "bfloat16", 2, "full", 1024),
    ],
)
def test_the_peak_of_a_step(gemma, precision, accumulate, checkpointing, vocab):
    config = small(gemma, vocab=vocab, width=128)
    predicted = peak_memory(
        config, setup(precision=precision, accumulates=accumulate > 1, checkpointing=checkpointing)
    )
    model = EncoderDecoder(config).train()
    model.initialise_randomly(0)
    peak, _ = step_peak(
        model, 2, (96, 64), precision=precision, accumulate=accumulate, checkpointing=checkpointing
    )
    assert abs(predicted.total - peak) <= 0.03 * peak, predicted.parts()


@pytest.mark.parametrize("trained", ["everything", "cross_attention", "all_but_encoder"])
@pytest.mark.parametrize("reads", ["final", "aligned"])
def test_which_parameters_get_gradients(trained, reads):
    import torch

    config = pair_config(stack(), reads=reads, pad_token_id=None)
    model = EncoderDecoder(config)
    model.initialise_randomly(0)
    for name, parameter in model.named_parameters():
        is_frozen = trained == "all_but_encoder" and name.startswith("model.encoder.")
        parameter.requires_grad_("cross_attn" in name if trained == "cross_attention" else not is_frozen)
    ids = torch.randint(3, 40, (2, 5))
    model(ids, decoder_input_ids=ids).logits.sum().backward()
    expected = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    weights = weights_of(config.model_dump_json())
    assert {w.name for w in weights if gets_gradient(config, w.name, trained)} == expected


def test_sharding_divides_what_stays_and_gathers_what_is_used():
    config = small(vocab=1024)
    alone, four = (
        peak_memory(config, setup(shards=n, accumulates=True, precision="bfloat16")) for n in (1, 4)
    )
    total = sum(w.size for w in weights_of(config.model_dump_json()))
    assert (alone.weights, alone.optimizer) == (4 * total, 8 * total)
    assert (four.weights, four.optimizer) == (total, 2 * total)
    block = 3 * 256 * 768 + 2 * 256 * 64 * (4 + 2) + 2 * 256
    cross = 2 * 256 * 64 * (4 + 2) + 256
    assert four.compute_weights == 2 * (total - 6 * (2 * block + cross) + 2 * (block + cross))


def test_an_average_of_the_weights_costs_a_copy():
    config = small(vocab=1024)
    with_it, without = (peak_memory(config, setup(has_ema=ema)) for ema in (True, False))
    assert with_it.total - without.total == without.weights
