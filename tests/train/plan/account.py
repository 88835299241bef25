"""What PyTorch really keeps and holds, and a script that prints it beside the plan's account:

python -m tests.train.plan.account [--precision bfloat16] [--checkpointing full] [--layout merged] [--gemma]
"""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations made since the mode began, now and at the highest.

    Exact and the same each time, unlike the size of the process; what a kernel allocates inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor that was there before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self._known.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out


def kept_bytes(model: nn.Module, forward: Callable[[], Any]) -> dict[str, int]:
    """Bytes that autograd keeps of a forward pass, by the kind of sub-layer that saved them first.

    Parameters are left out, and so are casts of weights, which the plan counts apart.
    """
    names = {module: name for name, module in model.named_modules()}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    weight_shapes = {tuple(p.shape) for p in model.parameters()}
    inside: list[str] = [""]
    held: dict[int, tuple[str, weakref.ref[Any]]] = {}  # by storage; gone with what nothing hangs on any more

    def enter(module: nn.Module, _: Any) -> None:
        inside.append(names[module])

    def leave(*_: Any) -> None:
        inside.pop()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        is_weight = tuple(tensor.shape) in weight_shapes or tuple(reversed(tensor.shape)) in weight_shapes
        if key not in held and key not in weights and not is_weight:
            held[key] = _kind(inside[-1]), weakref.ref(storage, lambda _: held.pop(key, None))
        return tensor.detach()  # the tensor itself would hold the graph it is part of

    hooks = [module.register_forward_pre_hook(enter) for module in names]
    hooks += [module.register_forward_hook(leave) for module in names]
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            out = forward()
    finally:
        for hook in hooks:
            hook.remove()
    kept: Counter[str] = Counter()
    for kind, storage in held.values():
        kept[kind] += storage().nbytes()  # type: ignore[union-attr]
    held.clear()
    del out
    return dict(kept)


def _kind(module: str) -> str:
    found = re.match(
        r"model\.(encoder|decoder)\.layers\.\d+\.(?:pre_|post_)?(\w+?)(?:_layernorm)?(?:\.|$)", module
    )
    if found is None:
        return "outside_blocks"
    part = {"self_attn": "self_attention", "cross_attn": "cross_attention"}.get(found[2], "mlp")
    return f"{found[1]}_{part}"
