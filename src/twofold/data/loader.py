"""The loader: token stores in, batches out, and a state that continues exactly where it was taken.

All randomness of a unit (a supervised pair, a chunk of running text) comes from (seed, epoch, source, number of the
unit), so none depends on those before it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from twofold.config.data import DataConfig
from twofold.config.history import Reading, source_use
from twofold.data.batch import Batch, collate
from twofold.data.convention import Convention
from twofold.data.examples import ExampleMaker
from twofold.data.split import Corpus
from twofold.data.stream import Group, LoaderCounts, Piece, Stream, Unit, Units, new_packer
from twofold.data.teaching import Teaching
from twofold.data.tokenize import Tokenizer

_BLOCK = 512


def refuse_other_state(state: Mapping[str, Any], identity: Mapping[str, Any], *, otherwise: str) -> None:
    """Refuse the saved state of a loader of something else.

    Args:
        state: as it was saved.
        identity: what a state of this loader says of its data.
        otherwise: what to do without it.

    Raises:
        ValueError: they differ.
    """
    for name, value in identity.items():
        if state.get(name) != value:
            raise ValueError(
                f"the saved state of the loader has {name} {state.get(name)}, this run has {value}; resume with "
                f"the data it was saved with, or {otherwise}"
            )


class Loader(Iterator[Batch]):
    """Batches without end, epoch after epoch; `one_pass` for an evaluation."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        tokenizer: Tokenizer,
        config: DataConfig,
        convention: Convention,
        sentinel_ids: Sequence[int] = (),
        *,
        num_streams: int = 1,
        owned: Sequence[int] | None = None,
        teaching: Teaching | None = None,
    ) -> None:
        """Check everything that can be checked before a run.

        Args:
            corpora: of the sources (`open_corpora`, or `Corpus.from_records`).
            tokenizer: of the corpora; writes mode tokens.
            config: objective, lengths, seed. Its sources are not read here.
            convention: of the model.
            sentinel_ids: in order of use; span corruption and UL2 (`required_sentinels`, `find_sentinels`).
            num_streams: batches of one step, over all ranks; each comes from a stream of its own.
            owned: the streams this loader gives. None: all.
            teaching: adds to batches what a teacher needs.

        Raises:
            ValueError: no documents, none that gives an example, a pair longer than a row, rows too short for the
                objective, too few sentinels, or streams that do not exist.
        """
        corpora = [corpus for corpus in corpora if len(corpus)]
        if not corpora:
            raise ValueError("there are no documents to read; give sources that hold some")
        self._config = config
        self._convention = convention
        self.num_streams = num_streams
        """Batches of one step, over all ranks."""
        self.owned = tuple(range(num_streams)) if owned is None else tuple(sorted(owned))
        """The streams of this loader."""
        if num_streams < 1 or not self.owned or not set(self.owned) <= set(range(num_streams)):
            raise ValueError(
                f"streams are numbered 0 to num_streams - 1, got num_streams={num_streams} and owned={owned}"
            )
        self._teaching = teaching
        maker = ExampleMaker(tokenizer, config, convention, sentinel_ids, keeps_raw=teaching is not None)
        self.truncated = self.skipped = 0
        """Supervised pairs longer than a row, by what is done with them in each epoch."""
        if maker.is_supervised:
            corpora = [self._within_rows(corpus, maker) for corpus in corpora]
        self._corpora = corpora
        self._units = [Units(corpus, maker, n, config.seed) for n, corpus in enumerate(corpora)]
        if not any(map(len, self._units)):
            raise ValueError(
                f"none of {sum(map(len, corpora))} documents gave an example: texts need at least 2 tokens, and pairs "
                f"longer than a row are skipped with max_length_action='skip' ({self.skipped} were)"
            )
        self._streams = {n: Stream(n, num_streams, self._groups(), config) for n in self.owned}

    @property
    def num_documents(self) -> int:
        """Documents of all sources."""
        return sum(map(len, self._corpora))

    @property
    def num_units(self) -> int:
        """Units of one epoch: supervised pairs, or chunks of running text."""
        return sum(map(len, self._units))

    @property
    def counts(self) -> LoaderCounts:
        """What this loader's streams have given out so far, together."""
        total = LoaderCounts()
        for stream in self._streams.values():
            for counted in fields(LoaderCounts):
                value = getattr(total, counted.name) + getattr(stream.counts, counted.name)
                setattr(total, counted.name, value)
        return total

    def report(self) -> list[str]:
        """A line for each source: what is in it, and what was skipped, dropped or cut."""
        lines = []
        for corpus, units in zip(self._corpora, self._units, strict=True):
            text = f"{corpus.source.path}: {len(corpus):,} documents, {len(units):,} units an epoch"
            if corpus.store.counts.bad:
                text += f"; {corpus.store.counts.summary()}"
            for reason, count in corpus.dropped.items():
                text += f"; {count:,} documents dropped: {reason}"
            lines.append(text)
        if self.truncated:
            lines.append(f"{self.truncated:,} pairs are longer than a row and are cut")
        return lines

    def reading(self, state: Mapping[str, Any] | None = None) -> Reading:
        """What the sources hold, and what was drawn of them.

        Args:
            state: see `state_dict`; with the streams of all ranks. None: nothing is said of what was drawn.
        """
        streams = [] if state is None else list(state["streams"].values())
        sources = [
            source_use(
                corpus.source.path,
                corpus.source.format,
                records=len(corpus),
                tokens=corpus.num_tokens,
                weight=corpus.source.weight,
                tokens_drawn=sum(stream["tokens"].get(str(n), 0) for stream in streams) if streams else None,
            )
            for n, corpus in enumerate(self._corpora)
        ]
        examples = sum(stream["counts"]["examples"] for stream in streams) if streams else None
        return Reading(sources=tuple(sources), examples_drawn=examples)

    def next_step(self) -> list[Batch]:
        """One batch of each owned stream, in their order.

        Raises:
            Exhausted: the sources' `epochs` are used up; says after how many batches.
        """
        num_rows = self._config.rows_per_batch
        return [self._collate(stream.next_rows(num_rows)) for stream in self._streams.values()]

    def __next__(self) -> Batch:
        """The next batch of a loader with one stream."""
        if len(self._streams) != 1:
            raise ValueError(f"this loader has {len(self._streams)} streams; take next_step()")
        return self.next_step()[0]

    def one_pass(self) -> Iterator[Batch]:
        """Every unit once, in order, with the noise of epoch 0: the same batches each time.

        Leaves the endless iteration as it is; the last batch may have fewer rows.
        """
        rows: list[list[Piece]] = []
        for row in self._rows_in_order():
            rows.append(row)
            if len(rows) == self._config.rows_per_batch:
                yield self._collate(rows)
                rows = []
        if rows:
            yield self._collate(rows)

    def state_dict(self) -> dict[str, Any]:
        """Where the owned streams stand, JSON-able. `streams` of all ranks, put together, is the whole."""
        return {
            **self._identity(),
            "streams": {str(n): stream.state_dict() for n, stream in self._streams.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`: the next batches are those of the run that never stopped.

        Args:
            state: with all streams that this loader owns; others are ignored.

        Raises:
            ValueError: the state belongs to another seed, order, number of streams or other data, or lacks a stream.
        """
        refuse_other_state(state, self._identity(), otherwise="start without its state")
        if missing := [n for n in self.owned if str(n) not in state["streams"]]:
            raise ValueError(
                f"the saved state of the loader has streams {sorted(map(int, state['streams']))}, but {missing} are "
                "needed too; put the states of all ranks together"
            )
        for n, stream in self._streams.items():
            stream.load_state_dict(state["streams"][str(n)], self._config)

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._config.seed,
            "shuffle": self._config.shuffle,
            "num_streams": self.num_streams,
            "units": [len(units) for units in self._units],
        }

    def _groups(self) -> list[Group]:
        """All sources together, or each on its own where they have weights; empty ones have nothing to give."""
        used = [n for n, units in enumerate(self._units) if len(units)]
        if self._corpora[used[0]].source.weight is None:
            return [Group([self._units[n] for n in used], used, self._config)]
        return [Group([self._units[n]], [n], self._config) for n in used]

    def _within_rows(self, corpus: Corpus, maker: ExampleMaker) -> Corpus:
        """A supervised corpus without pairs that are to be skipped, after a check of the others."""
        store, documents = corpus.store, corpus.indices()
        assert store.parts is not None
        sources, prefixes = store.parts[documents].astype(np.int64).T
        lengths = store.offsets[documents + 1] - store.offsets[documents]
        oversize = maker.oversize(sources, prefixes, lengths)
        action = self._config.max_length_action
        if action == "skip":
            self.skipped += int((oversize > 0).sum())
            return corpus.only(oversize == 0, "longer than a row (max_length_action='skip')")
        wrong = np.flatnonzero(oversize > (0 if action == "error" else 1))
        if len(wrong):
            first = wrong[0]
            raise ValueError(
                f"document {documents[first]} of {corpus.source.path}: a pair of {sources[first]} source and "
                f"{lengths[first] - sources[first] - 1} target tokens does not fit a row of "
                f"{self._config.source_length} and {self._config.target_length} (nor do {len(wrong) - 1} others); "
                "raise source_length or target_length, or set max_length_action to 'truncate' or 'skip'"
            )
        self.truncated += int((oversize > 0).sum())
        return corpus

    def _rows_in_order(self) -> Iterator[list[Piece]]:
        packer = new_packer(self._config)
        for piece in self._in_order():
            packer.add(piece, len(piece.example.source), piece.example.decoder_length)
            if not packer.wants_more:
                yield packer.next_row()
        while packer.waiting:
            yield packer.next_row()

    def _in_order(self) -> Iterator[Piece]:
        for source, units in enumerate(self._units):
            for first in range(0, len(units), _BLOCK):
                numbers = np.arange(first, min(first + _BLOCK, len(units)))
                for number, place in zip(numbers.tolist(), units.locate(numbers), strict=True):
                    yield from units.pieces(Unit(source, 0, number), place)

    def _collate(self, pieces: list[list[Piece]]) -> Batch:
        rows = [[piece.example for piece in row] for row in pieces]
        multiple = self._config.pad_multiple

        def width(longest: int, limit: int) -> int:
            return min(limit, -(-longest // multiple) * multiple)

        source = max(sum(len(example.source) for example in row) for row in rows)
        target = max(sum(example.decoder_length for example in row) for row in rows)
        batch = collate(
            rows,
            self._convention.pad_token_id,
            max(1, width(source, self._config.source_length)),
            width(target, self._config.target_length),
        )
        documents = dict.fromkeys((piece.unit.source, piece.document) for row in pieces for piece in row)
        names = tuple(f"{self._corpora[source].source.path} {number}" for source, number in documents)
        batch = replace(batch, documents=names)
        return batch if self._teaching is None else self._teaching(rows, batch)
