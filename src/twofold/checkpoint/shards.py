"""Tensors of a training checkpoint: safetensors files by rank, each with some rows of the tensors.

PyTorch's distributed checkpoints in safetensors form (`torch.distributed.checkpoint.HuggingFaceStorageWriter`) name
them shard-RRRRR-model-NNNNN-of-NNNNN.safetensors; where a part begins in the whole tensor stands in the file's
metadata, key DCP_SHARDING_INFO, as `saved_offsets`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from twofold.checkpoint.tensors import TensorSource, read_safetensors_header

PATTERN = "shard-*.safetensors"


@dataclass(frozen=True, slots=True)
class _Part:
    file: Path
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class ShardsSource(TensorSource):
    """A folder of such files, read as whole tensors.

    Args:
        folder: holds the files of all ranks.

    Raises:
        FileNotFoundError: no such file in the folder.
        ValueError: a file is truncated, or says nothing about its parts, or parts are missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.description = str(folder)
        self._parts: dict[str, list[_Part]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        files = sorted(Path(folder).glob(PATTERN))
        if not files:
            raise FileNotFoundError(f"{folder} has no {PATTERN}")
        for file in files:
            self._add(file)
        self._shapes = {
            name: tuple(max(ends) for ends in zip(*(_ends(part) for part in parts), strict=True))
            for name, parts in self._parts.items()
        }
        for name, parts in self._parts.items():
            there = sum(torch.Size(part.shape).numel() for part in parts)
            if there != torch.Size(self._shapes[name]).numel():
                raise ValueError(f"{folder}: parts of {name} are missing; copy the files of all ranks there")

    def names(self) -> list[str]:
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def get(self, name: str) -> Tensor:
        tensor = torch.empty(self._shapes[name], dtype=self._dtypes[name])
        for part in self._parts[name]:
            with safe_open(part.file, framework="pt", device="cpu") as file:
                place = tuple(
                    slice(start, start + size) for start, size in zip(part.offsets, part.shape, strict=True)
                )
                tensor[place] = file.get_tensor(name)
        return tensor

    def _add(self, path: Path) -> None:
        entries = read_safetensors_header(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        try:
            info = json.loads(metadata["DCP_SHARDING_INFO"])
            parts = {
                name: _Part(path, tuple(info[name]["saved_offsets"]), shape)
                for name, (shape, _) in entries.items()
            }
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} does not say which rows it holds ({error}); copy it again") from error
        for name, part in parts.items():
            self._parts.setdefault(name, []).append(part)
            self._dtypes[name] = entries[name][1]


def _ends(part: _Part) -> tuple[int, ...]:
    return tuple(start + size for start, size in zip(part.offsets, part.shape, strict=True))
