"""How a model is spread over the ranks of a run, and how its tensors are seen from one of them."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from twofold.models import EncoderModel
from twofold.train.blocks import blocks_of
from twofold.train.world import World


def shard(
    module: nn.Module, model: EncoderModel, world: World, *, precision: Literal["float32", "bfloat16"]
) -> None:
    """Spread a model over the ranks, in place: FSDP2 on every block, and on the rest as the root.

    Each rank keeps its rows of every float32 parameter, gradient and moment; a block's parameters are gathered when
    it runs. Embeddings, final norms and head, also where they are tied, are in the root, whose forward is the whole
    loss. Gradients are summed over the ranks, not averaged: the loss is divided by the tokens of all.

    With precision 'bfloat16', blocks are gathered and multiplied in bfloat16, and gradients added up over the ranks in
    float32. Everything else is as under autocast on one device: the root stays float32, therefore so does the
    residual stream; norms and loss are computed in float32. The one difference is that weights of norms inside of
    blocks are rounded to bfloat16.

    Args:
        module: the root, with the model in it.
        model: on rank 0 with the weights that count; on the others it may be on the meta device. Rank 0 deals them
            out tensor by tensor, so that a run holds one whole copy and not one for each rank.
    """
    assert world.mesh is not None
    weights = {name: p.detach() for name, p in model.named_parameters()} if world.is_main else {}
    # Decoder blocks return views, and nothing here changes those in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    compute_dtype = torch.bfloat16 if precision == "bfloat16" else None
    # Blocks of tied stacks share their weights, which can be in one unit only: the root.
    blocks = [] if model.config.tie_stacks else blocks_of(model)
    for block in blocks:
        _materialise(block, world.device)
        policy = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    _materialise(model, world.device)
    model.tie_weights()
    fully_shard(
        module,
        mesh=world.mesh,
        mp_policy=MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False),
    )
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            # Without this the sum is asked for as a scaled sum, which gloo does not have.
            part.set_force_sum_reduction_for_comms(True)
    for name, parameter in model.named_parameters():
        _fill(parameter, weights.pop(name, None))


def _materialise(part: nn.Module, device: torch.device) -> None:
    """Memory for parameters on the meta device; what is in it comes later."""
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device=device)
                setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))


def _fill(parameter: nn.Parameter, whole: Tensor | None) -> None:
    """Deal out one tensor of rank 0, so that at most one is whole on the others at a time."""
    sharded = parameter.detach()
    assert isinstance(sharded, DTensor)
    device = sharded.to_local().device
    if whole is None:
        whole = torch.empty(sharded.shape, dtype=sharded.dtype, device=device)
    dealt = distribute_tensor(whole.to(device), sharded.device_mesh, sharded.placements)
    sharded.to_local().copy_(dealt.to_local())


def reduce_gradients(module: nn.Module, is_wanted: bool) -> None:
    """Whether the next backward pass adds up gradients over the ranks, or keeps them for a later one."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(is_wanted)
        module.set_is_last_backward(is_wanted)


def release(module: nn.Module) -> None:
    """Give back what a forward pass without a backward pass leaves gathered: the root's parameters.

    Until then the model has whole parameters there, and would not see which of the sharded ones are trained.
    """
    if isinstance(module, FSDPModule):
        module.reshard()


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from the ranks, all of which must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_host(tensor: Tensor, world: World) -> Tensor:
    """A copy in host memory that later steps do not change; of a sharded tensor, of this rank's part."""
    local = local_part(tensor).detach()
    copy = local.to("cpu", copy=True)
    if not isinstance(tensor, DTensor):
        return copy
    assert world.host_mesh is not None
    return DTensor.from_local(
        copy, world.host_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
