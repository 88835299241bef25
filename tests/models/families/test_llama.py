import json
from typing import Any

import pytest

from tests.models.hf import (
    COMMON,
    DONOR_CONFIGS,
    LLAMA3_ROPE,
    assert_causal_lm_is_donor,
    assert_names_go_there_and_back,
    donor,
)
from twofold.config import RopeConfig
from twofold.models.families import DONORS, DonorConfig

NAMES = [name for name in DONOR_CONFIGS if name.startswith(("llama", "mistral"))]


def read(config: dict[str, Any]) -> DonorConfig:
    return DONORS[config["model_type"]].read_config(config)


def old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4.x wrote it."""
    old: dict[str, Any] = json.loads(json.dumps(config))
    rope = old.pop("rope_parameters")
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    old["torch_dtype"] = "bfloat16"
    old.pop("dtype")
    old["eos_token_id"] = [1, 5]
    old["pretraining_tp"] = 1
    return old


@pytest.mark.parametrize("name", NAMES)
def test_same_logits_as_transformers(name: str) -> None:
    model = donor(DONOR_CONFIGS[name])
    assert_causal_lm_is_donor(model)
    assert_causal_lm_is_donor(model, old_spelling(model.config.to_dict()))
    assert_names_go_there_and_back(model)


def test_what_is_read() -> None:
    new = read(DONOR_CONFIGS["llama-rope-llama3"].to_dict())
    old = read(old_spelling(DONOR_CONFIGS["llama-rope-llama3"].to_dict()))
    assert new.stack == old.stack
    assert (new.eos_token_ids, old.eos_token_ids) == ((1,), (1, 5))
    assert (new.bos_token_id, new.pad_token_id, new.tie_word_embeddings) == (2, 0, False)
    assert new.stack.rope == {
        "full_attention": RopeConfig(
            theta=50.0,
            scaling="llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        )
    }
    assert new.stack.query_pre_attn_scalar == new.stack.head_dim == 8
    gemma_only = (
        new.stack.norm_adds_one,
        new.stack.post_norms,
        new.stack.qk_norm,
        new.stack.scale_embeddings,
    )
    assert gemma_only == (False, False, False, False)


def test_oldest_spelling_of_a_rope_type() -> None:
    """Llama 2 wrote `type`, newer files `rope_type`; some have both."""
    config = {**COMMON, "model_type": "llama", "rope_theta": 100.0}
    wanted = {"full_attention": RopeConfig(theta=100.0, scaling="linear", factor=2.0)}
    for scaling in ({"type": "linear"}, {"rope_type": "linear"}, {"type": "linear", "rope_type": "linear"}):
        assert read(config | {"rope_scaling": scaling | {"factor": 2.0}}).stack.rope == wanted
    with pytest.raises(ValueError, match="rope_type='linear' and type='default' disagree"):
        read(config | {"rope_scaling": {"type": "default", "rope_type": "linear", "factor": 2.0}})


def test_two_thetas_that_disagree_are_refused() -> None:
    rope = {"rope_type": "default", "rope_theta": 100.0}
    config = {**COMMON, "model_type": "llama", "rope_parameters": rope}
    assert read(config | {"rope_theta": 100.0}).stack.rope["full_attention"].theta == 100.0
    with pytest.raises(ValueError, match=r"rope_theta=500.0 is not supported; only 100.0"):
        read(config | {"rope_theta": 500.0})


def test_mistral_slides_everywhere_or_nowhere() -> None:
    window = read(DONOR_CONFIGS["mistral-window"].to_dict()).stack
    assert (set(window.layer_types), window.sliding_window) == ({"sliding_attention"}, 4)
    none = read(DONOR_CONFIGS["mistral-no-window"].to_dict()).stack
    assert (set(none.layer_types), none.sliding_window) == ({"full_attention"}, None)
    absent = read({**COMMON, "model_type": "mistral"}).stack
    assert (set(absent.layer_types), absent.sliding_window) == ({"sliding_attention"}, 4096)


def test_defaults_fill_in_what_old_files_lack() -> None:
    small = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    stack = read({"model_type": "llama"} | small).stack
    assert (stack.num_key_value_heads, stack.head_dim, stack.max_position_embeddings) == (4, 8, 2048)
    assert (stack.rms_norm_eps, stack.hidden_activation) == (1e-6, "silu")
    assert stack.rope["full_attention"] == RopeConfig(theta=10_000.0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"mystery": 1, "riddle": None},
            "llama config has keys that twofold does not know: mystery=1, riddle=None",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope type 'yarn' is not supported; use default, linear",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "no 'factor'"),
        (
            {"rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "low_freq_factor"}},
            "no 'low_freq_factor'",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}},
            "llama config, rope has keys .* beta=1",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_interleaved": True}, "rope_interleaved=True is not supported"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types=.* is not supported"),
        ({"hidden_act": "relu"}, "hidden_activation"),
        ({"hidden_size": None}, "llama config has no 'hidden_size', which is required"),
    ],
)
def test_what_would_change_the_numbers_is_refused(changes: dict[str, Any], reason: str) -> None:
    config = {**COMMON, "model_type": "llama"}
    read(config)
    with pytest.raises(ValueError, match=reason):
        read(config | changes)
