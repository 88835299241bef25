"""Tiny random models for the tests of `twofold.models`, and how two results are compared.

Weights are large (standard deviation 0.3 at width 32), and queries and keys are enlarged where a soft-cap is
to bite: a dropped cap, a window off by one or a forgotten norm moves logits by tenths, not by rounding.
"""

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from twofold.config import EncoderDecoderConfig, RopeConfig, StackConfig
from twofold.models import EncoderDecoder

TOLERANCE = 1e-5
"""Largest difference between two float32 ways to compute the same, relative to the largest value."""

VOCAB = 40


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal shapes, and a maximal difference of `tolerance` times the largest value (at least 1)."""
    assert ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
    difference = (ours - theirs).abs().max().item() if ours.numel() else 0.0
    assert difference <= tolerance * scale, f"differ by {difference:.3g} on a scale of {scale:.3g}"


def differ(ours: Tensor, theirs: Tensor) -> bool:
    """Far more than rounding apart."""
    return (ours - theirs).abs().max().item() > 1e-3


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0, *, qk_factor: float = 1.0) -> None:
    """Matrices normal(0, 0.3), vectors (norms, biases) moved by normal(0, 0.3); q and k projections times
    `qk_factor`. Works on models of ours and of transformers; tied parameters stay tied."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = 0.3 * torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.add_(noise)
        else:
            parameter.copy_(noise * (qk_factor if "q_proj" in name or "k_proj" in name else 1.0))


def stack(**changes: Any) -> StackConfig:
    """A Llama-like stack of 3 layers, the middle one sliding with a window of 3; grouped heads."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_activation": "silu",
        "rms_norm_eps": 1e-6,
        "norm_adds_one": False,
        "post_norms": False,
        "qk_norm": False,
        "scale_embeddings": False,
        "rope": {"full_attention": RopeConfig(theta=10_000.0), "sliding_attention": RopeConfig(theta=100.0)},
        "layer_types": ("full_attention", "sliding_attention", "full_attention"),
        "sliding_window": 3,
        "query_pre_attn_scalar": 8,
        "max_position_embeddings": 64,
    }
    return StackConfig(**(settings | changes))


def gemma_stack(**changes: Any) -> StackConfig:
    """The same with all that Gemma adds: post-norms, `1 + weight`, scaled embeddings, soft-caps, q/k norm."""
    settings: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "norm_adds_one": True,
        "post_norms": True,
        "qk_norm": True,
        "scale_embeddings": True,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
    }
    return stack(**(settings | changes))


def pair_config(
    encoder: StackConfig, decoder: StackConfig | None = None, **changes: Any
) -> EncoderDecoderConfig:
    """Two stacks that meet as in T5Gemma, pad 0, BOS 2, EOS 1; `aligned_layers` follow from `reads`."""
    decoder = decoder or encoder
    settings: dict[str, Any] = {
        "encoder": encoder,
        "decoder": decoder,
        "layout": "separate",
        "reads": "final",
        "cross_rope": False,
        "decoder_positions": "restart",
        "encoder_mask": ("bidirectional",) * encoder.num_hidden_layers,
        "tie_word_embeddings": "decoder",
        "decoder_start": "bos",
        "source_bos": False,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_ids": (1,),
    }
    settings |= changes
    if settings["reads"] == "aligned":
        settings.setdefault("aligned_layers", tuple(range(decoder.num_hidden_layers)))
    return EncoderDecoderConfig(**settings)


def build(config: EncoderDecoderConfig, seed: int = 0, *, qk_factor: float = 1.0) -> EncoderDecoder:
    """A model with random weights, in evaluation mode; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):  # `randomise` adds to what biases are drawn as
        torch.manual_seed(seed)
        model = EncoderDecoder(config).eval()
    randomise(model, seed, qk_factor=qk_factor)
    return model


MEETINGS = [
    {"layout": layout, "reads": reads, "cross_rope": cross_rope, "decoder_positions": positions}
    for layout, reads, cross_rope, positions in product(
        ("separate", "merged"), ("final", "aligned"), (False, True), ("restart", "continue")
    )
]
MEETINGS += [MEETINGS[i] | {"source_projections": "own"} for i in (8, 15)]
"""All sixteen ways for two stacks to meet, and two merged ones with projections of their own for the source."""


def meeting_id(meeting: dict[str, Any]) -> str:
    """Its name in test ids."""
    rope = "rope" if meeting["cross_rope"] else "norope"
    own = "-own" if "source_projections" in meeting else ""
    return f"{meeting['layout']}-{meeting['reads']}-{rope}-{meeting['decoder_positions']}{own}"


def random_ids(n_rows: int, n_tokens: int, seed: int = 0) -> Tensor:
    """int64 [n_rows, n_tokens] from 3 up, so that pad, EOS and BOS do not occur."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (n_rows, n_tokens), generator=generator)


def padded(ids: Tensor, lengths: list[int], side: str, pad: int = 0) -> tuple[Tensor, Tensor]:
    """The first `lengths[i]` tokens of row i, padded on the given side; and the bool mask of real tokens."""
    n_tokens = ids.shape[1]
    rows, masks = [], []
    for row, length in zip(ids, lengths, strict=True):
        fill = torch.full((n_tokens - length,), pad)
        real = torch.ones(length, dtype=torch.bool)
        parts = [(row[:length], real), (fill, fill.bool() & False)]
        if side == "left":
            parts.reverse()
        rows.append(torch.cat([part for part, _ in parts]))
        masks.append(torch.cat([mask for _, mask in parts]))
    return torch.stack(rows), torch.stack(masks)
