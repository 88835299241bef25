"""The token store: a source tokenised once, on disk, and read through memory maps.

A folder of flat files, little-endian, described by header.json:

    tokens.bin    uint16 or uint32: all documents one after another; a supervised pair as source, decoder prefix
                  and target, stop token included
    offsets.bin   int64 [N + 1]: where each document starts, and the end
    hashes.bin    uint64 [N]: of the normalised text, to find copies
    parts.bin     int32 [N, 2], supervised only: tokens of source and of decoder prefix
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twofold.config.data import SourceConfig
from twofold.data.chat import ChatRefused, record_to_example
from twofold.data.convention import Convention
from twofold.data.sources import BadRecord, RawRecord, Record, parse_record
from twofold.data.tokenize import Tokenizer, encode

FORMAT_VERSION = 2
MAX_BAD_EXAMPLES = 5


@dataclass(slots=True)
class RecordCounts:
    """How the records of a source were read."""

    records: int = 0
    """Read, bad ones included."""

    bad: Counter[str] = field(default_factory=Counter)
    """Skipped ones by reason."""

    examples: list[str] = field(default_factory=list)
    """What was wrong with the first of them, with file and line."""

    def add(self, other: "RecordCounts") -> None:
        """Count the records of a later part of the source too."""
        self.records += other.records
        self.bad.update(other.bad)
        self.examples = (self.examples + other.examples)[:MAX_BAD_EXAMPLES]

    def refuse(self, error: BadRecord) -> None:
        """Count a bad record."""
        self.bad[error.reason] += 1
        if len(self.examples) < MAX_BAD_EXAMPLES:
            self.examples.append(str(error))

    @property
    def num_broken(self) -> int:
        """Bad records without the empty ones, which many clean corpora have."""
        return self.bad.total() - self.bad["empty text"]

    def summary(self) -> str:
        """One line, such as "3 of 100 records skipped (2 not JSON, 1 empty text); first: ..."."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.bad.items()))
        return (
            f"{self.bad.total():,} of {self.records:,} records skipped ({reasons}); first: "
            f"{'; '.join(self.examples)}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStore:
    """The documents of one source as token ids, in memory or mapped."""

    tokens: npt.NDArray[np.unsignedinteger[Any]]
    """uint16 or uint32 [total]."""

    offsets: npt.NDArray[np.int64]
    """[N + 1]."""

    hashes: npt.NDArray[np.uint64]
    """[N]."""

    parts: npt.NDArray[np.int32] | None
    """[N, 2]; None: running text."""

    counts: RecordCounts

    @property
    def num_documents(self) -> int:
        """Documents, without skipped records."""
        return len(self.hashes)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.offsets[-1])

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, int64 [N]."""
        return np.diff(self.offsets)

    def document(self, index: int) -> npt.NDArray[np.int64]:
        """The tokens of a document, int64 [length]."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int64)

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """Map a finished store.

        Raises:
            ValueError: another format version, or files that are not as long as the header says.
        """
        header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
        if header["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{folder} has format version {header['format_version']}, this program reads {FORMAT_VERSION}; "
                "remove the folder, it is made anew"
            )
        num_documents, num_tokens = header["num_documents"], header["num_tokens"]

        def mapped(name: str, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
            file, expected = folder / name, int(np.prod(shape)) * np.dtype(dtype).itemsize
            if file.stat().st_size != expected:
                raise ValueError(
                    f"{file} has {file.stat().st_size} bytes, its header says {expected}; remove {folder}, it is "
                    "made anew"
                )
            # A plain array over the map: slices of np.memmap objects are several times slower to make.
            return np.asarray(np.memmap(file, dtype, mode="r", shape=shape))

        return cls(
            tokens=mapped("tokens.bin", header["dtype"], (num_tokens,)),
            offsets=mapped("offsets.bin", "<i8", (num_documents + 1,)),
            hashes=mapped("hashes.bin", "<u8", (num_documents,)),
            parts=mapped("parts.bin", "<i4", (num_documents, 2)) if header["is_supervised"] else None,
            counts=RecordCounts(
                header["counts"]["records"], Counter(header["counts"]["bad"]), header["counts"]["examples"]
            ),
        )


def write_header(folder: Path, store: dict[str, Any], counts: RecordCounts) -> None:
    """Write header.json, the last file of a store."""
    read = {"records": counts.records, "bad": dict(counts.bad), "examples": counts.examples}
    content = {"format_version": FORMAT_VERSION, **store, "counts": read}
    (folder / "header.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def token_dtype(tokenizer: Tokenizer) -> str:
    """The smallest dtype that holds every id: "<u2" or "<u4"."""
    return "<u2" if max(tokenizer.get_vocab().values(), default=0) < 1 << 16 else "<u4"


def tokenize_records(
    records: Iterable[RawRecord],
    source: SourceConfig,
    tokenizer: Tokenizer,
    convention: Convention,
    dtype: str,
) -> TokenStore:
    """Tokenise records; bad ones are counted and left out.

    Args:
        records: of `source`.
        source: which columns to read.
        tokenizer: conversations need its chat template.
        convention: of the model; shapes supervised pairs only.
        dtype: see `token_dtype`.
    """
    counts = RecordCounts()
    documents: list[npt.NDArray[Any]] = []
    hashes, parts = [], []
    for raw in records:
        counts.records += 1
        try:
            record = parse_record(raw, source)
            if source.is_supervised:
                ids, part = _pair_tokens(record, raw.where, tokenizer, convention)
                parts.append(part)
            else:
                ids = encode(tokenizer, record["text"])
        except BadRecord as error:
            counts.refuse(error)
            continue
        documents.append(ids.astype(dtype))
        hashes.append(text_hash(record))
    lengths = [len(ids) for ids in documents]
    return TokenStore(
        tokens=np.concatenate(documents) if documents else np.empty(0, dtype),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
        hashes=np.asarray(hashes, dtype=np.uint64),
        parts=np.asarray(parts, dtype=np.int32).reshape(-1, 2) if source.is_supervised else None,
        counts=counts,
    )


def _pair_tokens(
    record: Record, where: str, tokenizer: Tokenizer, convention: Convention
) -> tuple[npt.NDArray[np.int64], tuple[int, int]]:
    try:
        example = record_to_example(record, tokenizer, convention)
    except ChatRefused as error:
        raise BadRecord("chat does not render", f"{where}: {error}") from error
    except ValueError as error:
        raise BadRecord("not a usable pair", f"{where}: {error}") from error
    return np.concatenate(example[:3]), (len(example.source), len(example.decoder_prefix))


def text_hash(record: Record) -> int:
    """64 bits of a record's text without regard to case and white space; equal for copies."""
    if "messages" in record:
        texts: Sequence[str] = [turn["content"] for turn in record["messages"]]
    else:
        texts = list(record.values())
    normal = "\n".join(" ".join(text.lower().split()) for text in texts)
    digest = hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
