"""What PyTorch really keeps and holds, and a script that prints it beside the plan's account:

python -m tests.train.plan.account [--precision bfloat16] [--checkpointing full] [--layout merged] [--gemma]
"""

from __future__ import annotations

import argparse
import re
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from tests.models.tiny import gemma_stack, pair_config, stack
from twofold.config import EncoderDecoderConfig
from twofold.models import EncoderDecoder
from twofold.train.plan.memory import Setup, _Step, peak_memory


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


def step_peak(
    model: EncoderDecoder,
    rows: int,
    lengths: tuple[int, int],
    *,
    precision: str = "float32",
    accumulate: int = 1,
    checkpointing: str = "none",
) -> tuple[int, list[int]]:
    """Peak of live bytes over a training step that is not the first, and what was alive at its moments.

    Returns:
        The peak; and the bytes alive after the loss, after the backward pass, and between two steps.
    """
    from twofold.train.loss import chunked_loss

    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4)
    wrapped = checkpointed(model) if checkpointing == "full" else model
    vocab = model.config.decoder.vocab_size
    moments: list[int] = []
    with LiveBytes() as live:
        for parameter in model.parameters():
            live.add(parameter)
        for _ in range(2):
            live.peak = live.now
            moments.clear()
            for _ in range(accumulate):
                ids, targets = (torch.randint(3, vocab, (rows, n)) for n in lengths)
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                    own = torch.ones_like(targets)
                    states, _ = wrapped.decoder(targets, own, wrapped.encode(ids), is_plain=True)
                    loss = chunked_loss(
                        states.flatten(0, 1), targets.flatten(), model.lm_head.out_proj.weight,
                        softcap=model.config.decoder.final_logit_softcapping,
                    )  # fmt: skip
                del states
                moments.append(live.now)
                loss.backward()
                del loss
            moments.append(live.now)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            moments.append(live.now)
    return live.peak, moments


def checkpointed(model: EncoderDecoder) -> EncoderDecoder:
    """Every block computed again in its backward pass."""
    for block in (*model.encoder.layers, *model.decoder.layers):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return model


def main() -> None:
    """Print predicted and tracked bytes of one configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layout", choices=("separate", "merged"), default="separate")
    parser.add_argument("--reads", choices=("final", "aligned"), default="final")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--checkpointing", choices=("none", "full"), default="none")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs=2, default=(256, 128))
    parser.add_argument("--gemma", action="store_true")
    options = parser.parse_args()
    config = small(options.gemma, layout=options.layout, reads=options.reads)
    n, m = options.lengths
    setup = Setup(
        rows=options.rows, source_length=n, target_length=m, scored=options.rows * m, precision=options.precision,
        checkpointing=options.checkpointing, shards=1, accumulates=options.accumulate > 1, is_cpu=True,
    )  # fmt: skip
    predicted = peak_memory(config, setup)
    model = EncoderDecoder(config)
    model.initialise_randomly(0)
    peak, moments = step_peak(
        model.train(), options.rows, (n, m), precision=options.precision, accumulate=options.accumulate,
        checkpointing=options.checkpointing,
    )  # fmt: skip
    print(f"peak: predicted {predicted.total / 1e6:.1f} MB ({predicted.when}), tracked {peak / 1e6:.1f} MB")
    print(f"alive after each loss, the backward pass, the step: {[round(b / 1e6, 1) for b in moments]} MB")
    for name, size in predicted.parts().items():
        print(f"  {name:16} {size / 1e6:8.1f} MB predicted")
    for when in _Step(config, setup, "everything").moments():
        print(f"  {when.when:12} {when.total / 1e6:8.1f} MB")
    model = EncoderDecoder(config).train()
    model.initialise_randomly(0)
    ids, targets = (torch.randint(3, config.decoder.vocab_size, (options.rows, k)) for k in (n, m))

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
            return model.decoder(targets, torch.ones_like(targets), model.encode(ids), is_plain=True)[0]

    kept = kept_bytes(model, forward)
    plain = replace(setup, checkpointing="none")
    for kind, size in peak_memory(config, plain).kept.by_kind().items():
        print(
            f"  {kind:24} {size / 1e6:8.2f} MB predicted, {kept.get(kind, 0) / 1e6:8.2f} MB kept by autograd"
        )


def small(gemma: bool = False, vocab: int = 8192, width: int = 256, **meeting: Any) -> EncoderDecoderConfig:
    """A pair of 6 + 6 layers; of width 256 it has 15M parameters with its tables."""
    make = gemma_stack if gemma else stack
    settings: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "query_pre_attn_scalar": 64,
        "layer_types": ("full_attention",) * 6, "sliding_window": None, "max_position_embeddings": 4096,
    }  # fmt: skip
    if gemma:
        settings["attn_logit_softcapping"] = None
    return pair_config(make(**settings), **meeting, pad_token_id=None)


if __name__ == "__main__":
    main()
