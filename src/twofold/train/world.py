"""The processes of a run: who they are, and what they agree on.

`torchrun` starts them and says in the environment who each one is; without it there is one process, and nothing here
needs a process group. Agreement (stop, failures, counts of tokens, states of loaders) goes over gloo on the host, so
that it never waits for a device; losses and gradients travel between the devices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from twofold.config.recipe import TrainSettings

T = TypeVar("T")


class OtherRankError(RuntimeError):
    """This rank stops because another one failed; the reason stands in that rank's message."""


@dataclass(frozen=True, slots=True)
class World:
    """One process's view of all processes of a run. The default is a run of one process on the CPU."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Of this rank."""

    mesh: DeviceMesh | None = None
    """Of the devices: (shard,) or, with replicas, (replicate, shard). None: one process."""

    host_mesh: DeviceMesh | None = None
    """The same for tensors on the host."""

    host_group: dist.ProcessGroup | None = None
    """gloo, for what the ranks agree on."""

    writer_group: dist.ProcessGroup | None = None
    """gloo, for the thread that writes checkpoints."""

    @property
    def replicas(self) -> int:
        """Groups of ranks that hold the whole model each."""
        return self.mesh.size(0) if self.mesh is not None and self.mesh.ndim == 2 else 1

    @property
    def is_main(self) -> bool:
        """Rank 0 prints, tracks, and writes what all share."""
        return self.rank == 0

    def streams(self, count: int) -> tuple[int, ...]:
        """The numbers of this rank's streams, of the `count` that a step takes one batch from each."""
        return tuple(range(self.rank, count, self.size))

    def sum_(self, values: Tensor) -> Tensor:
        """Add up over the ranks, in place. Over the devices for tensors there, else over the host."""
        if self.size > 1:
            dist.all_reduce(values, group=self.host_group if values.device.type == "cpu" else None)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank."""
        return [count > 0 for count in self.sum_(torch.tensor(flags, dtype=torch.int64)).tolist()]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, on every rank.

        Raises:
            OtherRankError: it failed there; rank 0 itself raises the error.
        """
        if self.size == 1:
            return make()
        content: list[Any] = [None]
        error: Exception | None = None
        if self.is_main:
            try:
                content = [(make(),)]
            except Exception as raised:
                error = raised
        dist.broadcast_object_list(content, src=0, group=self.host_group)
        if error is not None:
            raise error
        if content[0] is None:
            raise OtherRankError(f"rank {self.rank} stopped because rank 0 failed")
        made: T = content[0][0]
        return made

    def check_batches(self, accumulate_batches: int) -> None:
        """Refuse a number of batches per step that the ranks cannot share equally."""
        if accumulate_batches % self.size:
            nearest = -(-accumulate_batches // self.size) * self.size
            raise ValueError(
                f"accumulate_batches counts the batches of a step over all ranks, and {accumulate_batches} cannot be "
                f"dealt out to {self.size} ranks equally; set it to a multiple of {self.size} (such as {nearest}), or "
                "start another number of ranks"
            )


ONE_PROCESS = World()
"""On the CPU; a step does not ask it for the device."""


@contextmanager
def start_world(settings: TrainSettings) -> Iterator[World]:
    """Join the other processes that `torchrun` started; alone, where it did not.

    Raises:
        OtherRankError: a collective failed because another rank is lost.
        ValueError: device, replicas and batches of the settings do not fit the number of processes.
    """
    size, rank, local_rank = (int(os.environ.get(n, d)) for n, d in _ENVIRONMENT)
    replicas = settings.data_parallel_replicas
    if size % replicas:
        raise ValueError(
            f"data_parallel_replicas is {replicas}, which does not divide the {size} processes of the run; set it to "
            "the number of nodes, or to 1"
        )
    World(rank=rank, size=size).check_batches(settings.accumulate_batches)
    device = device_of(settings, local_rank)
    if size == 1:
        yield World(device=device)
        return
    try:
        yield _join(settings, rank, size, device)
    except RuntimeError as error:
        if is_lost_rank(error):
            raise OtherRankError(
                f"rank {rank} stopped, because another rank failed or does not answer"
            ) from None
        raise
    # Not after an error: it would wait for ranks that no longer answer, and the process is about to end.
    dist.destroy_process_group()


def _join(settings: TrainSettings, rank: int, size: int, device: torch.device) -> World:
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
        timeout=timedelta(seconds=settings.collective_timeout_s),
        device_id=device if is_cuda else None,
    )
    replicas = settings.data_parallel_replicas
    shape = (size,) if replicas == 1 else (replicas, size // replicas)
    names = ("shard",) if replicas == 1 else ("replicate", "shard")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    host_mesh = init_device_mesh("cpu", shape, mesh_dim_names=names) if is_cuda else mesh
    host_group, writer_group = (dist.new_group(backend="gloo") for _ in range(2))
    return World(rank, size, device, mesh, host_mesh, host_group, writer_group)


_ENVIRONMENT = (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))


def device_of(settings: TrainSettings, local_rank: int = 0) -> torch.device:
    """The device of the rank with this number on its machine.

    Raises:
        ValueError: CUDA is asked for and not there, or there are fewer devices than ranks.
    """
    num_devices = torch.cuda.device_count() if settings.device != "cpu" else 0
    if settings.device == "cuda" and not num_devices:
        raise ValueError("device is 'cuda', but PyTorch finds no CUDA device; set device to 'cpu' or 'auto'")
    if not num_devices:
        return torch.device("cpu")
    if local_rank >= num_devices:
        raise ValueError(
            f"there are {num_devices} CUDA devices on this machine and a process number {local_rank + 1}; start at "
            f"most {num_devices} processes on it (--nproc-per-node), or set device to 'cpu'"
        )
    return torch.device("cuda", local_rank)


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("gloo/" in text or "NCCL" in text or "ProcessGroup" in text)
