import pytest
import torch

from tests.train.tiny_run import tiny_model
from twofold.config.recipe import OptimizerConfig
from twofold.train.optimizer import (
    cross_attention_names,
    new_optimizer,
    set_phase,
    trainable_parameters,
)


def groups(model):
    parameters = trainable_parameters(model)
    optimizer = new_optimizer(model, parameters, OptimizerConfig(learning_rate=0.5, weight_decay=0.25))
    names = {id(p): name for name, p in parameters.items()}
    return [({names[id(p)] for p in g["params"]}, g["weight_decay"]) for g in optimizer.param_groups]


def test_only_matrices_are_decayed():
    model = tiny_model()
    (decayed, decay), (others, none) = groups(model)
    assert (decay, none) == (0.25, 0.0)
    assert "model.encoder.layers.0.self_attn.q_proj.weight" in decayed
    assert "model.decoder.layers.1.mlp.down_proj.weight" in decayed
    assert all(name.endswith("_proj.weight") for name in decayed)
    assert {"model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"} <= others
    assert "model.encoder.norm.weight" in others
    assert "model.decoder.layers.0.pre_cross_attn_layernorm.weight" in others
    assert decayed | others == {name for name, _ in model.named_parameters()}


def test_an_lm_head_of_its_own_is_a_matrix():
    (decayed, _), _ = groups(tiny_model(tie_word_embeddings="none"))
    assert "lm_head.out_proj.weight" in decayed


def test_frozen_parameters_stay_out():
    model = tiny_model()
    model.encoder.requires_grad_(False)
    names = set().union(*(names for names, _ in groups(model)))
    assert names == {name for name, _ in model.named_parameters() if not name.startswith("model.encoder")}


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="requires_grad"):
        trainable_parameters(tiny_model().requires_grad_(False))


def test_master_weights_must_be_float32():
    with pytest.raises(ValueError, match=r"dtype=torch.float32"):
        trainable_parameters(tiny_model().to(torch.bfloat16))


def test_cross_attention_and_its_norms_are_the_first_phase():
    model = tiny_model()
    parameters = trainable_parameters(model)
    names = cross_attention_names(model, parameters)
    per_layer = ["cross_attn.q_proj", "cross_attn.k_proj", "cross_attn.v_proj", "cross_attn.o_proj"]
    per_layer += ["pre_cross_attn_layernorm"]
    assert names == {f"model.decoder.layers.{i}.{part}.weight" for i in range(2) for part in per_layer}
    set_phase(parameters, names)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names
    set_phase(parameters, set(parameters))
    assert all(p.requires_grad for p in model.parameters())


def test_a_merged_layout_has_no_cross_attention_to_train_alone():
    model = tiny_model(layout="merged")
    with pytest.raises(ValueError, match="merged"):
        cross_attention_names(model, trainable_parameters(model))
