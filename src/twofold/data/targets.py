"""Stored teacher outputs: for the tokens of a run's stores, a few tokens and their shares of the prediction.

    targets.json             what was asked, of whom, and about which stores
    shard-000000/            a run of consecutive units of one store; the folder appears when it is complete
        offsets.npy          int64 [n + 1]: where the entries of each token start, and the end
        ids.npy              uint16 or uint32 [entries]
        shares.npy           float16 [entries]; of one token they sum to 1, up to rounding
        kept.npy             float16 [n]: the teacher's probability of the named tokens together

The n tokens of a shard are those from its first unit's beginning to its last unit's end in the store. A token that
the teacher said nothing about (the first one of a text, one that the run does not read) has no entries.

N: positions asked about. K: entries of one position.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from twofold.data.store import TokenStore

FORMAT_VERSION = 1
HEADER = "targets.json"
_SAMPLED_TOKENS = 4096

Ids = npt.NDArray[np.unsignedinteger[Any]]
Shares = npt.NDArray[np.float16]


class Predictions(NamedTuple):
    """What a teacher says about consecutive tokens of a store; L of them."""

    counts: npt.NDArray[np.int64]
    """[L]: entries of each."""
    ids: Ids
    """[sum of counts]."""
    shares: Shares
    """[sum of counts]."""
    kept: npt.NDArray[np.float16]
    """[L]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreName:
    """A token store that targets belong to."""

    path: str
    """Of the source, for messages."""
    num_tokens: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A run of units."""

    source: int
    """Which of the header's stores."""
    first_unit: int
    end_unit: int
    first_token: int
    """In the store."""
    end_token: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetsHeader:
    """What a folder of targets is."""

    teacher: str
    method: str
    k: int
    seed: int
    precision: str
    vocab_size: int
    """All ids are below."""
    stores: tuple[StoreName, ...]
    shards: tuple[Shard, ...]

    @property
    def id_dtype(self) -> npt.DTypeLike:
        """uint16 where the vocabulary fits, else uint32."""
        return "<u2" if self.vocab_size <= 1 << 16 else "<u4"


def name_store(store: TokenStore, path: str) -> StoreName:
    """A store's name by its content: documents, their texts and lengths, and tokens at even distances.

    The tokens tell tokenizers apart that cut texts alike; all of them would take minutes for a large store.
    """
    digest = hashlib.sha256()
    digest.update(np.ascontiguousarray(store.offsets, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(store.hashes, dtype="<u8").tobytes())
    at = np.linspace(0, store.num_tokens - 1, min(_SAMPLED_TOKENS, store.num_tokens)).astype(np.int64)
    digest.update(store.tokens[at].astype("<u4").tobytes())
    return StoreName(path=path, num_tokens=store.num_tokens, fingerprint=digest.hexdigest()[:32])


def start_targets(folder: Path, header: TargetsHeader) -> None:
    """Make the folder, or find that it is this very one, begun before or by another process.

    Raises:
        FileExistsError: something else is there.
    """
    file = folder / HEADER
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} exists and is not empty; give another output, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{HEADER}.{os.getpid()}"
        partial.write_text(json.dumps({"format_version": FORMAT_VERSION, **asdict(header)}, indent=1))
        partial.replace(file)  # processes that race write the same
    if (there := read_header(folder)) != header:
        differing = [n for n in TargetsHeader.__slots__ if getattr(there, n) != getattr(header, n)]
        raise FileExistsError(
            f"{folder} holds targets that differ from these in {', '.join(differing)}; go on with the settings and "
            "the data they were begun with, or give another output"
        )


def read_header(folder: Path) -> TargetsHeader:
    """targets.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: another format.
    """
    file = folder / HEADER
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no {HEADER}; make targets first, with a recipe of stage 'distill-targets'"
        )
    content = json.loads(file.read_text(encoding="utf-8"))
    if content.pop("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder} is of another format than {FORMAT_VERSION}; make the targets again with this twofold"
        )
    stores = tuple(StoreName(**store) for store in content.pop("stores"))
    shards = tuple(Shard(**shard) for shard in content.pop("shards"))
    return TargetsHeader(**content, stores=stores, shards=shards)


def shard_folder(folder: Path, number: int) -> Path:
    """Where a shard is when it is complete."""
    return folder / f"shard-{number:06d}"


class ShardWriter:
    """Collects the predictions of one shard and writes them; nothing is there until all is.

    Args:
        folder: of the targets.
        header: of the folder.
        number: of the shard.
    """

    def __init__(self, folder: Path, header: TargetsHeader, number: int) -> None:
        self._target = shard_folder(folder, number)
        self._dtype = header.id_dtype
        self._shard = header.shards[number]
        self._parts: list[tuple[int, Predictions]] = []

    def add(self, place: int, predictions: Predictions) -> None:
        """Predictions of the tokens from a place in the store on; later calls come later in the store."""
        end = self._parts[-1][0] + len(self._parts[-1][1].counts) if self._parts else self._shard.first_token
        assert end <= place, "units come in the order of the store"
        assert place + len(predictions.counts) <= self._shard.end_token
        self._parts.append((place, predictions))

    def finish(self) -> None:
        """Write the shard."""
        first, n_tokens = self._shard.first_token, self._shard.end_token - self._shard.first_token
        counts = np.zeros(n_tokens, dtype=np.int64)
        kept = np.zeros(n_tokens, dtype=np.float16)
        for place, part in self._parts:
            at = slice(place - first, place - first + len(part.counts))
            counts[at], kept[at] = part.counts, part.kept
        arrays = {
            "offsets": np.concatenate([[0], np.cumsum(counts)]).astype("<i8"),
            "ids": np.concatenate([np.empty(0, self._dtype), *(part.ids for _, part in self._parts)]),
            "shares": np.concatenate([np.empty(0, "<f2"), *(part.shares for _, part in self._parts)]),
            "kept": kept,
        }
        dtypes = {"offsets": "<i8", "ids": self._dtype, "shares": "<f2", "kept": "<f2"}
        # The name is the same for whoever does the shard again, who so removes what a killed process left.
        partial = self._target.with_name(f".{self._target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            for name, array in arrays.items():
                with (partial / f"{name}.npy").open("wb") as file:
                    np.save(file, array.astype(dtypes[name], copy=False))
                    file.flush()
                    os.fsync(file.fileno())
            partial.rename(self._target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


class TargetReader:
    """Finished targets of some stores.

    Args:
        folder: that stage `distill-targets` wrote.
        stores: those of a run; their order numbers them in `lookup`.

    Raises:
        FileNotFoundError: there are no targets, or shards are missing.
        ValueError: the targets belong to other stores.
    """

    def __init__(self, folder: str | Path, stores: Sequence[StoreName]) -> None:
        self.folder = Path(folder)
        self.header = read_header(self.folder)
        shards = self.header.shards
        missing = [n for n in range(len(shards)) if not shard_folder(self.folder, n).is_dir()]
        if missing:
            raise FileNotFoundError(
                f"{folder} is not complete: {len(missing)} of {len(shards)} shards are missing; start its "
                "'distill-targets' recipe again, it goes on where it was stopped"
            )
        by_fingerprint = {store.fingerprint: n for n, store in enumerate(self.header.stores)}
        self._shards_of: list[npt.NDArray[np.int64]] = []
        for store in stores:
            number = by_fingerprint.get(store.fingerprint)
            if number is None:
                raise ValueError(
                    f"the targets in {folder} were made for other data than {store.path} ({store.num_tokens:,} tokens "
                    f"with this tokenizer): they know {', '.join(s.path for s in self.header.stores)}; make targets "
                    "with the data of this run"
                )
            self._shards_of.append(np.asarray([n for n, s in enumerate(shards) if s.source == number]))
        self._first = np.asarray([shard.first_token for shard in shards])
        self._end = np.asarray([shard.end_token for shard in shards])
        # Maps are opened once; a run's store has at most some thousand shards.
        self._open = lru_cache(maxsize=None)(self._open_shard)

    def lookup(
        self, sources: npt.NDArray[np.int64], places: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], Shares]:
        """What the teacher said about some tokens.

        Args:
            sources: int64 [N]: the store of each.
            places: int64 [N]: its token there; negative for one that is of no store.

        Returns:
            Ids [N, K] and shares [N, K], filled up with share 0; all 0 where the teacher said nothing. K is what
            these tokens need, at least 1.
        """
        shard_of = self._find(sources, places)
        found = []
        for number in np.unique(shard_of[shard_of >= 0]).tolist():
            at = np.flatnonzero(shard_of == number)
            offsets, _, _ = self._open(number)
            token = places[at] - self._first[number]
            found.append((number, at, offsets[token], offsets[token + 1]))
        width = max([1, *(int((ends - starts).max()) for _, _, starts, ends in found)])
        ids = np.zeros((len(places), width), dtype=np.int32)
        shares = np.zeros((len(places), width), dtype=np.float16)
        columns = np.arange(width)
        for number, at, starts, ends in found:
            _, shard_ids, shard_shares = self._open(number)
            is_entry = columns < (ends - starts)[:, None]
            entries = (starts[:, None] + columns)[is_entry]
            rows, cols = np.nonzero(is_entry)
            ids[at[rows], cols] = shard_ids[entries]
            shares[at[rows], cols] = shard_shares[entries]
        return ids, shares

    def _find(self, sources: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The shard of each token, int64 [N]; -1 where there is none."""
        shard_of = np.full(len(places), -1, dtype=np.int64)
        for source, shards in enumerate(self._shards_of):
            mine = np.flatnonzero((sources == source) & (places >= 0))
            if len(mine) == 0 or len(shards) == 0:
                continue
            nearest = np.searchsorted(self._first[shards], places[mine], side="right") - 1
            number = shards[np.maximum(nearest, 0)]
            is_inside = (nearest >= 0) & (places[mine] < self._end[number])
            shard_of[mine] = np.where(is_inside, number, -1)
        return shard_of

    def _open_shard(self, number: int) -> tuple[npt.NDArray[np.int64], Ids, Shares]:
        folder = shard_folder(self.folder, number)
        offsets, ids, shares = (
            np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
            for name in ("offsets", "ids", "shares")
        )
        shard = self.header.shards[number]
        if (
            len(offsets) != shard.end_token - shard.first_token + 1
            or not len(ids) == len(shares) == offsets[-1]
        ):
            raise ValueError(
                f"{folder} is damaged: its files do not fit each other; remove it and make it again"
            )
        return offsets, ids, shares
