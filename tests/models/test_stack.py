from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny import assert_same, build, differ, gemma_stack, pair_config, random_ids, stack
from twofold.config import RopeConfig, StackConfig
from twofold.models import EncoderDecoder
from twofold.models.layers import rope_tables
from twofold.models.masks import AttentionMask, Rule, Tokens
from twofold.models.stack import DecoderView, EncoderBlock


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight)


def test_parameters_are_named_as_in_t5gemma_files() -> None:
    model = EncoderDecoder(pair_config(gemma_stack(qk_norm=False)))
    names = set(dict(model.named_parameters(remove_duplicate=False)))
    norms = ["pre_self_attn", "post_self_attn", "pre_feedforward", "post_feedforward"]
    layer = [f"self_attn.{p}_proj.weight" for p in "qkvo"] + [
        f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")
    ]
    layer += [f"{n}_layernorm.weight" for n in norms]
    cross = [f"cross_attn.{p}_proj.weight" for p in "qkvo"]
    cross += [f"{n}_cross_attn_layernorm.weight" for n in ("pre", "post")]
    wanted = {"lm_head.out_proj.weight"}
    for side, per_layer in (("encoder", layer), ("decoder", layer + cross)):
        wanted |= {f"model.{side}.embed_tokens.weight", f"model.{side}.norm.weight"}
        wanted |= {f"model.{side}.layers.{i}.{name}" for i in range(3) for name in per_layer}
    assert names == wanted


def test_families_without_post_norms_have_none() -> None:
    names = dict(EncoderDecoder(pair_config(stack())).named_parameters())
    assert not [name for name in names if "post_" in name]


@torch.no_grad()
def test_sandwich_norms() -> None:
    """Rule R3, and the read that is handed to aligned decoders."""
    block: EncoderBlock = build(pair_config(gemma_stack(qk_norm=False))).encoder.layers[0]  # type: ignore[assignment]
    tokens = Tokens.from_segments(torch.ones(2, 5, dtype=torch.int64))
    mask = AttentionMask(tokens, (tokens, Rule()))
    rope = rope_tables(RopeConfig(theta=10.0), 8, tokens.positions)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    out, read = block(x, rope, mask)
    wanted_read = norm(x, block.pre_self_attn_layernorm.weight)
    assert_same(read, wanted_read, 1e-6)
    q = block.self_attn.queries(wanted_read, rope)
    attended = block.self_attn(q, block.self_attn.keys_values(wanted_read, rope), mask)
    x = x + norm(attended, block.post_self_attn_layernorm.weight)  # type: ignore[arg-type]
    mlp = block.mlp(norm(x, block.pre_feedforward_layernorm.weight))
    assert_same(out, x + norm(mlp, block.post_feedforward_layernorm.weight), 2e-6)  # type: ignore[arg-type]


@torch.no_grad()
def test_cross_attention_stands_between_self_attention_and_mlp() -> None:
    """Rules R4 and R9: no rotation, everything visible, keys of the encoder's width."""
    model = build(pair_config(stack(hidden_size=24), stack()))
    block: Any = model.decoder.layers[0]
    own, source = (Tokens.from_segments(torch.ones(2, n, dtype=torch.int64)) for n in (5, 7))
    generator = torch.Generator().manual_seed(0)
    x, memory = torch.randn(2, 5, 32, generator=generator), torch.randn(2, 7, 24, generator=generator)
    rope = rope_tables(RopeConfig(theta=10.0), 8, own.positions)
    self_mask = AttentionMask(own, (own, Rule(future=0)))
    cross_mask = AttentionMask(own, (source, Rule()))
    out, seen = block(x, memory, DecoderView(rope, None, False, self_mask, cross_mask), None)

    def llama_norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    read = llama_norm(x, block.pre_self_attn_layernorm.weight)
    attention = block.self_attn
    x = x + attention(attention.queries(read, rope), attention.keys_values(read, rope), self_mask)
    read = llama_norm(x, block.pre_cross_attn_layernorm.weight)
    cross = block.cross_attn
    q = (read @ cross.q_proj.weight.T).view(2, 5, 2, 2, 8)
    k, v = ((memory @ w.T).view(2, 7, 2, 8) for w in (cross.k_proj.weight, cross.v_proj.weight))
    weights = (torch.einsum("btkgh,bskh->bkgts", q, k) * 8**-0.5).softmax(-1)
    attended = torch.einsum("bkgts,bskh->btkgh", weights, v).flatten(2)
    x = x + attended @ cross.o_proj.weight.T
    mlp = block.mlp(llama_norm(x, block.pre_feedforward_layernorm.weight))
    assert_same(out, x + mlp, 2e-6)
    assert (seen.own.length, seen.source.length) == (5, 7)


@torch.no_grad()
def test_merged_attention_is_one_softmax_over_both() -> None:
    """Rules V3 and V5: shared k and v, k_norm on both, no rotation of encoder keys."""
    model = build(pair_config(gemma_stack(attn_logit_softcapping=None), layout="merged"))
    block: Any = model.decoder.layers[0]
    assert not hasattr(block, "cross_attn")
    own, source = (Tokens.from_segments(torch.ones(1, n, dtype=torch.int64)) for n in (5, 7))
    generator = torch.Generator().manual_seed(0)
    x, memory = torch.randn(1, 5, 32, generator=generator), torch.randn(1, 7, 32, generator=generator)
    rope = rope_tables(RopeConfig(theta=10.0), 8, own.positions)
    mask = AttentionMask(own, (source, Rule()), (own, Rule(future=0)))
    read = norm(x, block.pre_self_attn_layernorm.weight)
    attention = block.self_attn
    out, seen = block(x, memory, DecoderView(rope, None, False, mask, mask), None)
    unrotated = norm(
        (memory @ attention.k_proj.weight.T).view(1, 7, 2, 8), attention.k_norm.weight
    ).transpose(1, 2)
    assert_same(seen.source.keys, unrotated, 1e-6)
    assert_same(seen.own.keys, attention.keys_values(read, rope).keys, 1e-6)
    keys = torch.cat([seen.source.keys, seen.own.keys], dim=2).repeat_interleave(2, dim=1)
    values = torch.cat([seen.source.values, seen.own.values], dim=2).repeat_interleave(2, dim=1)
    scores = attention.queries(read, rope) @ keys.transpose(-1, -2) * 8**-0.5
    hidden = torch.cat([torch.zeros(5, 7), torch.ones(5, 5).triu(1)], dim=1).bool()
    attended = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
    attended = attended.transpose(1, 2).flatten(2) @ attention.o_proj.weight.T
    x = x + norm(attended, block.post_self_attn_layernorm.weight)
    mlp = block.mlp(norm(x, block.pre_feedforward_layernorm.weight))
    assert_same(out, x + norm(mlp, block.post_feedforward_layernorm.weight), 2e-6)


def _restarted(**changes: Any) -> EncoderDecoder:
    return build(pair_config(stack(), **changes))


@pytest.mark.parametrize("layout", ["separate", "merged"])
@torch.no_grad()
def test_cross_rotation_and_positions_each_change_the_result(layout: str) -> None:
    """The same weights under each choice: rotation needs its own test that it is there at all."""
    source, target = random_ids(1, 8), random_ids(1, 6, seed=1)
    logits = {
        (rope, positions): _restarted(layout=layout, cross_rope=rope, decoder_positions=positions)(
            source, decoder_input_ids=target
        ).logits
        for rope in (False, True)
        for positions in ("restart", "continue")
    }
    assert differ(logits[False, "restart"], logits[True, "restart"])
    assert differ(logits[True, "restart"], logits[True, "continue"])
    if layout == "separate":
        # RoPE is relative: without rotation of source keys, where the decoder starts to count cannot matter.
        assert_same(logits[False, "restart"], logits[False, "continue"])
    else:
        assert differ(logits[False, "restart"], logits[False, "continue"])


@torch.no_grad()
def test_only_relative_positions_matter_with_rotated_source_keys() -> None:
    """Padding on the left of a continuing, rotated pair moves source and target together."""
    for layout in ("separate", "merged"):
        model = _restarted(layout=layout, cross_rope=True, decoder_positions="continue")
        source, target = random_ids(1, 6), random_ids(1, 5, seed=1)
        shifted = torch.cat([torch.zeros(1, 4, dtype=torch.int64), source], dim=1)
        assert_same(
            model(shifted, decoder_input_ids=target).logits, model(source, decoder_input_ids=target).logits
        )


def test_rope_tables_are_made_per_layer_type() -> None:
    model = build(pair_config(stack()))
    tables = model.encoder.rope(torch.arange(4)[None])
    assert list(tables) == ["full_attention", "sliding_attention"]
    assert_same(
        tables["full_attention"][0], rope_tables(RopeConfig(theta=10_000.0), 8, torch.arange(4)[None])[0]
    )
    assert_same(
        tables["sliding_attention"][0], rope_tables(RopeConfig(theta=100.0), 8, torch.arange(4)[None])[0]
    )
    full: StackConfig = stack(layer_types=("full_attention",) * 3)
    assert list(build(pair_config(full)).decoder.rope(torch.arange(4)[None])) == ["full_attention"]


def test_dropout_acts_in_training_only() -> None:
    model = build(pair_config(stack(dropout_rate=0.3)))
    source, target = random_ids(1, 5), random_ids(1, 4, seed=1)

    def run() -> Tensor:
        logits: Tensor = model(source, decoder_input_ids=target).logits
        return logits

    with torch.no_grad():
        assert torch.equal(run(), run())
        model.train()
        torch.manual_seed(0)
        assert differ(run(), run())


@torch.no_grad()
def test_decoders_of_another_depth_and_shape() -> None:
    encoder = stack(hidden_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=12)
    decoder = stack(num_hidden_layers=2, layer_types=("sliding_attention", "full_attention"))
    for changes in ({}, {"reads": "aligned", "aligned_layers": (2, 1)}):
        model = build(pair_config(encoder, decoder, **changes))
        output = model(random_ids(2, 9), decoder_input_ids=random_ids(2, 7))
        assert output.logits.shape == (2, 7, 40)
        assert output.encoder.last_hidden_state.shape == (2, 9, 24)
