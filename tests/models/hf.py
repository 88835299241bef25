"""Tiny models of transformers, with large random weights and eager attention, and their weights in ours."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.models.tiny import VOCAB, assert_same, random_ids, randomise
from twofold.config import EncoderDecoderConfig
from twofold.models import EncoderDecoder
from twofold.models.families import TensorMap, donor_family

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
GEMMA = {"query_pre_attn_scalar": 12, "sliding_window": 4}
NO_HEAD_DIM = {key: value for key, value in COMMON.items() if key != "head_dim"}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
"""Of the four frequencies of a head of width 8, one is kept, one interpolated and two are divided."""
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}


def gemma2_config(**changes: Any) -> transformers.Gemma2Config:
    caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}
    return transformers.Gemma2Config(**(COMMON | GEMMA | caps | changes))


def gemma3_config(**changes: Any) -> transformers.Gemma3TextConfig:
    settings: dict[str, Any] = {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0},
        },
    }
    return transformers.Gemma3TextConfig(**(COMMON | GEMMA | settings | changes))


def llama_config(**changes: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**(COMMON | changes))


def mistral_config(**changes: Any) -> transformers.MistralConfig:
    return transformers.MistralConfig(**(COMMON | {"sliding_window": 4} | changes))


def qwen2_config(**changes: Any) -> transformers.Qwen2Config:
    return transformers.Qwen2Config(**(NO_HEAD_DIM | changes))


def qwen3_config(**changes: Any) -> transformers.Qwen3Config:
    return transformers.Qwen3Config(**(COMMON | changes))


QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}

DONOR_CONFIGS = {
    "gemma2": gemma2_config(),
    "gemma2-bias-untied": gemma2_config(attention_bias=True, tie_word_embeddings=False),
    "gemma3": gemma3_config(),
    # transformers reads Gemma 3's attention cap, null in every release, but does not apply it.
    "gemma3-final-cap": gemma3_config(final_logit_softcapping=4.0),
    "llama": llama_config(),
    "llama-tied-biases": llama_config(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-rope-llama3": llama_config(rope_parameters=LLAMA3_ROPE),
    "llama-rope-linear": llama_config(rope_parameters=LINEAR_ROPE),
    "mistral-window": mistral_config(),
    "mistral-no-window": mistral_config(sliding_window=None),
    "qwen2": qwen2_config(),
    "qwen2-window": qwen2_config(**QWEN_WINDOW, tie_word_embeddings=True),
    "qwen3": qwen3_config(),
    "qwen3-bias-window": qwen3_config(
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ),
}
"""Every donor family, with and without what its config can switch."""


def donor(config: transformers.PreTrainedConfig, seed: int = 0) -> nn.Module:
    """A causal LM of transformers; q and k enlarged where scores are capped, so that they exceed the cap."""
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model, seed, qk_factor=3.0 if getattr(config, "attn_logit_softcapping", None) else 1.0)
    return model


VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 224,
    "patch_size": 14,
}


def load_mapped(
    module: nn.Module, tensors: Mapping[str, Tensor], tensor_map: TensorMap, prefix: str = ""
) -> set[str]:
    """Copy tensors under their mapped names; returns the parameters of the module that got none."""
    named = {tensor_map.to_own(name): tensor for name, tensor in tensors.items()}
    found = module.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in named.items() if name is not None},
        strict=False,
    )
    assert not found.unexpected_keys
    return set(found.missing_keys)


def lossless_pair(model: nn.Module, config: dict[str, Any] | None = None, **changes: Any) -> EncoderDecoder:
    """The donor on both sides: merged, aligned, rotated, continuing, with a causal encoder.

    It computes what the donor computes. Its encoder with `lm_head` is the donor, too.

    Args:
        config: the donor's config.json; by default as transformers writes it.
        changes: of the `EncoderDecoderConfig`.
    """
    config = config or model.config.to_dict()
    family = donor_family(config)
    read = family.read_config(config)
    n_layers = read.stack.num_hidden_layers
    settings: dict[str, Any] = {
        "encoder": read.stack,
        "decoder": read.stack,
        "layout": "merged",
        "reads": "aligned",
        "cross_rope": True,
        "decoder_positions": "continue",
        "aligned_layers": tuple(range(n_layers)),
        "encoder_mask": ("causal",) * n_layers,
        "tie_word_embeddings": "all" if read.tie_word_embeddings else "none",
        "decoder_start": "last_source_token",
        "source_bos": True,
        "pad_token_id": read.pad_token_id,
        "bos_token_id": read.bos_token_id,
        "eos_token_ids": read.eos_token_ids,
    }
    pair = EncoderDecoder(EncoderDecoderConfig(**(settings | changes))).eval()
    weights = model.state_dict()
    head = {name: weights.pop(name) for name in list(weights) if name.startswith("lm_head")}
    for side in (pair.encoder, pair.decoder):
        assert load_mapped(side, weights, family.tensor_map) == set()
    with torch.no_grad():
        pair.lm_head.out_proj.weight.copy_(head["lm_head.weight"])
    assert family.tensor_map.to_own("lm_head.weight") == "lm_head.out_proj.weight"
    return pair


@torch.no_grad()
def assert_causal_lm_is_donor(model: nn.Module, config: dict[str, Any] | None = None) -> None:
    """Our causal encoder with the donor's head gives the donor's logits; 20 tokens are five windows."""
    pair = lossless_pair(model, config)
    ids = random_ids(2, 20, seed=5)
    output = pair.encode(ids)
    assert_same(pair.lm_head(output.last_hidden_state), model(ids, use_cache=False).logits)


def assert_names_go_there_and_back(model: nn.Module) -> None:
    """Every tensor of the donor has a name of ours, no two the same, and comes back under its own."""
    tensor_map = donor_family(model.config.to_dict()).tensor_map
    theirs = list(model.state_dict())
    own = [tensor_map.to_own(name) for name in theirs]
    assert None not in own
    assert len(set(own)) == len(theirs)
    assert [tensor_map.from_own(name) for name in own if name is not None] == theirs
