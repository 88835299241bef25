from typing import Any

import pytest
from pydantic import ValidationError

from twofold.config import EncoderDecoderConfig, RopeConfig, StackConfig

STACK: dict[str, Any] = {
    "vocab_size": 40,
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
    "rope": {"full_attention": {"theta": 10_000.0}, "sliding_attention": {"theta": 100.0}},
    "layer_types": ("full_attention", "sliding_attention", "full_attention"),
    "sliding_window": 3,
    "query_pre_attn_scalar": 8,
    "max_position_embeddings": 64,
}
PAIR: dict[str, Any] = {
    "encoder": STACK,
    "decoder": STACK,
    "layout": "separate",
    "reads": "final",
    "cross_rope": False,
    "decoder_positions": "restart",
    "encoder_mask": ("bidirectional", "sink", "causal"),
    "tie_word_embeddings": "decoder",
    "decoder_start": "bos",
    "source_bos": False,
    "bos_token_id": 2,
}
WIDE = STACK | {"hidden_size": 64}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"theta": 0}, "greater than 0"),
        ({"scaling": "linear", "factor": 0.5}, "greater than or equal to 1"),
        ({"scaling": "yarn"}, "'default', 'linear' or 'llama3'"),
        (
            {"scaling": "llama3", "factor": 8.0},
            r"'llama3' needs low_freq_factor, .*, got \(None, None, None\)",
        ),
        (
            {"scaling": "llama3", **LLAMA3, "low_freq_factor": None},
            r"needs low_freq_factor, .* got \(None, 4.0, 8192\)",
        ),
        ({"scaling": "linear", "low_freq_factor": 1.0}, "'linear' takes none of the llama3 settings"),
        (LLAMA3, "'default' takes none of the llama3 settings"),
        ({"factor": 2.0}, "'default' takes no factor, got 2.0; use 'linear'"),
        ({"mystery": 1}, "Extra inputs are not permitted"),
    ],
)
def test_rope_errors(changes: dict[str, Any], reason: str) -> None:
    RopeConfig(theta=5.0)
    RopeConfig(theta=5.0, scaling="llama3", factor=8.0, **LLAMA3)
    with pytest.raises(ValueError, match=reason):
        RopeConfig(**({"theta": 5.0} | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer_types": ("full_attention",)}, "layer_types has 1 entries for 3 layers; give one per layer"),
        (
            {"num_key_value_heads": 3},
            r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)",
        ),
        ({"head_dim": 7}, "head_dim must be even for rotary embeddings, got 7"),
        (
            {"rope": {"full_attention": {"theta": 1.0}}},
            r"rope has no entry for layer types \['sliding_attention'\]; it has \['full_attention'\]",
        ),
        ({"sliding_window": None}, "sliding layers need a sliding_window of at least 1 token, got None"),
        ({"sliding_window": 0}, "sliding layers need a sliding_window of at least 1 token, got 0"),
        ({"layer_types": ("full_attention", "chunked", "full_attention")}, "layer_types"),
        ({"hidden_activation": "relu"}, "hidden_activation"),
        ({"attn_logit_softcapping": 0.0}, "greater than 0"),
        ({"final_logit_softcapping": -1.0}, "greater than 0"),
        ({"dropout_rate": 1.0}, "less than 1"),
        ({"vocab_size": 0}, "greater than 0"),
        ({"query_pre_attn_scalar": 0}, "greater than 0"),
        ({"mystery": 1}, "Extra inputs are not permitted"),
    ],
)
def test_stack_errors(changes: dict[str, Any], reason: str) -> None:
    StackConfig(**STACK)
    with pytest.raises(ValueError, match=reason):
        StackConfig(**(STACK | changes))


def test_what_is_required_has_no_default() -> None:
    for key in set(STACK) - {"sliding_window"}:
        with pytest.raises(ValidationError, match=key):
            StackConfig(**{k: v for k, v in STACK.items() if k != key})
    for key in set(PAIR) - {"bos_token_id"}:
        with pytest.raises(ValidationError, match=key):
            EncoderDecoderConfig(**{k: v for k, v in PAIR.items() if k != key})


def test_configs_are_frozen_and_survive_json() -> None:
    config = EncoderDecoderConfig(**PAIR)
    assert EncoderDecoderConfig.model_validate_json(config.model_dump_json()) == config
    assert config.model_type == "twofold"
    with pytest.raises(ValidationError, match="frozen"):
        config.layout = "merged"
    with pytest.raises(ValidationError, match="frozen"):
        config.encoder.hidden_size = 1


def test_layers_are_cut_in_the_given_order() -> None:
    cut = StackConfig(**STACK).with_layers((1, 2))
    assert (cut.num_hidden_layers, cut.layer_types) == (2, ("sliding_attention", "full_attention"))
    assert StackConfig.model_validate(cut.model_dump()) == cut
    assert cut.hidden_size == 32


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ((), r"layer subset \[\] must hold indices from 0 to 2; it is empty"),
        ((0, 3, -1), r"layer subset \[0, 3, -1\] must hold indices from 0 to 2; out of range: \[3, -1\]"),
    ],
)
def test_layers_that_are_not_there(layers: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        StackConfig(**STACK).with_layers(layers)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"decoder": STACK | {"vocab_size": 41}},
            "encoder vocab_size 40 != decoder vocab_size 41; both sides must share one vocabulary",
        ),
        (
            {"layout": "merged", "encoder": WIDE},
            "encoder width 64 and decoder width 32 must be equal; use source_projections='own' or layout='separate'",
        ),
        (
            {"tie_word_embeddings": "all", "encoder": WIDE},
            "one embedding table for both sides needs equal widths, got 64 and 32; set tie_word_embeddings",
        ),
        ({"reads": "aligned"}, "aligned_layers must be given exactly when reads='aligned'"),
        ({"aligned_layers": (0, 1, 2)}, r"got reads='final', aligned_layers=\(0, 1, 2\)"),
        (
            {"reads": "aligned", "aligned_layers": (0, 1)},
            r"aligned_layers \[0, 1\] must hold 3 encoder layer indices from 0 to 2, one per decoder layer",
        ),
        ({"reads": "aligned", "aligned_layers": (0, 1, 3)}, r"aligned_layers \[0, 1, 3\] must hold 3"),
        ({"reads": "aligned", "aligned_layers": (-1, 1, 2)}, r"aligned_layers \[-1, 1, 2\] must hold 3"),
        (
            {"encoder_mask": ("causal",)},
            "encoder_mask has 1 entries for 3 encoder layers; give one per layer",
        ),
        ({"encoder_mask": ("open",) * 3}, "encoder_mask"),
        ({"bos_token_id": None}, "decoder_start='bos' needs bos_token_id, which is not set; set it, or use"),
        ({"layout": "fused"}, "'separate' or 'merged'"),
        ({"classifier_dropout_rate": 1.0}, "less than 1"),
        ({"mystery": 1}, "Extra inputs are not permitted"),
    ],
)
def test_pair_errors(changes: dict[str, Any], reason: str) -> None:
    EncoderDecoderConfig(**PAIR)
    with pytest.raises(ValueError, match=reason):
        EncoderDecoderConfig(**(PAIR | changes))


def test_pairs_that_are_fine() -> None:
    EncoderDecoderConfig(**(PAIR | {"encoder": WIDE}))
    EncoderDecoderConfig(**(PAIR | {"encoder": WIDE, "reads": "aligned", "aligned_layers": (2, 2, 0)}))
    EncoderDecoderConfig(**(PAIR | {"decoder_start": "last_source_token", "bos_token_id": None}))


def test_window_covers_the_source_only_in_the_lossless_arrangement() -> None:
    lossless = {
        "layout": "merged",
        "reads": "aligned",
        "aligned_layers": (0, 1, 2),
        "decoder_positions": "continue",
    }
    assert EncoderDecoderConfig(**(PAIR | lossless)).window_covers_source
    for other in (
        {"layout": "separate"},
        {"reads": "final", "aligned_layers": None},
        {"decoder_positions": "restart"},
    ):
        assert not EncoderDecoderConfig(**(PAIR | lossless | other)).window_covers_source
