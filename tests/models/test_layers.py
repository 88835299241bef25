import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.models.tiny import assert_same, gemma_stack, stack
from twofold.config import RopeConfig
from twofold.models.layers import Embedding, GatedMLP, RMSNorm, rope_frequencies, rope_tables, rotate


@pytest.mark.parametrize(
    ("width", "scale"),
    [(512, 22.625), (768, 27.75), (1024, 32.0), (1152, 34.0), (2048, 45.25), (2304, 48.0), (3584, 59.75)],
)
def test_embedding_scale_is_rounded_to_bfloat16(width: int, scale: float) -> None:
    """Rule R1."""
    config = gemma_stack(hidden_size=width, vocab_size=2)
    embedding = Embedding(config, None).to(torch.bfloat16)
    nn.init.ones_(embedding.weight)
    out = embedding(torch.tensor([[1]]))
    assert out.dtype == torch.bfloat16
    assert out[0, 0, 0].item() == scale
    nn.init.normal_(embedding.weight)
    rounded = (embedding.weight.float() * scale).to(torch.bfloat16)
    assert torch.equal(embedding(torch.tensor([[0, 1]]))[0], rounded)


@pytest.mark.parametrize(("width", "scale"), [(640, 25.25), (1152, 34.0), (2560, 50.5)])
def test_embedding_scale_of_t5gemma2_widths(width: int, scale: float) -> None:
    """Rule V6."""
    embedding = Embedding(gemma_stack(hidden_size=width, vocab_size=2), 1).to(torch.bfloat16)
    nn.init.ones_(embedding.weight)
    out = embedding(torch.tensor([[0, 1]]))
    assert (out[0, 0, 0].item(), out[0, 1, 0].item()) == (scale, 0.0)


def test_embedding_in_float32_and_unscaled() -> None:
    ids = torch.tensor([[3, 1]])
    scaled = Embedding(gemma_stack(), None)
    assert torch.equal(scaled(ids), scaled.weight[ids] * torch.tensor(math.sqrt(32)))
    plain = Embedding(stack(), None)
    assert torch.equal(plain(ids), plain.weight[ids])


def test_eoi_embedding_is_swapped_in_unscaled() -> None:
    embedding = Embedding(gemma_stack(), 7)
    with torch.no_grad():
        embedding.eoi_embedding.copy_(torch.arange(32.0))
    out = embedding(torch.tensor([[6, 7, 7]]))
    assert torch.equal(out[0, 1], torch.arange(32.0))
    assert torch.equal(out[0, 2], torch.arange(32.0))
    assert torch.equal(out[0, 0], embedding.weight[6] * torch.tensor(math.sqrt(32)))
    out.sum().backward()
    assert embedding.eoi_embedding.grad is not None
    assert embedding.eoi_embedding.grad.tolist() == [2.0] * 32


def test_rms_norm_against_the_formula() -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.linspace(-0.5, 0.5, 5, dtype=torch.float64)
    for config, factor in ((gemma_stack(rms_norm_eps=0.1), 1 + weight), (stack(rms_norm_eps=0.1), weight)):
        norm = RMSNorm(5, config)
        with torch.no_grad():
            norm.weight.copy_(weight)
        wanted = torch.stack(
            [row / math.sqrt(sum(v * v for v in row.tolist()) / 5 + 0.1) * factor for row in x]
        )
        assert_same(norm(x.float()), wanted.float(), 1e-6)


def test_rms_norm_starts_neutral() -> None:
    x = torch.tensor([[3.0, 4.0]])
    wanted = x / math.sqrt(12.5)
    for config in (gemma_stack(), stack()):
        assert_same(RMSNorm(2, config)(x), wanted, 1e-6)


def test_rms_norm_rounds_after_the_product_in_gemma_and_before_it_in_llama() -> None:
    """Rule R2. The two orders differ for this input, so each can be told from the other."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator).to(torch.bfloat16)
    weight = torch.randn(16, generator=generator).to(torch.bfloat16)
    x32 = x.float()
    normed = x32 * torch.rsqrt((x32 * x32).mean(-1, keepdim=True) + 1e-6)
    after = (normed * (1 + weight.float())).to(torch.bfloat16)
    before = normed.to(torch.bfloat16) * weight
    assert not torch.equal(after, normed.to(torch.bfloat16) * (1 + weight))
    assert not torch.equal(before, (normed * weight.float()).to(torch.bfloat16))
    for config, wanted in ((gemma_stack(), after), (stack(), before)):
        norm = RMSNorm(16, config).to(torch.bfloat16)
        with torch.no_grad():
            norm.weight.copy_(weight)
        assert torch.equal(norm(x), wanted)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_gated_mlp(activation: str) -> None:
    mlp = GatedMLP(stack(hidden_activation=activation, mlp_bias=True))
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    gate = F.linear(x, mlp.gate_proj.weight, mlp.gate_proj.bias)
    if activation == "silu":
        gate = gate / (1 + torch.exp(-gate))
    elif activation == "gelu":
        gate = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    else:
        gate = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    up = F.linear(x, mlp.up_proj.weight, mlp.up_proj.bias)
    assert_same(mlp(x), F.linear(gate * up, mlp.down_proj.weight, mlp.down_proj.bias), 1e-6)


def test_biases_follow_the_config() -> None:
    assert [n for n, _ in GatedMLP(stack()).named_parameters() if n.endswith("bias")] == []
    assert len([n for n, _ in GatedMLP(stack(mlp_bias=True)).named_parameters() if n.endswith("bias")]) == 3


def test_mlp_dropout_is_off_outside_training() -> None:
    mlp = GatedMLP(stack(dropout_rate=0.5))
    x = torch.ones(1, 4, 32)
    assert not torch.equal(mlp.train()(x), mlp(x))
    assert torch.equal(mlp.eval()(x), mlp(x))


def test_rope_frequencies() -> None:
    plain = RopeConfig(theta=10_000.0)
    assert_same(rope_frequencies(plain, 8), torch.tensor([1.0, 0.1, 0.01, 0.001]), 1e-6)
    linear = RopeConfig(theta=10_000.0, scaling="linear", factor=8.0)
    assert_same(rope_frequencies(linear, 8), torch.tensor([1.0, 0.1, 0.01, 0.001]) / 8, 1e-6)


def test_llama3_rope_keeps_short_and_divides_long_wavelengths() -> None:
    """Original context 512 * 2 pi: the frequencies turn 512, 51.2, 5.12, 0.512 times in it."""
    rope = RopeConfig(
        theta=10_000.0,
        scaling="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=10.0,
        original_max_position_embeddings=3217,
    )
    found = rope_frequencies(rope, 8)
    turns = 3217 * 0.01 / (2 * math.pi)
    share = (turns - 1) / 9
    between = 0.01 * (share + (1 - share) / 8)
    assert 0.1 < share < 0.9
    assert_same(found, torch.tensor([1.0, 0.1, between, 0.001 / 8]), 1e-7)


def test_rotation_pairs_channel_i_with_i_plus_half() -> None:
    positions = torch.tensor([[0, 3]])
    tables = rope_tables(RopeConfig(theta=100.0), 4, positions)
    assert tables[0].shape == (1, 1, 2, 4)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 1, 2, 4)
    out = rotate(x, tables)[0, 0]
    assert_same(out[0], x[0, 0, 0], 1e-7)
    a, b = 3 * 1.0, 3 * 0.1
    wanted = [
        1 * math.cos(a) - 3 * math.sin(a),
        2 * math.cos(b) - 4 * math.sin(b),
        3 * math.cos(a) + 1 * math.sin(a),
        4 * math.cos(b) + 2 * math.sin(b),
    ]
    assert_same(out[1], torch.tensor(wanted), 1e-6)


def test_rotation_rounds_once() -> None:
    x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tables = rope_tables(RopeConfig(theta=100.0), 8, torch.arange(5)[None])
    out = rotate(x, tables)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rotate(x.float(), tables).to(torch.bfloat16))
