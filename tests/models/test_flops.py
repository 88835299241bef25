"""Counts against PyTorch's own counter, against the masks, and against the published dimensions."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models.test_parameter_counts import KEYS, T5GEMMA_SIDES
from tests.models.tiny import MEETINGS, VOCAB, build, gemma_stack, meeting_id, pair_config, random_ids, stack
from twofold.config import EncoderDecoderConfig
from twofold.models import EncoderDecoder
from twofold.models.attention import Attention
from twofold.models.families import PAIRS
from twofold.models.flops import (
    Pairs,
    Row,
    attention_pairs,
    decoder_only_flops,
    example_row,
    forward_flops,
    packed_row,
    training_flops,
    visible_pairs,
)
from twofold.models.masks import AttentionMask, Rule, Tokens

N, M = 7, 5


def dense_row(config: EncoderDecoderConfig, n: int = N, m: int = M) -> Row:
    """One example whose attention computes hidden pairs as well, as the eager reference does."""
    layers = config.encoder.num_hidden_layers, config.decoder.num_hidden_layers
    pairs = Pairs((n * n,) * layers[0], (m * m,) * layers[1], (n * m,) * layers[1])
    return Row(n, m, m, pairs)


def counted(model: EncoderDecoder, n: int = N, m: int = M) -> tuple[int, int]:
    """Operations of forward and backward as PyTorch's dispatcher sees them, eager attention."""
    model.set_attention_backend("eager")
    with FlopCounterMode(display=False) as forward:
        logits = model(random_ids(1, n), decoder_input_ids=random_ids(1, m)).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


PAIRS_OF_STACKS = {
    "gemma": (gemma_stack(), gemma_stack()),
    "uneven depth": (
        stack(num_hidden_layers=4, layer_types=("full_attention",) * 4),
        stack(num_hidden_layers=2, layer_types=("sliding_attention", "full_attention")),
    ),
}


@pytest.mark.parametrize("stacks", PAIRS_OF_STACKS.values(), ids=PAIRS_OF_STACKS.keys())
@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
def test_every_layout_agrees_with_the_dispatcher(meeting, stacks):
    if meeting["reads"] == "aligned":
        n_layers = stacks[0].num_hidden_layers, stacks[1].num_hidden_layers
        aligned = tuple(i * n_layers[0] // n_layers[1] for i in range(n_layers[1]))
        meeting = meeting | {"aligned_layers": aligned}
    config = pair_config(*stacks, **meeting)
    flops = training_flops(config, dense_row(config))
    assert (flops.forward, flops.backward) == counted(build(config).train())
    assert flops.recompute == 0


@pytest.mark.parametrize("tie", ["all", "decoder", "none"])
def test_tying_changes_nothing(tie):
    config = pair_config(stack(), tie_word_embeddings=tie)
    flops = training_flops(config, dense_row(config))
    assert (flops.forward, flops.backward) == counted(build(config).train())


def test_unequal_widths_and_heads():
    config = pair_config(
        stack(hidden_size=48, intermediate_size=80, num_attention_heads=6, num_key_value_heads=3),
        stack(num_key_value_heads=1, num_hidden_layers=2, layer_types=("full_attention",) * 2),
    )
    flops = training_flops(config, dense_row(config))
    assert (flops.forward, flops.backward) == counted(build(config).train())


def test_own_projections_of_a_wider_source():
    config = pair_config(
        stack(hidden_size=48, num_attention_heads=6, num_key_value_heads=3),
        stack(num_key_value_heads=1, num_hidden_layers=2, layer_types=("full_attention",) * 2),
        **MEETINGS[15],
        aligned_layers=(0, 2),
        source_projections="own",
    )
    flops = training_flops(config, dense_row(config))
    assert (flops.forward, flops.backward) == counted(build(config).train())


def test_cross_attention_alone_costs_what_its_gradients_need():
    config = pair_config(stack(hidden_size=48), stack())
    model = build(config).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("cross_attn" in name)
    flops = training_flops(config, dense_row(config), trained="cross_attention")
    assert (flops.forward, flops.backward) == counted(model)


def test_a_frozen_encoder():
    config = pair_config(stack())
    model = build(config).train()
    model.encoder.requires_grad_(False)
    flops = training_flops(config, dense_row(config), trained="all_but_encoder")
    assert (flops.forward, flops.backward) == counted(model)


@pytest.mark.parametrize("trained", ["everything", "cross_attention", "all_but_encoder"])
def test_full_checkpointing_repeats_the_blocks_that_have_a_backward(trained):
    config = pair_config(stack())
    row = dense_row(config)
    flops = training_flops(config, row, trained=trained, checkpointing="full")
    plain = training_flops(config, row, trained=trained)
    encoder = plain.encoder.forward + 4 * 4 * 8 * 3 * N * N
    blocks = plain.forward - plain.lm_head.forward
    assert flops.recompute == (blocks if trained == "everything" else blocks - encoder)
    assert flops.model == plain.total
    selective = training_flops(config, row, trained=trained, checkpointing="selective")
    assert selective.recompute == 0


@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
@pytest.mark.parametrize(
    ("mask", "window"),
    [("bidirectional", "each_side"), ("bidirectional", "total"), ("causal", "each_side"), ("sink", "total")],
)
def test_visible_pairs_are_those_of_the_masks(meeting, mask, window, monkeypatch):
    """The masks that the model really builds, counted where they are used."""
    side = stack(sliding_window=4, bidirectional_window=window)
    config = pair_config(side, **meeting, encoder_mask=(mask, "bidirectional", mask))
    model = build(config)
    model.set_attention_backend("eager")
    seen = []
    attend = Attention.forward

    def watch(self, q, keys_values, mask):
        dense = mask.dense[0]
        if len(mask.parts) == 2:
            seen.append((int(dense[:, N:].sum()), int(dense[:, :N].sum())))
        else:
            seen.append(int(dense.sum()))
        return attend(self, q, keys_values, mask)

    monkeypatch.setattr(Attention, "forward", watch)
    model(random_ids(1, N), decoder_input_ids=random_ids(1, M))
    pairs = attention_pairs(config, N, M)
    assert pairs.encoder == tuple(seen[:3])
    decoder = seen[3:] if meeting["layout"] == "merged" else list(zip(seen[3::2], seen[4::2], strict=True))
    assert list(zip(pairs.decoder, pairs.cross, strict=True)) == decoder


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(), 20),  # 4 queries, 5 keys
        (Rule(future=0), 10),  # 1 + 2 + 3 + 4
        (Rule(past=1, future=0), 7),  # 1 + 2 + 2 + 2
        (Rule(past=1, future=1), 11),  # 2 + 3 + 3 + 3
        (Rule(sink=True), 16),  # 1 + 5 + 5 + 5
    ],
)
def test_visible_pairs_by_hand(rule, expected):
    assert visible_pairs(rule, 4, 5) == expected
    queries = Tokens(torch.arange(4)[None], torch.ones(1, 4, dtype=torch.int64))
    keys = Tokens(torch.arange(5)[None], torch.ones(1, 5, dtype=torch.int64))
    assert int(AttentionMask(queries, (keys, rule)).dense.sum()) == expected


def test_a_packed_row_pays_for_its_padding_in_the_linear_layers_only():
    config = pair_config(stack())
    one = example_row(config, 4, 3)
    row = packed_row(config, 10, 8, [(4, 3), (4, 3)])
    assert row == Row(10, 8, 6, Pairs(*(tuple(2 * x for x in side) for side in one.pairs)), 2)
    flops, single = training_flops(config, row), training_flops(config, one)
    assert flops.attention.total == 2 * single.attention.total
    assert flops.lm_head.total == 2 * single.lm_head.total
    assert flops.encoder.total * 4 == single.encoder.total * 10
    with pytest.raises(ValueError, match="9 source and 4 target tokens do not fit a row of 8"):
        packed_row(config, 8, 8, [(5, 2), (4, 2)])


# Decoder-only and pair, n = m = 4096 tokens, in 1e14; worked out by hand from the dimensions of the released models.
TABLE = {
    "S": (0.019, 0.022),
    "B": (0.041, 0.048),
    "L": (0.101, 0.121),
    "ML": (0.177, 0.201),
    "XL": (0.290, 0.348),
    "2B": (0.443, 0.499),
    "9B": (1.641, 1.879),
}


def t5gemma(encoder: str, decoder: str) -> EncoderDecoderConfig:
    sides = {
        side: dict(zip(KEYS, T5GEMMA_SIDES[name], strict=True)) | {"vocab_size": 256_000}
        for side, name in (("encoder", encoder), ("decoder", decoder))
    }
    return PAIRS["t5gemma"].read_config({"model_type": "t5gemma", **sides})


@pytest.mark.parametrize("size", TABLE)
def test_released_sizes(size):
    config = t5gemma(size, size)
    decoder_only, pair = TABLE[size]
    assert round(decoder_only_flops(config.decoder, 4096, 4096) / 1e14, 3) == decoder_only
    assert round(forward_flops(config, 4096, 4096) / 1e14, 3) == pair


def test_9b_2b():
    assert round(forward_flops(t5gemma("9B", "2B"), 4096, 4096) / 1e14, 3) == 1.101


def test_decoder_only_agrees_with_transformers_under_the_dispatcher():
    from transformers import LlamaConfig, LlamaForCausalLM

    side = stack(layer_types=("full_attention",) * 3, sliding_window=None)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attn_implementation="eager",
    )  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        LlamaForCausalLM(config)(random_ids(1, N + M), logits_to_keep=M)
    hidden = (N + M) * (N + M - 1) // 2  # eager computes the upper triangle too
    assert decoder_only_flops(side, N, M) == counter.get_total_flops() - 3 * 4 * 4 * 8 * hidden
