"""What is done to the blocks of a model before it trains: activation checkpointing, compilation.

Both replace the `forward` of a block and nothing else, so that names, hooks and checkpoints stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from twofold.models import EncoderModel
from twofold.models.stack import Block

ActivationCheckpointing = Literal["none", "selective", "full"]

_aten = torch.ops.aten
KEPT_OPERATIONS = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.linear.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.higher_order.flex_attention,
    }
)
"""Whose results `selective` keeps: they hold nearly all the arithmetic. Norms, activations, rotations and casts
are done again, and so are batched products, which are attention's scores where no fused kernel makes them."""


def blocks_of(model: EncoderModel) -> list[Block]:
    """The encoder's blocks, then the decoder's, where there is one."""
    return [module for module in model.modules() if isinstance(module, Block)]


def checkpoint_activations(model: EncoderModel, mode: ActivationCheckpointing) -> None:
    """Compute activations of blocks again in the backward pass instead of keeping them; results stay equal.

    Args:
        mode: see `TrainSettings.activation_checkpointing`.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in blocks_of(model):
        _replace_forward(block, partial(_checkpointed, block.forward, options))


def compile_blocks(model: EncoderModel) -> None:
    """Compile every block for itself: all blocks of a stack share their code, so it is compiled once for each."""
    for block in blocks_of(model):
        _replace_forward(block, torch.compile(block.forward, dynamic=True))


def restore_blocks(model: EncoderModel) -> None:
    """Undo both."""
    for block in blocks_of(model):
        block.__dict__.pop("forward", None)


def _replace_forward(block: nn.Module, forward: Callable[..., Any]) -> None:
    block.__dict__["forward"] = forward


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any], *arguments: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments)
    return checkpoint(forward, *arguments, **options)


def _policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    kept = operation in KEPT_OPERATIONS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
