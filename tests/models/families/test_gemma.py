import json
from typing import Any

import pytest
import transformers

from tests.models.hf import (
    DONOR_CONFIGS,
    assert_causal_lm_is_donor,
    assert_names_go_there_and_back,
    donor,
    gemma3_config,
)
from twofold.config import RopeConfig
from twofold.models.families import DONORS, DonorConfig

NAMES = [name for name in DONOR_CONFIGS if name.startswith("gemma")]


def read(config: dict[str, Any]) -> DonorConfig:
    return DONORS[config["model_type"]].read_config(config)


def old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4.x wrote it."""
    old: dict[str, Any] = json.loads(json.dumps(config))
    rope = old.pop("rope_parameters")
    if old["model_type"] == "gemma2":
        old["rope_theta"] = rope["rope_theta"]
        old.pop("layer_types")
        old["hidden_act"] = "gelu_pytorch_tanh"
        old["cache_implementation"] = "hybrid"
    else:
        full = rope["full_attention"]
        old["rope_theta"] = full.pop("rope_theta")
        old["rope_scaling"] = full
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        old["sliding_window_pattern"] = 3
        old.pop("layer_types")
        old.pop("_sliding_window_pattern")
    old["torch_dtype"] = "bfloat16"
    old.pop("dtype")
    old["eos_token_id"] = [1, 5]
    return old


@pytest.mark.parametrize("name", NAMES)
def test_same_logits_as_transformers(name: str) -> None:
    model = donor(DONOR_CONFIGS[name])
    assert_causal_lm_is_donor(model)
    assert_causal_lm_is_donor(model, old_spelling(model.config.to_dict()))
    assert_names_go_there_and_back(model)


@pytest.mark.parametrize("name", NAMES)
def test_both_spellings_read_the_same(name: str) -> None:
    config = DONOR_CONFIGS[name].to_dict()
    new, old = read(config), read(old_spelling(config))
    assert new.stack == old.stack
    assert (new.eos_token_ids, old.eos_token_ids) == ((1,), (1, 5))


def test_gemma2_defaults() -> None:
    config = read({"model_type": "gemma2"})
    stack = config.stack
    assert stack.layer_types == ("sliding_attention", "full_attention") * 13
    assert (stack.attn_logit_softcapping, stack.final_logit_softcapping, stack.sliding_window) == (
        50.0,
        30.0,
        4096,
    )
    assert config.tie_word_embeddings
    assert stack == read(transformers.Gemma2Config().to_dict()).stack


def test_gemma3_defaults() -> None:
    stack = read({"model_type": "gemma3_text"}).stack
    assert (
        stack.layer_types
        == (("sliding_attention",) * 5 + ("full_attention",)) * 4 + ("sliding_attention",) * 2
    )
    assert (stack.attn_logit_softcapping, stack.final_logit_softcapping) == (None, None)
    assert stack.rope == {"sliding_attention": RopeConfig(theta=1e4), "full_attention": RopeConfig(theta=1e6)}
    assert stack == read(transformers.Gemma3TextConfig().to_dict()).stack


def test_pattern_that_transformers_keeps_beside_layer_types() -> None:
    """transformers 5 writes `sliding_window_pattern=3` as `_sliding_window_pattern` and as `layer_types`."""
    config = gemma3_config(layer_types=None, sliding_window_pattern=3).to_dict()
    assert config["_sliding_window_pattern"] == 3
    wanted = ("sliding_attention", "sliding_attention", "full_attention", "sliding_attention")
    assert read(config).stack.layer_types == wanted
    config.pop("layer_types")
    assert read(config).stack.layer_types == wanted


def test_null_cap_is_off_and_absent_cap_is_the_default() -> None:
    off = read(
        {"model_type": "gemma2", "attn_logit_softcapping": None, "final_logit_softcapping": None}
    ).stack
    assert (off.attn_logit_softcapping, off.final_logit_softcapping) == (None, None)
    own = read({"model_type": "gemma3_text", "attn_logit_softcapping": 7.0}).stack
    assert (own.attn_logit_softcapping, own.final_logit_softcapping) == (7.0, None)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mystery": 1}, "gemma(2|3_text) config has keys that twofold does not know: mystery=1"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ({"hidden_act": "silu"}, "hidden_act='silu' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 26 layers"),
    ],
)
def test_what_would_change_the_numbers_is_refused(
    model_type: str, changes: dict[str, Any], reason: str
) -> None:
    read({"model_type": model_type})
    with pytest.raises(ValueError, match=reason):
        read({"model_type": model_type} | changes)


def test_a_window_said_twice_must_agree() -> None:
    config = DONOR_CONFIGS["gemma2"].to_dict()
    assert read(config | {"sliding_window_size": config["sliding_window"]}) == read(config)
    with pytest.raises(ValueError, match="sliding_window_size=9 is not supported"):
        read(config | {"sliding_window_size": 9})
