"""Writing model folders: safetensors tensor by tensor, and a folder that appears only when it is complete."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

from twofold.checkpoint.tensors import INDEX_FILE, SAFETENSORS_DTYPES, SINGLE_FILE

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

TensorPlan = tuple[str, tuple[int, ...], torch.dtype]
"""Name, shape and dtype of one tensor that will be written."""


class SafetensorsWriter:
    """Writes `model.safetensors`, or shards with an index, one tensor at a time.

    `safetensors.torch.save_file` takes a dictionary, so it wants all tensors of a file in memory at once. A
    safetensors header depends on names, shapes and dtypes alone, so with the plan known it goes first and
    each tensor is appended as it comes; memory stays at the one tensor (what is written lies in the page
    cache, which the kernel takes back).

    ```python
    with SafetensorsWriter(folder, plan) as writer:
        for name, _, _ in plan:
            writer.write(name, source.get(name))
    ```

    Leaving the block calls `finish`; leaving it by an exception only closes the files, what is there is
    incomplete (write inside `new_folder`, which removes it).

    Args:
        folder: an existing folder.
        plan: name, shape and dtype of every tensor, in the order they will be written. With mixed dtypes,
            wider ones first keep every tensor aligned: the format allows no gaps.
        max_shard_bytes: bytes of tensor data per file. A larger tensor gets a file of its own.

    Raises:
        ValueError: a name twice, a dtype safetensors lacks, or `max_shard_bytes` below 1.
        FileExistsError: a file that would be written is already there.
    """

    def __init__(
        self, folder: str | Path, plan: Sequence[TensorPlan], *, max_shard_bytes: int = 5_000_000_000
    ) -> None:
        if max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
        self._folder = Path(folder)
        self._plan = list(plan)
        _check_plan(self._plan)
        self._shards = _split(self._plan, max_shard_bytes)
        self._files = _shard_names(len(self._shards))
        self._written = 0
        self._finished = False
        self._file: BinaryIO | None = None
        self._starts: dict[
            int, tuple[str, list[TensorPlan]]
        ] = {}  # number of tensors already written -> the shard that starts there
        start = 0
        for file, shard in zip(self._files, self._shards, strict=True):
            self._starts[start] = (file, shard)
            start += len(shard)
        if not self._plan:
            self._open_shard()

    def write(self, name: str, tensor: Tensor) -> None:
        """Appends the next tensor of the plan.

        Args:
            name: must be the next name of the plan.
            tensor: of the planned shape and dtype, on any device; copied only if it is not contiguous on the
                CPU.

        Raises:
            ValueError: another name, shape or dtype than planned.
        """
        if self._written == len(self._plan):
            raise ValueError(
                f"all {len(self._plan)} planned tensors are written, {name!r} is not one of them"
            )
        planned_name, shape, dtype = self._plan[self._written]
        if name != planned_name:
            raise ValueError(
                f"the next tensor of the plan is {planned_name!r}, got {name!r}; write in the plan's order"
            )
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
            raise ValueError(
                f"{name!r} is planned as {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}; "
                "convert the tensor or correct the plan"
            )
        if self._written in self._starts:
            self._open_shard()
        assert self._file is not None
        # Bytes, because numpy has no bfloat16; flattened first, because a scalar cannot be viewed as bytes.
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.write(data.data)
        self._written += 1

    def finish(self) -> list[Path]:
        """Closes the files, flushed to the disk, and writes the index where there are shards.

        Called at the end of a `with` block; again it only returns the files.

        Returns:
            The files written, index last.

        Raises:
            ValueError: tensors of the plan were not written.
        """
        if missing := [name for name, _, _ in self._plan[self._written :]]:
            self._close_file()
            raise ValueError(
                f"{len(missing)} of {len(self._plan)} planned tensors were not written, the first is "
                f"{missing[0]!r}"
            )
        self._close_file()
        paths = [self._folder / file for file in self._files]
        if len(self._files) > 1 and not self._finished:
            weight_map = {
                name: file
                for file, shard in zip(self._files, self._shards, strict=True)
                for name, _, _ in shard
            }
            total_size = sum(_nbytes(tensor) for tensor in self._plan)
            index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
            with (self._folder / INDEX_FILE).open("x", encoding="utf-8") as file:
                json.dump(index, file, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
        if len(self._files) > 1:
            paths.append(self._folder / INDEX_FILE)
        self._finished = True
        return paths

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self._close_file()

    def _open_shard(self) -> None:
        self._close_file()
        file, shard = self._starts[self._written]
        self._file = (self._folder / file).open("xb")
        self._file.write(_header(shard))

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder that exists at `path` completely or not at all.

    Yields a temporary sibling, `.<name>.partial-xxxx`, and renames it to `path` when the block ends well. If
    it ends by any exception, Ctrl-C included, the sibling is removed and `path` is as it was.

    Args:
        path: where the folder will be; parents are created.
        overwrite: replace what is at `path`. The old folder goes only after the new one is complete.

    Raises:
        FileExistsError: `path` is a file, or a folder with something in it and `overwrite` is off.
    """
    target = Path(path).expanduser().resolve()
    _check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    partial = target.with_name(f".{target.name}.partial-{token}")
    partial.mkdir()
    try:
        yield partial
        _check_target(target, overwrite)  # again: it may have appeared meanwhile
        old = target.with_name(f".{target.name}.old-{token}")
        if target.exists():
            target.rename(old)
        try:
            partial.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if old.exists():
        shutil.rmtree(old)


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; give another output folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{target} exists and is not empty; give another output folder, remove it, or ask to overwrite it"
        )


def _check_plan(plan: list[TensorPlan]) -> None:
    seen: set[str] = set()
    for name, _, dtype in plan:
        if name in seen or name == "__metadata__":
            reason = "is in the plan twice" if name in seen else "is a reserved name"
            raise ValueError(f"tensor {name!r} {reason}; every tensor needs a name of its own")
        if dtype not in _DTYPE_NAMES:
            allowed = ", ".join(str(known) for known in _DTYPE_NAMES)
            raise ValueError(f"tensor {name!r} has dtype {dtype}, safetensors can hold {allowed}")
        seen.add(name)


def _nbytes(tensor: TensorPlan) -> int:
    _, shape, dtype = tensor
    return prod(shape) * dtype.itemsize


def _split(plan: list[TensorPlan], max_shard_bytes: int) -> list[list[TensorPlan]]:
    """Consecutive tensors per file, as many as fit; at least one."""
    shards: list[list[TensorPlan]] = [[]]
    shard_bytes = 0
    for tensor in plan:
        if shards[-1] and shard_bytes + _nbytes(tensor) > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(tensor)
        shard_bytes += _nbytes(tensor)
    return shards


def _shard_names(num_shards: int) -> list[str]:
    if num_shards == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{num_shards:05d}.safetensors" for number in range(1, num_shards + 1)]


def _header(shard: list[TensorPlan]) -> bytes:
    """Length and JSON header of one file, padded to 8 bytes with spaces (safetensors specification)."""
    # "format": transformers refuses a file without it.
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        name, shape, dtype = tensor
        end = offset + _nbytes(tensor)
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
