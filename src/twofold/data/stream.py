"""Streams: the endless order of units, dealt into parts that do not know of each other.

A *group* is what is shuffled together: all sources, or one source of a weighted mixture. Its order is epoch after epoch
of a permutation of its units; stream s of A takes the positions s, s + A, s + 2A... of it. So together the streams
go through every epoch exactly once, whatever A is, and each can stand anywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from twofold.config.data import DataConfig
from twofold.data.convention import Example
from twofold.data.examples import ExampleMaker
from twofold.data.order import keys_for, mix, permute
from twofold.data.packing import Packer
from twofold.data.split import Corpus

_BLOCK = 512
"""Positions whose units are looked up at once."""


class Unit(NamedTuple):
    """Names a unit, and its randomness, for good."""

    source: int
    epoch: int
    number: int
    """In its source."""


Place: TypeAlias = tuple[int, int, int, bool]
"""Of a unit: its document in the store, its start and end in the tokens, whether the document ends with it."""


class Piece(NamedTuple):
    """An example of a unit."""

    unit: Unit
    number: int
    document: int
    """Of its source's store."""
    example: Example


class Exhausted(ValueError):
    """The sources' `epochs` are used up."""


@dataclass(slots=True)
class LoaderCounts:
    """What has been given out so far."""

    units: int = 0
    """Supervised pairs, or chunks of running text, that examples were made of."""

    examples: int = 0
    """In batches."""

    batches: int = 0
    tokens: int = 0
    """Of both sides, without padding."""

    scored_tokens: int = 0
    """Labels that count in the loss."""


class Units:
    """The units of one source."""

    def __init__(self, corpus: Corpus, maker: ExampleMaker, number: int, seed: int) -> None:
        """Count them; documents that give none are passed over.

        Args:
            corpus: the source's documents.
            maker: see `ExampleMaker`.
            number: of the source.
            seed: of the run.
        """
        store, documents = corpus.store, corpus.indices()
        per_document = maker.units_per_document(store.offsets[documents + 1] - store.offsets[documents])
        self.corpus = corpus
        self._documents = documents
        self._ends = np.cumsum(per_document)
        self._maker = maker
        self._number = number
        self._seed = seed

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, units: npt.NDArray[np.int64]) -> list[Place]:
        """The places of some units, int64 [n]."""
        at = np.searchsorted(self._ends, units, side="right")
        documents = self._documents[at]
        in_document = units - np.where(at > 0, self._ends[at - 1], 0)
        offsets = self.corpus.store.offsets
        stops = offsets[documents + 1]
        starts, ends = self._maker.unit_spans(offsets[documents], stops, in_document)
        return list(
            zip(documents.tolist(), starts.tolist(), ends.tolist(), (ends == stops).tolist(), strict=True)
        )

    def pieces(self, unit: Unit, place: Place) -> list[Piece]:
        """The examples of a unit at its place (`locate`).

        Raises:
            ValueError: see `ExampleMaker.examples`; names the document.
        """
        document, start, end, ends = place
        store = self.corpus.store
        parts = None
        if store.parts is not None:
            parts = (int(store.parts[document, 0]), int(store.parts[document, 1]))
        seed = (self._seed, unit.epoch, self._number, unit.number)
        try:
            examples = self._maker.examples(
                store.tokens[start:end].astype(np.int64), parts, ends=ends, seed=seed
            )
        except ValueError as error:
            raise ValueError(f"document {document} of {self.corpus.source.path}: {error}") from error
        return [
            Piece(unit, number, document, _located(example, self._number, start))
            for number, example in enumerate(examples)
        ]


def _located(example: Example, source: int, start: int) -> Example:
    """The same, its text located in the store; `start` is that of the unit."""
    if example.raw is None:
        return example
    return example._replace(raw=example.raw._replace(source=source, start=start + example.raw.start))


Placed: TypeAlias = tuple[Units, Unit, Place]


class Group:
    """Sources whose units are shuffled together."""

    def __init__(self, sources: Sequence[Units], numbers: Sequence[int], config: DataConfig) -> None:
        """`numbers` are those of the sources in the run."""
        self.sources = sources
        self.numbers = list(numbers)
        self._sizes = np.asarray([len(units) for units in sources])
        self._ends = np.cumsum(self._sizes)
        self.size = int(self._ends[-1])
        """Units of one epoch."""
        self._config = config
        limits = [units.corpus.source.epochs for units in sources]
        self._epochs = np.asarray([np.inf if limit is None else limit for limit in limits])
        # At least one unit, however small `epochs` is.
        self._epochs = np.maximum(self._epochs, 1 / np.maximum(self._sizes, 1))

    def block(self, positions: npt.NDArray[np.int64]) -> tuple[list[Placed | None], bool]:
        """What stands at some positions of the endless order.

        Args:
            positions: int64 [n], ascending.

        Returns:
            For each position the source, the unit and its place, or None where the source has given its `epochs`;
            and whether all sources have by the first position.
        """
        epochs, index = positions // self.size, positions % self.size
        if bool((epochs[0] >= self._epochs).all()):
            return [], True
        if self._config.shuffle:
            keys = mix(keys_for(self._config.seed, epochs) + np.uint64(self.numbers[0]))
            index = permute(index, self.size, keys)
        which = np.searchsorted(self._ends, index, side="right")
        numbers = index - (self._ends - self._sizes)[which]
        allowed = np.round((self._epochs[which] - epochs) * self._sizes[which])
        found: list[Placed | None] = [None] * len(positions)
        for number, units in enumerate(self.sources):
            mine = np.flatnonzero((which == number) & (numbers < allowed))
            places = units.locate(numbers[mine])
            names = zip(epochs[mine].tolist(), numbers[mine].tolist(), strict=True)
            for at, (epoch, unit), place in zip(mine.tolist(), names, places, strict=True):
                found[at] = (units, Unit(self.numbers[number], epoch, unit), place)
        return found, False


class Stream:
    """One of A parts of the endless order, as rows of examples."""

    def __init__(self, index: int, num_streams: int, groups: Sequence[Group], config: DataConfig) -> None:
        """`index` is below `num_streams`; more than one group is a weighted mixture, a source each."""
        self._index = index
        self._num_streams = num_streams
        self._groups = groups
        self._weights = [group.sources[0].corpus.source.weight or 1.0 for group in groups]
        self._packer = new_packer(config)
        self._taken = [0] * len(groups)
        self._given = [0] * len(groups)
        self._is_used_up = [False] * len(groups)
        self._blocks: list[tuple[int, list[Placed | None]]] = [(0, [])] * len(groups)
        self.counts = LoaderCounts()
        self._tokens: dict[int, int] = {}
        """Given out so far, by source."""

    def next_rows(self, num_rows: int) -> list[list[Piece]]:
        """The next rows.

        Raises:
            Exhausted: the sources' `epochs` do not give so many.
        """
        rows = []
        for _ in range(num_rows):
            while self._packer.wants_more and self._take_unit():
                pass
            if not self._packer.waiting:
                raise Exhausted(
                    f"every source has given its epochs after {self.counts.batches} batches of stream {self._index}; "
                    "raise epochs of a source, or lower steps"
                )
            rows.append(self._packer.next_row())
        examples = [piece.example for row in rows for piece in row]
        self.counts.batches += 1
        self.counts.examples += len(examples)
        self.counts.tokens += sum(len(example.source) + example.decoder_length for example in examples)
        self.counts.scored_tokens += sum(len(example.target) for example in examples)
        for piece in (piece for row in rows for piece in row):
            size = len(piece.example.source) + piece.example.decoder_length
            self._tokens[piece.unit.source] = self._tokens.get(piece.unit.source, 0) + size
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, JSON-able; examples that wait are named, not kept."""
        return {
            "taken": list(self._taken),
            "given": list(self._given),
            "waiting": [[*piece.unit, piece.number] for piece in self._packer.waiting],
            "counts": asdict(self.counts),
            "tokens": {str(source): tokens for source, tokens in self._tokens.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], config: DataConfig) -> None:
        """Go on from `state_dict`."""
        self._taken, self._given = list(state["taken"]), list(state["given"])
        self._is_used_up = [False] * len(self._groups)
        self._blocks = [(0, [])] * len(self._groups)
        self._packer = new_packer(config)
        sources = {
            number: units
            for group in self._groups
            for number, units in zip(group.numbers, group.sources, strict=True)
        }
        made: dict[Unit, list[Piece]] = {}
        for source, epoch, number, piece in state["waiting"]:
            unit = Unit(source, epoch, number)
            if unit not in made:
                (place,) = sources[source].locate(np.asarray([number]))
                made[unit] = sources[source].pieces(unit, place)
            self._add(made[unit][piece])
        for counted in fields(LoaderCounts):
            setattr(self.counts, counted.name, state["counts"][counted.name])
        self._tokens = {int(source): tokens for source, tokens in state.get("tokens", {}).items()}

    def _take_unit(self) -> bool:
        """Let the next unit of the source that is furthest behind its share wait; False when all are used up."""
        while not all(self._is_used_up):
            _, number = min(
                (given / weight, number)
                for number, (given, weight) in enumerate(zip(self._given, self._weights, strict=True))
                if not self._is_used_up[number]
            )
            placed = self._next_of(number)
            if placed is None:
                self._is_used_up[number] = True
                continue
            units, unit, place = placed
            for piece in units.pieces(unit, place):
                self._given[number] += len(piece.example.source) + piece.example.decoder_length
                self._add(piece)
            self.counts.units += 1
            return True
        return False

    def _next_of(self, number: int) -> Placed | None:
        while True:
            first, block = self._blocks[number]
            at = self._taken[number] - first
            if not 0 <= at < len(block):
                first, at = self._taken[number], 0
                taken = np.arange(first, first + _BLOCK)
                block, is_used_up = self._groups[number].block(self._index + taken * self._num_streams)
                if is_used_up:
                    return None
                self._blocks[number] = (first, block)
            self._taken[number] += 1
            if (placed := block[at]) is not None:
                return placed

    def _add(self, piece: Piece) -> None:
        self._packer.add(piece, len(piece.example.source), piece.example.decoder_length)


def new_packer(config: DataConfig) -> Packer[Piece]:
    """An empty packer for a run's rows."""
    return Packer(config.source_length, config.target_length, packing=config.packing)
