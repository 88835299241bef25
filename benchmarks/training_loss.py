"""Part b of the training benchmark: memory and time of the loss over a large vocabulary; see `training.py`.

N: target tokens. D: width of the decoder. V: vocabulary.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_ours import synchronise

SOFTCAP = 30.0

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_loss(states_ND: Tensor, labels_N: Tensor, weight_VD: Tensor) -> Tensor:
    """Head, float32 logits of all tokens, soft-cap, cross-entropy: what T5Gemma in transformers does."""
    logits_NV = F.linear(states_ND, weight_VD).float()
    logits_NV = SOFTCAP * torch.tanh(logits_NV / SOFTCAP)
    return F.cross_entropy(logits_NV, labels_N, reduction="sum")


def our_loss(states_ND: Tensor, labels_N: Tensor, weight_VD: Tensor) -> Tensor:
    """The same by `twofold.train.loss`."""
    from twofold.train.loss import chunked_loss

    return chunked_loss(states_ND, labels_N, weight_VD, softcap=SOFTCAP)


LOSSES: dict[str, Loss] = {"plain": plain_loss, "ours": our_loss}


class LiveBytes(TorchDispatchMode):
    """The storages that appear while it is on, when each came and when it went.

    Sees what goes through PyTorch's operators, in the backward pass too where that runs in the same thread (not
    on CUDA), but not what a kernel takes and gives back inside.
    """

    def __init__(self, known: list[Tensor]) -> None:
        """`known`: tensors that were there before."""
        super().__init__()
        self._known = {id(tensor.untyped_storage()) for tensor in known}
        self._live: set[int] = set()
        self._serial = 0
        self.events: list[tuple[int, int]] = []
        """(serial number of a storage, bytes), negative where it goes."""
        self.serials: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known or key in self._live:
            return
        serial, size = self._serial, storage.nbytes()
        self._serial += 1
        self._live.add(key)
        self.serials[storage] = serial
        self.events.append((serial, size))

        def gone() -> None:
            self._live.discard(key)
            self.events.append((serial, -size))

        weakref.finalize(storage, gone).atexit = False

    def peak(self, without: list[Tensor] = ()) -> int:  # type: ignore[assignment]
        """The most bytes alive at a time, some tensors not counted."""
        left_out = {self.serials.get(tensor.untyped_storage()) for tensor in without}
        live = highest = 0
        for serial, size in self.events:
            if serial not in left_out:
                live += size
                highest = max(highest, live)
        return highest


def inputs(num_tokens: int, width: int, vocab_size: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """States [N, D], labels [N] and the head [V, D], float32, with room for logits that reach the cap."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
    states_ND = torch.randn(num_tokens, width, device=device, generator=generator).requires_grad_()
    rows = torch.randn(min(vocab_size, 4096), width, device=device, generator=generator) * (10 / width**0.5)
    weight_VD = rows.repeat(-(-vocab_size // len(rows)), 1)[:vocab_size].clone().requires_grad_()
    labels_N = torch.randint(0, vocab_size, (num_tokens,), device=device, generator=generator)
    return states_ND, labels_N, weight_VD


def measure_memory(loss: Loss, num_tokens: int, width: int, vocab_size: int, device: str) -> dict[str, int]:
    """Forward and backward once.

    Returns:
        peak_bytes: above the inputs and weights. extra_bytes: also without the gradients of both.
    """
    states_ND, labels_N, weight_VD = inputs(num_tokens, width, vocab_size, device)
    if device == "cuda":  # the backward pass runs in another thread, the allocator sees it all
        synchronise()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss(states_ND, labels_N, weight_VD).backward()
        synchronise()
        peak = torch.cuda.max_memory_allocated() - before
        return {"peak_bytes": peak, "extra_bytes": peak - 4 * (states_ND.numel() + weight_VD.numel())}
    gc.collect()
    with LiveBytes([states_ND, labels_N, weight_VD]) as live:
        loss(states_ND, labels_N, weight_VD).backward()
    assert states_ND.grad is not None
    assert weight_VD.grad is not None
    return {"peak_bytes": live.peak(), "extra_bytes": live.peak([states_ND.grad, weight_VD.grad])}


def measure_resident(name: str, num_tokens: int, width: int, vocab_size: int) -> int:
    """How far this process's resident memory rises in one forward and backward pass, in bytes (Linux)."""
    tensors = inputs(num_tokens, width, vocab_size, "cpu")
    small = inputs(8, width, 512, "cpu")
    LOSSES[name](*small).backward()  # libraries load what they need
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    LOSSES[name](*tensors).backward()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def resident_apart(name: str, num_tokens: int, width: int, vocab_size: int) -> int | None:
    """`measure_resident` in a process of its own; None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    arguments = [name, str(num_tokens), str(width), str(vocab_size)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the loss {name!r} failed in a process of its own:\n{done.stderr[-2000:]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def measure_seconds(
    num_tokens: int, width: int, vocab_size: int, device: str, rounds: int
) -> dict[str, float]:
    """Shortest forward and backward pass of each, taken in turns; and the relative difference of the losses.

    Raises:
        RuntimeError: the two losses differ by more than rounding.
    """
    tensors = inputs(num_tokens, width, vocab_size, device)
    took: dict[str, list[float]] = {name: [] for name in LOSSES}
    values = {}
    for _ in range(rounds):
        for name, loss in LOSSES.items():
            for tensor in (tensors[0], tensors[2]):
                tensor.grad = None
            synchronise()
            started = time.perf_counter()
            value = loss(*tensors)
            value.backward()
            synchronise()
            took[name].append(time.perf_counter() - started)
            values[name] = value.item()
    difference = abs(values["ours"] - values["plain"]) / values["plain"]
    if difference > 1e-5:
        raise RuntimeError(f"the losses differ, so their costs cannot be compared: {values}")
    return {name: min(times) for name, times in took.items()} | {"loss_relative_difference": difference}


def loss_costs(*, quick: bool, device: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and details.

    The plain loss is measured on PyTorch's meta device, which allocates as a real one does but holds nothing, so
    that no 20 GB are needed; at a size that fits, the same count is compared with resident memory.
    """
    vocab_size = 256_000
    num_tokens = 1024 if quick else 4096
    fitting = 128 if quick else 1024
    widths = (192,) if quick else (768, 2304)
    cases = []
    for width in widths:
        size = (num_tokens, width, vocab_size)
        plain = measure_memory(plain_loss, *size, "cuda" if device == "cuda" else "meta")
        ours = measure_memory(our_loss, *size, device)
        times = measure_seconds(fitting, width, vocab_size, device, rounds=1 if quick else 3)
        case = {
            "tokens": num_tokens,
            "width": width,
            "vocab_size": vocab_size,
            "plain": plain,
            "ours": ours,
            "memory_over_plain": ours["extra_bytes"] / plain["extra_bytes"],
            "peak_over_plain": ours["peak_bytes"] / plain["peak_bytes"],
            "tokens_timed": fitting,
            "seconds": times,
            "time_over_plain": times["ours"] / times["plain"],
        }
        if device == "cpu" and not quick:
            check = (fitting, width, vocab_size)
            case["check"] = {
                name: {
                    "counted_bytes": measure_memory(loss, *check, "cpu")["peak_bytes"],
                    "resident_bytes": resident_apart(name, *check),
                }
                for name, loss in LOSSES.items()
            }
        cases.append(case)
        print(f"loss, width {width}: {case}", file=sys.stderr, flush=True)
    worst = max(cases, key=lambda case: case["memory_over_plain"])
    metrics = {
        "loss_memory_over_plain": worst["memory_over_plain"],
        "loss_peak_over_plain": worst["peak_over_plain"],
        "loss_memory_gb": worst["ours"]["extra_bytes"] / 1e9,
        "loss_time_over_plain": max(case["time_over_plain"] for case in cases),
    }
    return metrics, {"loss": cases}


if __name__ == "__main__":
    print(measure_resident(sys.argv[1], *map(int, sys.argv[2:])))
