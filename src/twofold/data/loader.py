"""The loader: documents in, batches out, and a state that continues exactly where it was taken.

All randomness of a document comes from (seed, epoch, index of the document), so no document depends on those
before it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from twofold.config.data import DataConfig
from twofold.data.batch import Batch, collate
from twofold.data.convention import Convention, Example
from twofold.data.examples import ExampleCounts, ExampleMaker
from twofold.data.packing import Packer
from twofold.data.sources import Record
from twofold.data.tokenize import Tokenizer


@dataclass(slots=True)
class LoaderCounts(ExampleCounts):
    """What a loader has read and given out so far."""

    documents: int = 0
    """Documents read to their end."""

    examples: int = 0
    """Examples made."""

    batches: int = 0
    scored_tokens: int = 0
    """Labels of all batches that count in the loss."""


class Loader(Iterator[Batch]):
    """Batches without end, epoch after epoch; `one_pass` for an evaluation."""

    def __init__(
        self,
        corpora: Sequence[Sequence[Record]],
        tokenizer: Tokenizer,
        config: DataConfig,
        convention: Convention,
        sentinel_ids: Sequence[int] = (),
    ) -> None:
        """Check everything that can be checked before a run.

        Args:
            corpora: the records of each source (`open_corpora`).
            tokenizer: text to ids; conversations need its chat template.
            config: objective, lengths, seed.
            convention: of the model.
            sentinel_ids: in order of use; span corruption and UL2 (`required_sentinels`, `find_sentinels`).

        Raises:
            ValueError: no documents, rows too short for the objective, or too few sentinels.
        """
        self._corpora = [corpus for corpus in corpora if len(corpus)]
        self._ends = list(accumulate(len(corpus) for corpus in self._corpora))
        if not self._ends:
            raise ValueError("there are no documents to read; give sources that hold some")
        self._config = config
        self._convention = convention
        self._maker = ExampleMaker(tokenizer, config, convention, sentinel_ids)
        self._packer = self._new_packer()
        self.counts = LoaderCounts()
        self._epoch_examples = 0
        self._go_to(epoch=0, cursor=0, offset=0)

    @property
    def epoch(self) -> int:
        """Epochs finished, which is the number of the current one."""
        return self._epoch

    @property
    def num_documents(self) -> int:
        """Documents of one epoch."""
        return self._ends[-1]

    def __next__(self) -> Batch:
        num_rows = self._config.rows_per_batch
        rows: list[list[Example]] = []
        while len(rows) < num_rows:  # one example finishes one row at most, so none is left over
            rows.extend(self._packer.add(self._next_example()))
        batch = self._collate(rows)
        self.counts.batches += 1
        self.counts.scored_tokens += batch.num_scored_tokens
        return batch

    def one_pass(self) -> Iterator[Batch]:
        """Every document once, in order, with the noise of epoch 0: the same batches each time.

        Leaves the endless iteration as it is; the last batch may have fewer rows.

        Raises:
            ValueError: no document gives an example.
        """
        packer, num_rows = self._new_packer(), self._config.rows_per_batch
        rows: list[list[Example]] = []
        found = False
        for document in range(self.num_documents):
            for example in self._examples(0, document, ExampleCounts()):
                rows.extend(packer.add(example))
                found = True
                if len(rows) == num_rows:
                    yield self._collate(rows)
                    rows = []
        if not found:
            raise self._no_examples()
        rows.extend(packer.flush())
        for start in range(0, len(rows), num_rows):
            yield self._collate(rows[start : start + num_rows])

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, JSON-able."""
        return {
            "seed": self._config.seed,
            "shuffle": self._config.shuffle,
            "num_documents": self.num_documents,
            "epoch": self._epoch,
            "cursor": self._cursor,
            "offset": self._offset,
            "epoch_examples": self._epoch_examples,
            "packer": self._packer.state_dict(),
            "counts": asdict(self.counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`: the next batches are those of the run that never stopped.

        Raises:
            ValueError: the state belongs to another seed, order or number of documents, or to other texts.
        """
        for name in ("seed", "shuffle", "num_documents"):
            value = self.num_documents if name == "num_documents" else getattr(self._config, name)
            if state[name] != value:
                raise ValueError(
                    f"the saved state of the loader has {name} {state[name]}, this run has {value}; resume "
                    "with the data it was saved with, or start without its state"
                )
        self._packer.load_state_dict(state["packer"])
        self._go_to(epoch=state["epoch"], cursor=state["cursor"], offset=state["offset"])
        self._epoch_examples = state["epoch_examples"]
        # Last: making the examples of the open document again has counted them again.
        for name, count in state["counts"].items():
            setattr(self.counts, name, count)

    def _go_to(self, *, epoch: int, cursor: int, offset: int) -> None:
        """Open the document at `cursor` of an epoch's order and pass over `offset` of its examples."""
        self._epoch, self._cursor, self._offset = epoch, cursor, offset
        if self._config.shuffle:
            # num_documents keeps this stream apart from those of the documents, whose indices lie below it.
            rng = np.random.default_rng([self._config.seed, epoch, self.num_documents])
            self._order = rng.permutation(self.num_documents)
        else:
            self._order = np.arange(self.num_documents)
        self._current = self._examples(epoch, int(self._order[cursor]), self.counts)
        for _ in range(offset):
            if next(self._current, None) is None:
                raise ValueError(
                    f"document {self._order[cursor]} has fewer than the {offset} examples that were read of "
                    "it; resume with the sources, objective and lengths the state was saved with"
                )

    def _next_example(self) -> Example:
        while (example := next(self._current, None)) is None:
            self._finish_document()
        self._offset += 1
        self._epoch_examples += 1
        self.counts.examples += 1
        return example

    def _finish_document(self) -> None:
        self.counts.documents += 1
        if self._cursor + 1 < self.num_documents:
            self._cursor, self._offset = self._cursor + 1, 0
            self._current = self._examples(self._epoch, int(self._order[self._cursor]), self.counts)
            return
        if self._epoch_examples == 0:
            raise self._no_examples()
        self._epoch_examples = 0
        self._go_to(epoch=self._epoch + 1, cursor=0, offset=0)

    def _examples(self, epoch: int, document: int, counts: ExampleCounts) -> Iterator[Example]:
        number = next(n for n, end in enumerate(self._ends) if document < end)
        corpus = self._corpora[number]
        index = document - (self._ends[number] - len(corpus))
        rng = np.random.default_rng([self._config.seed, epoch, document])
        try:
            yield from self._maker.examples(corpus[index], rng, counts)
        except ValueError as error:
            raise ValueError(f"document {index} of source {number}: {error}") from error

    def _no_examples(self) -> ValueError:
        return ValueError(
            f"none of {self.num_documents} documents gave an example: texts need at least 2 tokens, and "
            "pairs longer than a row are skipped with max_length_action='skip'"
        )

    def _new_packer(self) -> Packer:
        config = self._config
        return Packer(config.source_length, config.target_length, packing=config.packing)

    def _collate(self, rows: list[list[Example]]) -> Batch:
        # Packed rows are nearly full, and one shape for all batches spares recompilation.
        lengths = (
            (self._config.source_length, self._config.target_length) if self._config.packing else (None, None)
        )
        return collate(rows, self._convention.pad_token_id, *lengths)
