"""AdamW over the right groups, and which parameters train in which phase."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import AdamW

from twofold.config.recipe import OptimizerConfig
from twofold.models import EncoderDecoder


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with `requires_grad`, by name; shared ones once, under their first name.

    Raises:
        ValueError: there are none, or some are not float32.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            "no parameter of the model has requires_grad, so there is nothing to train; unfreeze some"
        )
    wrong = [f"{name} ({p.dtype})" for name, p in parameters.items() if p.dtype != torch.float32]
    if wrong:
        raise ValueError(
            f"master weights are kept in float32, but {len(wrong)} parameters are not, the first is "
            f"{wrong[0]}; load the model with dtype=torch.float32, and choose precision='bfloat16' to "
            "compute in bfloat16"
        )
    return parameters


def parameter_groups(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], weight_decay: float
) -> list[dict[str, object]]:
    """Two groups: matrices, which are decayed, and all others (embeddings, norms, biases), which are not.

    An LM head tied to an embedding is an embedding; one of its own is a matrix.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in parameters.values():
        is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
        (decayed if is_matrix else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def new_optimizer(model: nn.Module, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> AdamW:
    """AdamW for these parameters, in its fused form: one pass over weights, gradients and moments."""
    groups = parameter_groups(model, parameters, config.weight_decay)
    return AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def cross_attention_names(model: EncoderDecoder, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """The parameters of cross-attention and its norms, which train alone in the first phase.

    Raises:
        ValueError: the layout has no cross-attention sub-layer.
    """
    names = {name for name in parameters if "cross_attn" in name}
    if not names:
        raise ValueError(
            "cross_attention_warmup_steps trains cross-attention alone, but this model (layout "
            f"{model.config.layout!r}) has no cross-attention parameters to train; set "
            "cross_attention_warmup_steps=0"
        )
    return names


def set_phase(parameters: Mapping[str, nn.Parameter], training: set[str]) -> None:
    """Let only the parameters named in `training` get gradients.

    AdamW passes over a parameter without gradient: no update, no decay, no moments. Its bias correction
    therefore begins when the parameter does.
    """
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in training)
        if name not in training:
            parameter.grad = None
