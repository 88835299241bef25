"""What a device can do at best: figures of datasheets, or measured on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True, kw_only=True)
class Device:
    """Rates at best; a run reaches a share of them."""

    name: str
    memory_bytes: int
    bfloat16_flops_per_s: float | None
    """Dense products, without sparsity. None: not known, so that no time is predicted."""
    float32_flops_per_s: float | None
    """Outside the tensor cores, as PyTorch multiplies float32 unless TF32 is allowed."""
    memory_bytes_per_s: float | None
    link_bytes_per_s: float | None
    """To the other devices of its machine, one direction. None: it has none, or shares this one's memory."""
    is_cpu: bool = False


def _gpu(
    name: str, gigabytes: float, bfloat16: float, float32: float, bandwidth: float, link: float
) -> Device:
    """GB, TFLOP/s, TFLOP/s, GB/s, GB/s; as vendors count, 1 GB is 1e9 bytes."""
    return Device(
        name=name,
        memory_bytes=round(gigabytes * 1e9),
        bfloat16_flops_per_s=bfloat16 * 1e12,
        float32_flops_per_s=float32 * 1e12,
        memory_bytes_per_s=bandwidth * 1e9,
        link_bytes_per_s=link * 1e9,
    )


# NVIDIA prints bfloat16 with sparsity for all but A100 and RTX 4090: half of that is here. NVLink and PCIe are printed
# for both directions together: half of that is here.
DEVICES = {
    # "NVIDIA A100 Tensor Core GPU" datasheet, SXM: 312 TFLOP/s dense, 19.5, 1,555 and 2,039 GB/s, NVLink 600 GB/s
    "a100-40gb": _gpu("NVIDIA A100 SXM 40 GB", 40, 312, 19.5, 1555, 300),
    "a100": _gpu("NVIDIA A100 SXM 80 GB", 80, 312, 19.5, 2039, 300),
    # "NVIDIA H100 Tensor Core GPU" datasheet, SXM: 1,979 TFLOP/s sparse, 67, 3.35 TB/s, NVLink 900 GB/s
    "h100": _gpu("NVIDIA H100 SXM 80 GB", 80, 989.5, 67, 3350, 450),
    # "NVIDIA H200 Tensor Core GPU" datasheet, SXM: 141 GB, 1,979 TFLOP/s sparse, 67, 4.8 TB/s, NVLink 900 GB/s
    "h200": _gpu("NVIDIA H200 SXM 141 GB", 141, 989.5, 67, 4800, 450),
    # "NVIDIA HGX B200" (8 GPUs): 1.44 TB, 36 PFLOP/s sparse, 600 TFLOP/s float32; 8 TB/s and NVLink 1.8 TB/s a GPU
    "b200": _gpu("NVIDIA B200 180 GB", 180, 2250, 75, 8000, 900),
    # "NVIDIA L4 Tensor Core GPU" datasheet: 24 GB, 242 TFLOP/s sparse, 30.3, 300 GB/s, PCIe 4 x16 64 GB/s
    "l4": _gpu("NVIDIA L4 24 GB", 24, 121, 30.3, 300, 32),
    # "NVIDIA L40S" datasheet: 48 GB, 733 TFLOP/s sparse, 91.6, 864 GB/s, PCIe 4 x16 64 GB/s
    "l40s": _gpu("NVIDIA L40S 48 GB", 48, 366.5, 91.6, 864, 32),
    # "NVIDIA Ada GPU architecture" whitepaper, appendix A, RTX 4090: 165.2 dense with float32 sums, 82.6, 1,008 GB/s
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090 24 GB", 24, 165.2, 82.6, 1008, 32),
}
NAMES = (*DEVICES, "cpu")


def find_device(name: str, *, measure: bool = False) -> Device:
    """A device by its short name.

    Args:
        name: one of `NAMES`.
        measure: take rates from this machine instead of a table; for a GPU it must be the one that is here.

    Raises:
        ValueError: an unknown name, or a GPU to measure that this machine does not have.
    """
    if name not in NAMES:
        raise ValueError(f"unknown device {name!r}; use one of {', '.join(NAMES)}")
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        cpu = Device(
            name="this machine's CPU",
            memory_bytes=memory,
            bfloat16_flops_per_s=None,
            float32_flops_per_s=None,
            memory_bytes_per_s=None,
            link_bytes_per_s=None,
            is_cpu=True,
        )
        return measured(cpu) if measure else cpu
    if measure and not torch.cuda.is_available():
        raise ValueError(
            f"cannot measure {name!r}: PyTorch finds no CUDA device here; leave out --measure to use its "
            "datasheet, or plan for --gpu cpu"
        )
    return measured(DEVICES[name]) if measure else DEVICES[name]


def measured(device: Device) -> Device:
    """The same with rates of this machine, in about two seconds: a square product in both dtypes, and a copy."""
    place = torch.device("cpu" if device.is_cpu else "cuda")
    size = 1024 if device.is_cpu else 8192
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=place, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        rates[dtype] = 2 * size**3 / _seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), place)  # type: ignore[misc]
    here = torch.ones(2**26, device=place)  # 256 MiB: beyond caches
    there = torch.empty_like(here)
    copied = 2 * here.numel() * here.element_size() / _seconds(lambda: there.copy_(here), place)
    return Device(
        name=f"{device.name}, measured" if device.is_cpu else f"{torch.cuda.get_device_name()}, measured",
        memory_bytes=device.memory_bytes if device.is_cpu else torch.cuda.mem_get_info()[1],
        bfloat16_flops_per_s=rates[torch.bfloat16],
        float32_flops_per_s=rates[torch.float32],
        memory_bytes_per_s=copied,
        link_bytes_per_s=device.link_bytes_per_s,
        is_cpu=device.is_cpu,
    )


def _seconds(work: Callable[[], object], place: torch.device) -> float:
    """Median seconds of one call, over at least 5 calls and 0.3 seconds."""

    def wait() -> None:
        if place.type == "cuda":
            torch.cuda.synchronize()

    work()
    wait()
    times: list[float] = []
    while len(times) < 5 or sum(times) < 0.3:
        started = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - started)
    return median(times)
