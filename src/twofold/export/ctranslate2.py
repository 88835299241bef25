"""CTranslate2 models, where its operators compute what the pair computes.

CTranslate2 (4.8.5) has no soft-cap on attention scores, no window in the encoder, no RoPE in cross-attention, and
another result where queries and keys are normed in cross-attention, so models that have them are refused. The
specification is built from our weights; CTranslate2's own converter for T5Gemma leaves caps and windows out without
saying so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from twofold.config import EncoderDecoderConfig, RopeConfig, StackConfig
from twofold.export.agreement import Run, Sample, Written, in_float32
from twofold.models import EncoderDecoder
from twofold.models.attention import Attention
from twofold.models.layers import RMSNorm
from twofold.models.masks import Rule, decoder_rule, encoder_rule
from twofold.models.stack import Block, DecoderBlock, Stack


def write_ctranslate2(model: EncoderDecoder, folder: Path, *, quantization: str | None = None) -> Written:
    """Write `model.bin`, its vocabulary and its config.json.

    Args:
        quantization: how CTranslate2 stores weights, such as "int8", "float16" or "int8_bfloat16"; default float32.

    Raises:
        ValueError: what CTranslate2 does not compute, or an unknown quantization.
        ImportError: CTranslate2 is missing.
    """
    _library()
    if problems := differences_from_ctranslate2(model.config):
        raise ValueError("CTranslate2 cannot run this model exactly: " + "; ".join(problems))
    pair = in_float32(model)
    tokens = vocabulary(model)
    _save(pair, tokens, folder, quantization)
    if quantization in (None, "float32"):
        return Written(run=_run_folder(folder, tokens, model.config))

    def run(given: Sequence[Sample]) -> list[Tensor]:
        with tempfile.TemporaryDirectory() as unrounded:
            _save(pair, tokens, Path(unrounded), None)
            return _run_folder(Path(unrounded), tokens, model.config)(given)

    return Written(run=run, run_rounded=_run_folder(folder, tokens, model.config))


def differences_from_ctranslate2(config: EncoderDecoderConfig) -> list[str]:
    """Why CTranslate2 cannot run a pair, in words; empty where it can."""
    wanted = {"layout": "separate", "reads": "final", "cross_rope": False, "decoder_positions": "restart"}
    found = [
        f"{name} is {getattr(config, name)!r}, not {value!r}"
        for name, value in wanted.items()
        if getattr(config, name) != value
    ]
    if set(config.encoder_mask) != {"bidirectional"}:
        found.append(f"encoder_mask has {sorted(set(config.encoder_mask))}, not only 'bidirectional'")
    if config.encoder_future_share != 1.0:
        found.append(f"encoder_future_share is {config.encoder_future_share}, not 1")
    if config.eoi_token_id is not None:
        found.append("eoi_token_id: one token has an embedding of its own")
    if config.encoder.rms_norm_eps != config.decoder.rms_norm_eps:
        found.append(
            f"rms_norm_eps differs between encoder ({config.encoder.rms_norm_eps}) and decoder "
            f"({config.decoder.rms_norm_eps}); it has one for both"
        )
    if config.encoder.scale_embeddings != config.decoder.scale_embeddings:
        found.append("only one side scales its embeddings")
    for side, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        found += [
            f"{side}: {problem}" for problem in _differences_of_stack(stack, is_encoder=side == "encoder")
        ]
    return found


def _differences_of_stack(stack: StackConfig, *, is_encoder: bool) -> list[str]:
    found = []
    if stack.attn_logit_softcapping is not None:
        found.append(f"attention scores are capped at {stack.attn_logit_softcapping}")
    if stack.qk_norm:
        found.append("queries and keys are normed (qk_norm)")
    limit = stack.max_position_embeddings
    for layer_type in dict.fromkeys(stack.layer_types):
        rule = (
            encoder_rule(stack, layer_type, "bidirectional")
            if is_encoder
            else decoder_rule(stack, layer_type)
        )
        if _window_binds(rule, limit):
            found.append(
                f"sliding layers with a window of {stack.sliding_window} tokens, fewer than its "
                f"max_position_embeddings ({limit})"
            )
    return found


def _window_binds(rule: Rule, limit: int) -> bool:
    reaches = [reach for reach in (rule.past, rule.future) if reach is not None and reach > 0]
    return any(reach < limit - 1 for reach in reaches)


def vocabulary(model: EncoderDecoder) -> list[str]:
    """One string per token id: the tokenizer's, and `<id N>` for rows it does not name."""
    size = model.config.decoder.vocab_size
    tokens = [f"<id {i}>" for i in range(size)]
    if model.tokenizer is not None:
        for token, number in model.tokenizer.get_vocab().items():
            if number < size:
                tokens[number] = token
    return tokens


def _library() -> ModuleType:
    try:
        import ctranslate2
    except ImportError as error:
        raise ImportError(
            "exports to CTranslate2 need the package ctranslate2; pip install 'twofold[ctranslate2]'"
        ) from error
    module: ModuleType = ctranslate2
    return module


def _save(pair: EncoderDecoder, tokens: list[str], folder: Path, quantization: str | None) -> None:
    spec = specification(pair, tokens)
    spec.validate()
    spec.optimize(quantization=quantization)  # in place
    spec.save(str(folder))


def specification(pair: EncoderDecoder, tokens: list[str]) -> Any:
    """A `TransformerSpec` of CTranslate2 with the weights of a float32 pair."""
    from ctranslate2.specs import TransformerSpec
    from ctranslate2.specs.transformer_spec import TransformerDecoderSpec, TransformerEncoderSpec

    config = pair.config
    spec = TransformerSpec(
        TransformerEncoderSpec(**_stack_options(config.encoder)),
        TransformerDecoderSpec(
            **_stack_options(config.decoder), external_pre_post_encoder_layers=config.decoder.post_norms
        ),
    )
    spec.encoder.embeddings[0].weight = _array(pair.encoder.embed_tokens.weight)
    spec.decoder.embeddings.weight = _array(pair.decoder.embed_tokens.weight)
    spec.decoder.projection.weight = _array(pair.lm_head.out_proj.weight)
    if config.decoder.final_logit_softcapping is not None:
        spec.decoder.final_logit_softcapping = np.float32(config.decoder.final_logit_softcapping)
    for stack_spec, stack in ((spec.encoder, pair.encoder), (spec.decoder, pair.decoder)):
        stack_spec.scale_embeddings = stack.stack_config.scale_embeddings
        _set_stack(stack_spec, stack)
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    spec.config.layer_norm_epsilon = config.decoder.rms_norm_eps
    spec.config.add_source_bos, spec.config.add_source_eos = config.source_bos, False
    spec.config.eos_token = tokens[config.eos_token_ids[0]]
    # It wants one; where the pair has none it is never used.
    spec.config.bos_token = (
        spec.config.eos_token if config.bos_token_id is None else tokens[config.bos_token_id]
    )
    unknown = getattr(pair.tokenizer, "unk_token", None)
    if unknown is not None:
        spec.config.unk_token = unknown
    # None: the caller gives the first decoder token as target_prefix.
    spec.config.decoder_start_token = spec.config.bos_token if config.decoder_start == "bos" else None
    return spec


def _stack_options(stack: StackConfig) -> dict[str, Any]:
    from ctranslate2.specs.common_spec import Activation

    activations = {
        "silu": Activation.SWISH,
        "gelu": Activation.GELU,
        "gelu_pytorch_tanh": Activation.GELUTanh,
    }
    return {
        "num_layers": stack.num_hidden_layers,
        "num_heads": stack.num_attention_heads,
        "num_heads_kv": stack.num_key_value_heads,
        "head_dim": stack.head_dim,
        "activation": activations[stack.hidden_activation],
        "ffn_glu": True,
        "rms_norm": True,
        "pre_post_layer_norm": stack.post_norms,
        "rotary_dim": stack.head_dim,
    }


def _set_stack(spec: Any, stack: Stack) -> None:
    _set_norm(spec.layer_norm, stack.norm)
    config = stack.stack_config
    for layer_spec, layer, layer_type in zip(spec.layer, stack.layers, config.layer_types, strict=True):
        assert isinstance(layer, Block)
        layer_spec.self_attention = _self_attention(config, config.rope[layer_type])
        _set_block(layer_spec, layer)


def _self_attention(stack: StackConfig, rope: RopeConfig) -> Any:
    """A specification for a layer with this RoPE; a stack's own takes one for all layers, and not all of it."""
    from ctranslate2.specs.attention_spec import MultiHeadAttentionSpec, RotaryScalingType

    kinds = {"default": None, "linear": RotaryScalingType.Linear, "llama3": RotaryScalingType.Llama3}
    spec = MultiHeadAttentionSpec(
        self_attention=True,
        rms_norm=True,
        has_norm=not stack.post_norms,
        num_heads_kv=stack.num_key_value_heads,
        head_dim=stack.head_dim,
        rotary_dim=stack.head_dim,
        rotary_interleave=False,  # channel i is paired with i + head_dim / 2
        rotary_base=rope.theta,
        rotary_scaling_type=kinds[rope.scaling],
        rotary_scaling_factor=rope.factor,
        original_max_position_embeddings=rope.original_max_position_embeddings or 0,
    )
    if rope.scaling == "llama3":
        # The runtime reads the factor here too, but specifications of this kind take no such attribute.
        vars(spec)["rotary_scaling_factor"] = np.float32(rope.factor)
        spec.rotary_low_freq_factor = np.float32(rope.low_freq_factor)
        spec.rotary_high_freq_factor = np.float32(rope.high_freq_factor)
    return spec


def _set_block(spec: Any, block: Block) -> None:
    _set_norms(spec, block)
    _set_attention(spec.self_attention, block.self_attn, fused=("qkv", "o"))
    if isinstance(block, DecoderBlock):
        _set_attention(spec.attention, block.cross_attn, fused=("q", "kv", "o"))
    _set_linear(spec.ffn.linear_0, block.mlp.gate_proj)
    _set_linear(spec.ffn.linear_0_noact, block.mlp.up_proj)
    _set_linear(spec.ffn.linear_1, block.mlp.down_proj)


def _set_norms(spec: Any, block: Block) -> None:
    """With post-norms the layer's specification holds them all; without, each sub-layer's its own."""
    if not isinstance(block.post_self_attn_layernorm, RMSNorm):
        _set_norm(spec.self_attention.layer_norm, block.pre_self_attn_layernorm)
        _set_norm(spec.ffn.layer_norm, block.pre_feedforward_layernorm)
        if isinstance(block, DecoderBlock):
            _set_norm(spec.attention.layer_norm, block.pre_cross_attn_layernorm)
        return
    _set_norm(spec.input_layer_norm, block.pre_self_attn_layernorm)
    _set_norm(spec.post_attention_layer_norm, block.post_self_attn_layernorm)
    _set_norm(spec.pre_feedforward_layer_norm, block.pre_feedforward_layernorm)
    _set_norm(spec.post_feedforward_layer_norm, block.post_feedforward_layernorm)
    if isinstance(block, DecoderBlock):
        _set_norm(spec.external_pre_encoder_attention_layer_norm, block.pre_cross_attn_layernorm)
        _set_norm(spec.external_post_encoder_attention_layer_norm, block.post_cross_attn_layernorm)


def _set_attention(spec: Any, attention: Attention, fused: Sequence[str]) -> None:
    """`fused`: which projections (q, k, v, o) lie in a row in each of the specification's linear layers."""
    spec.queries_scale = np.float32(attention.scale)
    for linear_spec, names in zip(spec.linear, fused, strict=True):
        _set_linear(linear_spec, *(getattr(attention, f"{name}_proj") for name in names))


def _set_linear(spec: Any, *layers: nn.Linear) -> None:
    spec.weight = np.concatenate([_array(layer.weight) for layer in layers])
    if any(layer.bias is not None for layer in layers):
        assert all(layer.bias is not None for layer in layers)
        spec.bias = np.concatenate([_array(layer.bias) for layer in layers])


def _set_norm(spec: Any, norm: nn.Module) -> None:
    assert isinstance(norm, RMSNorm)
    spec.gamma = _array(norm.weight) + np.float32(1.0 if norm.adds_one else 0.0)


def _array(parameter: Tensor) -> Any:
    return parameter.detach().numpy().copy()  # quantization works in place


def _run_folder(folder: Path, tokens: Sequence[str], config: EncoderDecoderConfig) -> Run:
    def run(given: Sequence[Sample]) -> list[Tensor]:
        translator = _library().Translator(str(folder), device="cpu", intra_threads=torch.get_num_threads())
        # CTranslate2 puts BOS before sources itself, and the start token before targets where it knows it.
        first_source, first_target = int(config.source_bos), int(config.decoder_start == "bos")
        sources = [[tokens[i] for i in source[first_source:]] for source, _ in given]
        targets = [[tokens[i] for i in target[first_target:]] for _, target in given]
        scored = translator.score_batch(sources, targets)  # the end token comes last, and was not asked for
        return [
            torch.tensor(result.log_probs[: len(target) - 1])
            for result, (_, target) in zip(scored, given, strict=True)
        ]

    return run
