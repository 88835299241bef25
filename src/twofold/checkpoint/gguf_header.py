"""The header of a GGUF file: metadata, and where each tensor lies (GGUF specification, versions 2 and 3).

It is parsed here and not by `gguf.GGUFReader`, which makes numpy objects of every token and merge: for a
vocabulary of 49k (SmolLM2) that takes 3.2 s and 160 MiB, this 0.12 s and 12 MiB, and both grow with the
vocabulary.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

SUPPORTED_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")

# Value types of the metadata; struct letters of those of fixed size.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class StoredTensor(NamedTuple):
    """One tensor of the file: torch-order shape, ggml type number, byte offset in the file and bytes."""

    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    num_bytes: int


class GGUFHeader(NamedTuple):
    """Metadata (the architecture's keys are read with `get`) and where each tensor lies, by GGUF name."""

    path: Path
    architecture: str
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture; a list (one value per layer) must hold equal ones."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ValueError(
                    f"{self.path}: {self.architecture}.{key} differs from layer to layer ({value}); only "
                    "donors with equal layers can be read"
                )
            return value[0]
        return value

    def require(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ValueError(f"{self.path} lacks the key {self.architecture}.{key}; convert the model again")
        return value


class _Cursor:
    """Reads the little-endian values of a GGUF header one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.offset = 0

    def scalars(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self.data, self.offset)
        self.offset += struct.calcsize(f"<{form}")
        return values

    def scalar(self, form: str) -> Any:
        return self.scalars(form)[0]

    def string(self) -> str:
        raw: bytes = self.scalar(f"{self.scalar('Q')}s")
        return raw.decode("utf-8")

    def value(self) -> Any:
        return self._value(self.scalar("I"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        element, count = self.scalar("I"), self.scalar("Q")
        if element in _SCALARS:
            return list(self.scalars(f"{count}{_SCALARS[element]}"))
        return [self._value(element) for _ in range(count)]


def read_gguf_header(path: Path) -> GGUFHeader:
    """Metadata and tensor table of a GGUF file, checked against the file's size.

    Raises:
        ImportError: the package `gguf`, which knows the sizes of quantised blocks, is not installed.
        FileNotFoundError: there is no such file.
        ValueError: no GGUF file, truncated, one part of a split file, or of an unsupported architecture.
    """
    _import_gguf()
    if not path.is_file():
        raise FileNotFoundError(f"no such GGUF file: {path}")
    size = path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise ValueError(
                f"{path} is no GGUF file: it starts with {magic!r}, not b'GGUF'; give another file"
            )
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                metadata, tensors = _parse_header(_Cursor(data), path)
        except (struct.error, KeyError, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise ValueError(
                f"{path} has an unreadable GGUF header ({type(error).__name__}: {error}); the file is "
                "truncated or damaged: download it again"
            ) from error
    end = max((stored.offset + stored.num_bytes for stored in tensors.values()), default=0)
    if end > size:
        raise ValueError(
            f"{path} has {size} bytes, its tensors need {end}; it is truncated: download it again"
        )
    architecture = metadata.get("general.architecture")
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"{path} has the architecture {architecture!r}; supported are "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}: take a donor of one of these"
        )
    return GGUFHeader(path, architecture, metadata, tensors)


def _parse_header(cursor: _Cursor, path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    from gguf.constants import GGML_QUANT_SIZES

    _magic, version = cursor.scalars("2I")
    if version not in (2, 3):
        raise ValueError(
            f"{path} has GGUF version {version}; little-endian files of version 2 and 3 can be read"
        )
    num_tensors, num_keys = cursor.scalars("2Q")
    metadata = {}
    for _ in range(num_keys):
        key = cursor.string()
        metadata[key] = cursor.value()
    if (num_files := metadata.get("split.count", 1)) > 1:
        raise ValueError(
            f"{path} is one of {num_files} parts; merge them first: llama-gguf-split --merge FIRST OUT"
        )
    table = {}
    for _ in range(num_tensors):
        name = cursor.string()
        dimensions = cursor.scalars(f"{cursor.scalar('I')}Q")
        table[name] = (dimensions[::-1], *cursor.scalars("IQ"))  # GGUF counts dimensions from the innermost
    alignment = metadata.get("general.alignment", 32)
    data_start = -(-cursor.offset // alignment) * alignment
    tensors = {}
    for name, (shape, ggml_type, offset) in table.items():
        block_size, block_bytes = GGML_QUANT_SIZES[ggml_type]
        num_bytes = math.prod(shape) // block_size * block_bytes
        tensors[name] = StoredTensor(shape, ggml_type, data_start + offset, num_bytes)
    return metadata, tensors


def _import_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError('reading GGUF files needs the package gguf: pip install "twofold[gguf]"') from error
