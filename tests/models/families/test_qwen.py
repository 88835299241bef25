import json
from typing import Any

import pytest

from tests.models.hf import (
    COMMON,
    DONOR_CONFIGS,
    NO_HEAD_DIM,
    assert_causal_lm_is_donor,
    assert_names_go_there_and_back,
    donor,
)
from twofold.models.families import DONORS, DonorConfig

NAMES = [name for name in DONOR_CONFIGS if name.startswith("qwen")]


def read(config: dict[str, Any]) -> DonorConfig:
    return DONORS[config["model_type"]].read_config(config)


def old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4.x wrote it: with a window even where it is not used."""
    old: dict[str, Any] = json.loads(json.dumps(config))
    old["rope_theta"] = old.pop("rope_parameters")["rope_theta"]
    old["rope_scaling"] = None
    old["torch_dtype"] = "bfloat16"
    old.pop("dtype")
    old["eos_token_id"] = [1, 5]
    if not old["use_sliding_window"]:
        old["sliding_window"] = 3
    return old


@pytest.mark.parametrize("name", NAMES)
def test_same_logits_as_transformers(name: str) -> None:
    model = donor(DONOR_CONFIGS[name])
    assert_causal_lm_is_donor(model)
    assert_causal_lm_is_donor(model, old_spelling(model.config.to_dict()))
    assert_names_go_there_and_back(model)


def test_layers_from_max_window_layers_on_slide() -> None:
    config = old_spelling(DONOR_CONFIGS["qwen2-window"].to_dict())
    config.pop("layer_types")
    stack = read(config).stack
    assert stack.layer_types == ("full_attention", "full_attention", "sliding_attention", "sliding_attention")
    assert stack.sliding_window == 4
    model = donor(DONOR_CONFIGS["qwen2-window"])
    assert_causal_lm_is_donor(model, config)


def test_window_is_off_unless_used() -> None:
    config = {**NO_HEAD_DIM, "model_type": "qwen2", "sliding_window": 4, "max_window_layers": 0}
    stack = read(config).stack
    assert (set(stack.layer_types), stack.sliding_window) == ({"full_attention"}, None)


def test_biases_and_norms() -> None:
    qwen2 = read(DONOR_CONFIGS["qwen2"].to_dict()).stack
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, False, 8)
    qwen3 = read(DONOR_CONFIGS["qwen3"].to_dict()).stack
    assert (qwen3.qkv_bias, qwen3.output_bias, qwen3.qk_norm) == (False, False, True)
    biased = read(DONOR_CONFIGS["qwen3-bias-window"].to_dict()).stack
    assert (biased.qkv_bias, biased.output_bias) == (True, True)
    assert read({**NO_HEAD_DIM, "model_type": "qwen3"}).stack.head_dim == 128


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mystery": 1}, "qwen[23] config has keys that twofold does not know: mystery=1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
        ({"use_mrope": True}, "use_mrope=True is not supported"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ({"use_sliding_window": True, "max_window_layers": 0}, "sliding layers need a sliding_window"),
    ],
)
def test_what_would_change_the_numbers_is_refused(
    model_type: str, changes: dict[str, Any], reason: str
) -> None:
    config = {**(COMMON if model_type == "qwen3" else NO_HEAD_DIM), "model_type": model_type}
    read(config)
    with pytest.raises(ValueError, match=reason):
        read(config | changes)
