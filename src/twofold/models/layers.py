"""The position-wise parts of a block: embedding, RMSNorm, gated MLP, rotary embedding.

Letters: B batch, L tokens, D hidden_size, F intermediate_size, N heads, H head_dim.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twofold.config import RopeConfig, StackConfig


class Embedding(nn.Embedding):
    """Token embedding, scaled where the family scales it.

    Args:
        config: `scale_embeddings` multiplies by sqrt(hidden_size) rounded to the dtype of the table, the
            order of both reference implementations of T5Gemma (22.625 in bfloat16 for a width of 512).
        eoi_token_id: T5Gemma 2 only; this token gets `eoi_embedding`, unscaled.
    """

    def __init__(self, config: StackConfig, eoi_token_id: int | None) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.scale = math.sqrt(config.hidden_size) if config.scale_embeddings else None
        self.eoi_token_id = eoi_token_id
        if eoi_token_id is not None:
            self.eoi_embedding = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, ids_BL: Tensor) -> Tensor:
        x_BLD = super().forward(ids_BL)
        if self.scale is not None:
            # Filled on the device: a copy from the host could not be captured in a CUDA graph.
            x_BLD = x_BLD * torch.full((), self.scale, dtype=x_BLD.dtype, device=x_BLD.device)
        if self.eoi_token_id is not None:
            is_eoi = (ids_BL == self.eoi_token_id)[..., None]
            x_BLD = torch.where(is_eoi, self.eoi_embedding.to(x_BLD.dtype), x_BLD)
        return x_BLD


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times the weight; computed in float32.

    Gemma multiplies by `1 + weight` and rounds to the input's dtype after that product; Llama and Qwen round
    before a product with `weight`.
    """

    def __init__(self, size: int, config: StackConfig) -> None:
        super().__init__()
        self.adds_one = config.norm_adds_one
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.zeros(size) if self.adds_one else torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        if self.adds_one:
            return (normed * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight.to(x.dtype) * normed.to(x.dtype)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        d_model, d_ff, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)
        self.activation = config.hidden_activation
        self.dropout = nn.Dropout(config.dropout_rate)

    def inner(self, x_BLD: Tensor) -> Tensor:
        """What the last projection reads, [B, L, F]."""
        gate_BLF = self.gate_proj(x_BLD)
        if self.activation == "silu":
            gate_BLF = F.silu(gate_BLF)
        else:
            gate_BLF = F.gelu(gate_BLF, approximate="tanh" if self.activation != "gelu" else "none")
        inner_BLF: Tensor = gate_BLF * self.up_proj(x_BLD)
        return inner_BLF

    def forward(self, x_BLD: Tensor) -> Tensor:
        down: Tensor = self.down_proj(self.dropout(self.inner(x_BLD)))
        return down


def rope_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Rotation in radians per position for each pair of channels.

    `linear` divides all by the factor (positional interpolation). `llama3` (Llama 3.1) keeps wavelengths below
    `original / high_freq_factor`, divides those above `original / low_freq_factor`, and interpolates between.

    Returns:
        float32 [H / 2].
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / config.theta**exponents
    if config.scaling == "linear":
        return frequencies / config.factor
    if config.scaling == "llama3":
        low, high = config.low_freq_factor, config.high_freq_factor
        original = config.original_max_position_embeddings
        assert low is not None
        assert high is not None
        assert original is not None
        turns = original * frequencies / (2 * math.pi)  # full rotations within the original context
        kept_share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return frequencies * (kept_share + (1 - kept_share) / config.factor)
    return frequencies


def rope_tables(config: RopeConfig, head_dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for the given positions.

    Args:
        positions: int64 [B, L].

    Returns:
        cos and sin, float32 [B, 1, L, H]; the second half of H repeats the first.
    """
    return rotations(rope_frequencies(config, head_dim).to(positions.device), positions)


def rotations(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """`rope_tables` of the given `rope_frequencies`, on the device of the positions."""
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BNLH: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE in its half-rotation form: channel i is paired with channel i + H / 2. Rounded to x's dtype once."""
    cos, sin = tables
    first, second = x_BNLH.chunk(2, dim=-1)
    return (x_BNLH * cos + torch.cat([-second, first], dim=-1) * sin).to(x_BNLH.dtype)
