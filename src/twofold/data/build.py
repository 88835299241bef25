"""Building token stores: a source is read once, tokenised by several processes, and kept in a cache.

One process reads raw records and deals them in shards of fixed size; workers tokenise them and each writes its shard's
file. The shards are joined in order, so the store does not depend on the number of workers, and a build that was killed
goes on with the shards that are there.
"""

import contextlib
import hashlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from twofold.config.data import SourceConfig
from twofold.data.convention import Convention
from twofold.data.sources import RawRecord, SourceReader
from twofold.data.store import (
    FORMAT_VERSION,
    RecordCounts,
    TokenStore,
    token_dtype,
    tokenize_records,
    write_header,
)
from twofold.data.tokenize import Tokenizer

logger = logging.getLogger(__name__)

SHARD_BYTES = 4 << 20
"""Text of one shard: a few seconds of work, lost at most when a build is killed."""

_NOT_TEXT = ("weight", "epochs")
"""Fields of a source that do not change its tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildProgress:
    """How far a build is."""

    path: str
    """Of the source."""

    documents: int
    tokens: int
    share_read: float
    """Of the source's bytes or rows, 0 to 1."""


Progress = Callable[[BuildProgress], None]


def default_cache() -> Path:
    """$TWOFOLD_CACHE, or ~/.cache/twofold/tokens."""
    folder = os.environ.get("TWOFOLD_CACHE")
    return Path(folder) if folder else Path.home() / ".cache" / "twofold" / "tokens"


def build_store(
    source: SourceConfig,
    tokenizer: Tokenizer,
    convention: Convention,
    *,
    cache: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """The token store of a source: from the cache, or made now.

    Several processes may ask for one store: one of them makes it, the others wait for it.

    Args:
        source: what to read.
        tokenizer: pickled for the workers where there is more than one shard.
        convention: of the model; matters to supervised pairs only.
        cache: folder of all stores. None: see `default_cache`.
        workers: processes. None: one per core.
        progress: called in this process after each shard.

    Raises:
        FileNotFoundError, ImportError: see `SourceReader`.
        ValueError: the source has no usable record, or a file is broken.
    """
    reader = SourceReader(source)
    cache = default_cache() if cache is None else cache
    key = store_key(source, reader, tokenizer, convention)
    folder = cache / key
    if not (folder / "header.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{key}.lock"):
            if not (folder / "header.json").is_file():
                job = _Job(source, tokenizer, convention, token_dtype(tokenizer))
                _build(job, reader, folder, workers or os.cpu_count() or 1, progress)
    return TokenStore.open(folder)


def store_key(
    source: SourceConfig, reader: SourceReader, tokenizer: Tokenizer, convention: Convention
) -> str:
    """The name of a store: a hash of everything its tokens depend on."""
    content = {
        "format_version": FORMAT_VERSION,
        "source": {k: v for k, v in source.model_dump(mode="json").items() if k not in _NOT_TEXT},
        "data": reader.identity(),
        "tokenizer": fingerprint(tokenizer),
        "convention": repr(convention) if source.is_supervised else None,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of what a tokenizer does to text: the whole of a fast one, vocabulary and class of others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # The last call's padding and truncation, not the tokenizer's own.
        content["padding"] = content["truncation"] = None
    else:
        content = {"class": type(tokenizer).__qualname__, "vocab": dict(tokenizer.get_vocab())}
    content["chat_template"] = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Job:
    """What every worker has to know."""

    source: SourceConfig
    tokenizer: Tokenizer
    convention: Convention
    dtype: str

    def write_shard(self, records: list[RawRecord], file: Path) -> None:
        """Tokenise a shard; its file appears when it is complete."""
        made = tokenize_records(records, self.source, self.tokenizer, self.convention, self.dtype)
        counts = [made.counts.records, dict(made.counts.bad), made.counts.examples]
        arrays: dict[str, Any] = {"tokens": made.tokens, "lengths": made.lengths, "hashes": made.hashes}
        if made.parts is not None:
            arrays["parts"] = made.parts
        partial = file.with_suffix(".partial")
        with open(partial, "wb") as handle:
            np.savez(handle, counts=np.asarray(json.dumps(counts)), **arrays)
        partial.replace(file)


def _build(job: _Job, reader: SourceReader, folder: Path, workers: int, progress: Progress | None) -> None:
    scratch = folder.with_name(folder.name + ".partial")
    (scratch / "shards").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(scratch / "store", ignore_errors=True)
    (scratch / "store").mkdir()
    logger.info("tokenising %s", job.source.path)
    writer = _StoreWriter(scratch / "store", job)
    try:
        with contextlib.closing(_made_shards(job, reader, scratch / "shards", workers)) as shards:
            for file in shards:
                is_full = writer.add(file)
                if progress is not None:
                    share = 1.0 if is_full else reader.share_read
                    progress(
                        BuildProgress(
                            path=job.source.path,
                            documents=writer.documents,
                            tokens=writer.tokens,
                            share_read=share,
                        )
                    )
                if is_full:
                    break
        writer.finish()
    except ValueError:  # the data cannot be used, so nothing of it is worth keeping
        shutil.rmtree(scratch)
        raise
    (scratch / "store").replace(folder)
    shutil.rmtree(scratch)


class _StoreWriter:
    """Joins shards into one store."""

    def __init__(self, folder: Path, job: _Job) -> None:
        self._folder = folder
        self._job = job
        self.documents = self.tokens = 0
        self._counts = RecordCounts()
        self._names = ["tokens", "hashes", *(["parts"] if job.source.is_supervised else [])]
        for name in (*self._names, "offsets"):
            (folder / f"{name}.bin").touch()

    def add(self, file: Path) -> bool:
        """Append a shard. Returns True when the source's limits are reached, so no more is wanted.

        Raises:
            ValueError: the first records are all bad.
        """
        source = self._job.source
        with np.load(file) as shard:
            records, bad, examples = json.loads(str(shard["counts"]))
            self._counts.add(RecordCounts(records, bad, examples))
            if self.documents == 0 and self._counts.num_broken == self._counts.records > 0:
                raise ValueError(f"source {source.path!r}: no record can be used: {self._counts.summary()}")
            ends = np.cumsum(shard["lengths"])
            keep = len(ends)
            if source.max_documents is not None:
                keep = min(keep, source.max_documents - self.documents)
            if source.max_tokens is not None:
                keep = min(keep, int(np.searchsorted(ends, source.max_tokens - self.tokens, side="right")))
            is_full = keep < len(ends) or self.documents + keep == source.max_documents
            num_tokens = int(ends[keep - 1]) if keep else 0
            self._append("offsets", (ends[:keep] + self.tokens).astype("<i8"), first=np.zeros(1, "<i8"))
            for name in self._names:
                self._append(name, shard[name][: num_tokens if name == "tokens" else keep])
            self.documents += keep
            self.tokens += num_tokens
        return is_full

    def _append(self, name: str, values: Any, first: Any = None) -> None:
        with open(self._folder / f"{name}.bin", "ab") as handle:
            if first is not None and handle.tell() == 0:
                first.tofile(handle)
            values.tofile(handle)

    def finish(self) -> None:
        """Write the header.

        Raises:
            ValueError: there is no document.
        """
        source = self._job.source
        if self.tokens == 0:
            what = f": {self._counts.summary()}" if self._counts.bad else ""
            if source.max_tokens is not None:
                what += f" within max_tokens={source.max_tokens}"
            raise ValueError(f"source {source.path!r} has no documents{what}; give a path with text in it")
        content = {
            "num_documents": self.documents,
            "num_tokens": self.tokens,
            "dtype": self._job.dtype,
            "is_supervised": source.is_supervised,
            "source": source.model_dump(mode="json", exclude=set(_NOT_TEXT)),
            "tokenizer": fingerprint(self._job.tokenizer),
        }
        write_header(self._folder, content, self._counts)


def _shards(reader: SourceReader) -> Iterator[list[RawRecord]]:
    """Records in runs of SHARD_BYTES; where one ends depends on the data alone."""
    shard: list[RawRecord] = []
    size = 0
    for record in reader:
        shard.append(record)
        size += len(record.content if isinstance(record.content, bytes) else str(record.content))
        if size >= SHARD_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _made_shards(job: _Job, reader: SourceReader, folder: Path, workers: int) -> Generator[Path, None, None]:
    """The files of all shards, in order, each when it is complete."""
    shards = enumerate(_shards(reader))
    pool: _Workers | None = None
    waiting: deque[tuple[Path, Future[None] | None]] = deque()
    held = next(shards, None)
    try:
        while held is not None:
            (number, records), held = held, next(shards, None)
            file = folder / f"{number:06d}.npz"
            future = None
            if not file.exists():
                # One shard is done before a worker has imported what it needs.
                if pool is None and workers > 1 and (number > 0 or held is not None):
                    pool = _Workers(job, workers)
                if pool is None:
                    job.write_shard(records, file)
                else:
                    future = pool.submit(records, file)
            waiting.append((file, future))
            while waiting and (held is None or len(waiting) > 2 * workers or _is_done(waiting[0][1])):
                file, future = waiting.popleft()
                if future is not None:
                    future.result()
                yield file
    finally:
        if pool is not None:
            pool.close()


def _is_done(future: "Future[None] | None") -> bool:
    return future is None or future.done()


class _Workers:
    """Processes that tokenise shards.

    They are started as `python -m`, not through multiprocessing, whose `spawn` runs the user's script again
    in each; when this process ends, however it ends, they read the end of their input and stop.
    """

    def __init__(self, job: _Job, num: int) -> None:
        self._threads = ThreadPoolExecutor(num)
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._processes = []
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, "-m", "twofold.data.worker"]
        pickled = pickle.dumps(job)
        for _ in range(num):
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
            self._processes.append(process)
            self._threads.submit(self._greet, process, pickled)

    def _greet(self, process: "subprocess.Popen[bytes]", pickled: bytes) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died; the first shard given to it says so
            process.stdin.write(pickled)
            process.stdin.flush()
        self._idle.put(process)

    def submit(self, records: list[RawRecord], file: Path) -> "Future[None]":
        """Have a shard written. The future raises what the worker raised."""
        return self._threads.submit(self._send, records, file)

    def _send(self, records: list[RawRecord], file: Path) -> None:
        process = self._idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump((records, file), process.stdin)
            process.stdin.flush()
            error = pickle.load(process.stdout)
        except (BrokenPipeError, EOFError) as broken:
            raise RuntimeError(
                f"a process that tokenises has died (exit code {process.poll()}); its message stands above"
            ) from broken
        finally:
            self._idle.put(process)
        if error is not None:
            raise error

    def close(self) -> None:
        """End the processes."""
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, so that one that was killed blocks nobody."""
    try:
        import fcntl
    except ImportError:  # Windows: renaming the folder still keeps a store whole
        yield
        return
    with open(file, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
