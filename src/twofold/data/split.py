"""What is trained on and what is held out, so that no document is on both sides."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from twofold.config.data import DataConfig, SourceConfig
from twofold.data.build import Progress, build_store
from twofold.data.convention import Convention
from twofold.data.order import keys_for, mix
from twofold.data.sources import RawRecord, Record
from twofold.data.store import TokenStore, token_dtype, tokenize_records
from twofold.data.tokenize import Tokenizer

logger = logging.getLogger(__name__)

_BLOCK_TOKENS = 1 << 20
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """The documents of one source that a loader reads."""

    source: SourceConfig
    store: TokenStore
    kept: npt.NDArray[np.int64] | None = None
    """Which documents of the store, ascending. None: all."""

    dropped: dict[str, int] = field(default_factory=dict)
    """Documents that were left out, by reason."""

    def __len__(self) -> int:
        return self.store.num_documents if self.kept is None else len(self.kept)

    @property
    def num_tokens(self) -> int:
        """Of these documents."""
        lengths = np.diff(self.store.offsets)
        return int(lengths.sum() if self.kept is None else lengths[self.kept].sum())

    def indices(self) -> npt.NDArray[np.int64]:
        """The documents' numbers in the store, int64 [N]."""
        return np.arange(self.store.num_documents) if self.kept is None else self.kept

    def only(self, mask: npt.NDArray[np.bool_], reason: str | None = None) -> "Corpus":
        """The documents where `mask`, bool [N], is True; the others are counted where there is a reason."""
        dropped = dict(self.dropped)
        if reason is not None and not mask.all():
            dropped[reason] = dropped.get(reason, 0) + int((~mask).sum())
        return replace(self, kept=self.indices()[mask], dropped=dropped)

    @classmethod
    def from_records(
        cls, records: Sequence[Record], tokenizer: Tokenizer, convention: Convention
    ) -> "Corpus":
        """A corpus in memory.

        Raises:
            ValueError: there is no record, or one that cannot be used.
        """
        if not records:
            raise ValueError("there are no records; give at least one")
        names = {"prompt_field": "prompt", "completion_field": "completion"} if "prompt" in records[0] else {}
        if "messages" in records[0]:
            names = {"messages_field": "messages"}
        source = SourceConfig(path="(in memory)", **names)
        raw = (RawRecord(f"record {number}", "row", record) for number, record in enumerate(records))
        store = tokenize_records(raw, source, tokenizer, convention, token_dtype(tokenizer))
        if store.counts.num_broken:
            raise ValueError(store.counts.summary())
        return cls(source=source, store=store)


def open_corpora(
    config: DataConfig, tokenizer: Tokenizer, convention: Convention, *, progress: Progress | None = None
) -> tuple[list[Corpus], list[Corpus]]:
    """All sources of a run, tokenised: those to train on, and those held out (none if the config asks for none).

    What was skipped and dropped is logged as warnings.

    Args:
        config: sources, cache, and what is held out.
        tokenizer: of the model.
        convention: of the model.
        progress: see `build_store`.

    Raises:
        FileNotFoundError, ImportError: see `SourceReader`.
        ValueError: too many bad records in a source, no document in it, or nothing left on one side.
    """

    def corpus(source: SourceConfig) -> Corpus:
        store = build_store(
            source,
            tokenizer,
            convention,
            cache=None if config.cache is None else Path(config.cache),
            workers=config.tokenize_workers,
            progress=progress,
        )
        _check_bad(source, store, config.max_bad_share)
        return Corpus(source=source, store=store)

    train = [corpus(source) for source in config.sources]
    held_out = [corpus(source) for source in config.held_out]
    if config.held_out_fraction:
        train, held_out = split_documents(train, config.held_out_fraction, config.seed)
    if held_out:
        train = drop_copies(train, held_out)
        if config.held_out_ngram is not None:
            train = drop_overlaps(train, held_out, config.held_out_ngram, config.held_out_ngram_share)
    for one in train:
        for reason, count in one.dropped.items():
            logger.warning("%s: %s documents dropped: %s", one.source.path, f"{count:,}", reason)
    if not any(map(len, train)):
        raise ValueError(
            "every document to train on is also held out, so nothing is left; give other held_out sources"
        )
    return train, held_out


def _check_bad(source: SourceConfig, store: TokenStore, max_bad_share: float) -> None:
    counts = store.counts
    if not counts.bad:
        return
    if counts.num_broken > max_bad_share * counts.records:
        raise ValueError(
            f"source {source.path!r}: {counts.summary()}. That is more than max_bad_share={max_bad_share}; repair "
            "the data, or raise it"
        )
    logger.warning("%s: %s", source.path, counts.summary())


def split_documents(
    corpora: Sequence[Corpus], fraction: float, seed: int
) -> tuple[list[Corpus], list[Corpus]]:
    """Hold out a share of the documents.

    A hash of a document's normalised text and the seed decides, so copies of one are on the same side, also in
    other sources and other runs. Each side gets at least one document.

    Args:
        corpora: of all sources.
        fraction: expected share of held-out documents, between 0 and 1.
        seed: another one holds out others.

    Raises:
        ValueError: all documents have the same text, or a fraction outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    key = keys_for(seed, np.asarray([-1], dtype=np.int64))
    draws = [mix(_hashes(corpus) ^ key) for corpus in corpora]
    lowest, highest = min(int(d.min()) for d in draws if len(d)), max(int(d.max()) for d in draws if len(d))
    if lowest == highest:
        raise ValueError(
            f"cannot hold out a share of {sum(map(len, corpora))} document(s) with one text: at least 2 different "
            "ones are needed; give held_out sources, or cut the text into more documents "
            "(document='paragraph' or 'line')"
        )
    # At least the lowest draw is held out, and the highest never is.
    limit = np.uint64(min(max(int(fraction * 2.0**64), lowest + 1), highest))
    masks = [draw < limit for draw in draws]
    train = [corpus.only(~mask) for corpus, mask in zip(corpora, masks, strict=True)]
    held_out = [corpus.only(mask) for corpus, mask in zip(corpora, masks, strict=True)]
    return train, held_out


def drop_copies(train: Sequence[Corpus], held_out: Sequence[Corpus]) -> list[Corpus]:
    """Training corpora without documents whose normalised text is held out."""
    taken = np.unique(np.concatenate([_hashes(corpus) for corpus in held_out]))
    return [
        corpus.only(~_is_among(_hashes(corpus), taken), "held out too, as the same text") for corpus in train
    ]


def drop_overlaps(
    train: Sequence[Corpus], held_out: Sequence[Corpus], ngram: int, share: float
) -> list[Corpus]:
    """Training corpora without documents of whose n-grams at least `share` is in held-out documents.

    N-grams that more than half of the held-out documents have (of 4 and more) are left aside: they are a chat
    template or a licence, not content. Documents shorter than `ngram` tokens stay.
    """
    held_out_ngrams = _held_out_ngrams(held_out, ngram)
    kept = []
    for corpus in train:
        shares = np.zeros(len(corpus))
        for first, last, hashes, documents in _ngram_blocks(corpus, ngram):
            found = _is_among(hashes, held_out_ngrams)
            count = np.bincount(documents, minlength=last - first)
            shares[first:last] = np.bincount(documents, found, minlength=last - first) / np.maximum(count, 1)
        kept.append(corpus.only(shares < share, f"{ngram}-grams in common with held-out documents"))
    return kept


def _held_out_ngrams(corpora: Sequence[Corpus], ngram: int) -> npt.NDArray[np.uint64]:
    """Sorted hashes of the n-grams of held-out documents, without template text."""
    found = []
    for corpus in corpora:
        for _, _, hashes, documents in _ngram_blocks(corpus, ngram):
            # Each document counts once for each of its n-grams.
            order = np.lexsort((hashes, documents))
            hashes, documents = hashes[order], documents[order]
            is_new = np.ones(len(hashes), dtype=np.bool_)
            is_new[1:] = (np.diff(documents) != 0) | (hashes[1:] != hashes[:-1])
            found.append(hashes[is_new])
    if not found:
        return np.empty(0, dtype=np.uint64)
    ngrams, counts = np.unique(np.concatenate(found), return_counts=True)
    num_documents = sum(map(len, corpora))
    if num_documents < 4:
        return ngrams
    return ngrams[counts <= num_documents / 2]


def _ngram_blocks(
    corpus: Corpus, ngram: int
) -> Iterator[tuple[int, int, npt.NDArray[np.uint64], npt.NDArray[np.int64]]]:
    """Hashes of all n-grams, in blocks of whole documents.

    Yields:
        First document of the block and the one after its last; uint64 [n] hashes; int64 [n] the document of each,
        counted from the first.
    """
    offsets, indices = corpus.store.offsets, corpus.indices()
    lengths = offsets[indices + 1] - offsets[indices]
    ends = np.cumsum(lengths)
    first = 0
    while first < len(indices):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _BLOCK_TOKENS, side="right")))
        block = indices[first:last]
        tokens = np.concatenate([corpus.store.tokens[offsets[i] : offsets[i + 1]] for i in block])
        documents = np.repeat(np.arange(last - first), lengths[first:last])
        num = len(tokens) - ngram + 1
        if num > 0:
            values = mix(tokens.astype(np.uint64) + np.uint64(1))
            hashes = values[:num].copy()
            for shift in range(1, ngram):
                hashes = hashes * _MULTIPLIER + values[shift : shift + num]
            is_inside = documents[:num] == documents[ngram - 1 :]
            yield first, last, hashes[is_inside], documents[:num][is_inside]
        first = last


def _is_among(values: npt.NDArray[np.uint64], table: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which values are in a sorted table, bool [n]."""
    if len(table) == 0:
        return np.zeros(len(values), dtype=np.bool_)
    at = np.minimum(np.searchsorted(table, values), len(table) - 1)
    return np.asarray(table[at] == values)


def _hashes(corpus: Corpus) -> npt.NDArray[np.uint64]:
    return corpus.store.hashes if corpus.kept is None else corpus.store.hashes[corpus.kept]
