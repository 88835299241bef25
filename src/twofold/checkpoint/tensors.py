"""Where tensors come from: one interface, and safetensors folders behind it.

A source knows every tensor's name, shape and dtype without reading any data, and hands out one tensor at a
time, so that a model is read in the memory of its largest tensor. Pickle files are refused and never opened.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors import safe_open
from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in a safetensors header (safetensors format specification)."""


class TensorSource(Protocol):
    """Named tensors on the CPU, read one at a time. A context manager; sources subclass this explicitly."""

    description: str
    """Where the tensors come from, for messages: usually a path."""

    def names(self) -> list[str]:
        """Every tensor's name, in the order of the file."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it. KeyError: there is no such tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Dtype `get` will return, without reading the tensor. KeyError: there is no such tensor."""
        ...

    def get(self, name: str) -> Tensor:
        """One tensor on the CPU; drop it before the next to keep memory low. KeyError: no such tensor."""
        ...

    def close(self) -> None:
        """Releases what the source holds. The sources of this package hold nothing open between calls."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class DictSource(TensorSource):
    """Tensors that are already in memory, for example a model's `state_dict()`."""

    def __init__(self, tensors: Mapping[str, Tensor], description: str = "tensors in memory") -> None:
        self.description = description
        self._tensors = dict(tensors)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def get(self, name: str) -> Tensor:
        return self._tensors[name].detach().cpu()


class SafetensorsSource(TensorSource):
    """A safetensors file, or a model folder with one `model.safetensors` or with shards and an index.

    Tensors are memory-mapped (copy on write: changing one in place does not change the file). The mapping
    belongs to the tensor, not to the source: `safe_open` maps a whole file, and pages once touched stay in
    the resident set until the handle and every tensor of it are gone, so a handle kept open would add the
    whole file to it. Measured, 1 GiB file of 16 tensors of 64 MiB, each summed and dropped: 1029 MiB above
    the start with one handle, 66 MiB with one handle per tensor, which is what `get` does (0.4 ms a tensor in
    a file of 300).

    Args:
        path: a `.safetensors` file or a model folder. Where a folder has both one file and an index, the one
            file is read, as `transformers` does.

    Raises:
        FileNotFoundError: nothing there to read, only pickle files, or a shard the index names is missing.
        ValueError: a file is truncated or not safetensors; the index names a tensor its shard does not have.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.description = str(path)
        self._entries: dict[str, tuple[Path, tuple[int, ...], torch.dtype]] = {}
        if path.is_file():
            self._add_file(path)
        elif (path / SINGLE_FILE).is_file():
            self._add_file(path / SINGLE_FILE)
        elif (path / INDEX_FILE).is_file():
            self._add_shards(path / INDEX_FILE)
        else:
            raise FileNotFoundError(_nothing_to_read(path))

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1]

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name][2]

    def get(self, name: str) -> Tensor:
        with safe_open(self._entries[name][0], framework="pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _add_file(self, path: Path) -> set[str]:
        if path.suffix in PICKLE_SUFFIXES:
            raise ValueError(_pickle_refused([path]))
        entries = {name: (path, *entry) for name, entry in read_safetensors_header(path).items()}
        if twice := sorted(self._entries.keys() & entries.keys()):
            other = self._entries[twice[0]][0].name
            raise ValueError(
                f"tensor {twice[0]!r} is in two shards of {path.parent}: {other} and {path.name}; which one "
                "counts is unclear, so save or download the model again"
            )
        self._entries |= entries
        return set(entries)

    def _add_shards(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no 'weight_map' from tensor names to files; download it again")
        for shard in dict.fromkeys(weight_map.values()):
            if Path(shard).name != shard or shard in ("", ".", ".."):
                raise ValueError(
                    f"{index} names the shard {shard!r}; a shard must be a file name in the same folder"
                )
            if not (index.parent / shard).is_file():
                raise FileNotFoundError(
                    f"{index} names the shard {shard}, which is not in the folder; download or copy it there"
                )
            present = self._add_file(index.parent / shard)
            if absent := [name for name, file in weight_map.items() if file == shard and name not in present]:
                raise ValueError(
                    f"{index} says that {shard} has {len(absent)} tensors it does not have, the first is "
                    f"{absent[0]!r}; index and shards are of different models: download both again"
                )


def read_safetensors_header(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor in a safetensors file, in the order of the data; reads the header only.

    Layout (safetensors format specification): uint64 header length, JSON header, data without gaps.

    Raises:
        ValueError: the file is shorter or longer than its header says, or no safetensors file at all.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header_bytes = int.from_bytes(start, "little")
        if start == b"version ":
            raise ValueError(
                f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
            )
        if len(start) < 8 or header_bytes > size - 8:
            raise ValueError(
                f"{path} has {size} bytes, too few for the header a safetensors file starts with; it is "
                "truncated or no safetensors file: download it again"
            )
        raw = file.read(header_bytes)
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        entries = {
            name: (tuple(int(n) for n in entry["shape"]), SAFETENSORS_DTYPES[entry["dtype"]])
            for name, entry in ordered
        }
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} has no readable safetensors header ({type(error).__name__}: {error}); known dtypes are "
            f"{', '.join(SAFETENSORS_DTYPES)}; download the file again or convert it to one of them"
        ) from error
    if 8 + header_bytes + end != size:
        raise ValueError(
            f"{path} has {size} bytes, its header says {8 + header_bytes + end}; the download or copy is "
            "incomplete or was overwritten: fetch the file again"
        )
    return entries


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError: it is not valid JSON or not an object, with the file's name."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); repair it or download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _nothing_to_read(path: Path) -> str:
    if not path.exists():
        return f"no such file or folder: {path}"
    files = sorted(path.iterdir())
    if pickles := [file for file in files if file.suffix in PICKLE_SUFFIXES]:
        return _pickle_refused(pickles)
    others = [file.name for file in files if file.suffix in (".safetensors", ".gguf")]
    hint = f"; there is {', '.join(others)}: give the path of that file" if others else ""
    return f"{os.fspath(path)} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}"


def _pickle_refused(files: list[Path]) -> str:
    return (
        f"{files[0].parent} holds weights as pickle files only ({', '.join(file.name for file in files)}); "
        "they can run code when opened and are never read: convert them to safetensors first, for example "
        "with transformers' save_pretrained on a machine you trust them on"
    )
