"""The study's text: three domains, cut by document into what is trained on, profiled on and measured on."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from twofold.config.data import DataConfig, SourceConfig
from twofold.data import Batch, Convention, collate
from twofold.data.convention import make_example
from twofold.data.tokenize import encode
from twofold.objectives.prefix_lm import prefix_lm

DOMAINS = {
    "novels": "corpora/novels55.jsonl.gz",
    "technical": "corpora/peps.jsonl.gz",
    "web": "corpora/c4_demo.jsonl.gz",
}
"""Files under $TWOFOLD_DATA with a `text` a line: English novels, Python's PEPs, C4."""

PIECE = 1600
"""Characters of one measured or profiled piece; 256 tokens take about 1,100."""

CHARACTERS_TRAINED = 4_000_000
"""Of each domain, at most; more would be tokenised and never read."""


class Texts:
    """One tenth of the documents is measured on, one tenth profiled on, the rest trained on: a hash of each decides."""

    def __init__(self, data: Path) -> None:
        self.folder = data
        self._documents: dict[str, dict[str, list[str]]] = {}
        for domain, name in DOMAINS.items():
            parts: dict[str, list[str]] = {"measure": [], "profile": [], "train": []}
            with gzip.open(data / name, "rt", encoding="utf-8") as lines:
                for line in lines:
                    text = json.loads(line)["text"]
                    tenth = hashlib.sha256(text.encode()).digest()[0] % 10
                    parts[{0: "measure", 1: "profile"}.get(tenth, "train")].append(text)
            self._documents[domain] = parts

    def pieces(self, part: str, count: int) -> dict[str, list[str]]:
        """`count` pieces of running text of each domain, the same every time; a document gives one after another."""
        found = {}
        for domain, parts in self._documents.items():
            rng = random.Random(0)
            documents = sorted(parts[part], key=len, reverse=True)
            # Long documents give several pieces where there are few of them, such as novels.
            starts = [
                (n, start)
                for n, text in enumerate(documents)
                for start in range(0, len(text) - PIECE, 40_000)
            ]
            chosen = rng.sample(starts, min(count, len(starts)))
            found[domain] = [_from_a_word(documents[n], start) for n, start in chosen]
        return found

    def training_data(
        self, folder: Path, *, rows: int, source_length: int, target_length: int, **settings: Any
    ) -> DataConfig:
        """All domains alike, written into a folder: one packed row of so many examples in a batch.

        Args:
            settings: other fields of the configuration.
        """
        files = self._write_training_files(folder)
        return DataConfig(
            sources=tuple(SourceConfig(path=str(path), weight=1.0) for path in files.values()),
            source_length=source_length * rows,
            target_length=target_length * rows,
            max_text_length=source_length + target_length,
            rows_per_batch=1,
            **settings,
        )

    def _write_training_files(self, folder: Path) -> dict[str, Path]:
        """One JSON-lines file of each domain."""
        files = {}
        for domain, parts in self._documents.items():
            rng = random.Random(0)
            documents = sorted(parts["train"])
            rng.shuffle(documents)
            files[domain] = folder / f"{domain}.jsonl"
            left = CHARACTERS_TRAINED
            with files[domain].open("w", encoding="utf-8") as file:
                for text in documents:
                    if left <= 0:
                        break
                    file.write(json.dumps({"text": text[:left]}) + "\n")
                    left -= len(text)
        return files


def _from_a_word(text: str, start: int) -> str:
    """A piece that begins after white space: a cut word at the start would be read as another one."""
    while start and start < len(text) and not text[start - 1].isspace():
        start += 1
    return text[start : start + PIECE]


def batches(
    pieces: Sequence[str],
    tokenizer: Any,
    convention: Convention,
    source_length: int,
    target_length: int,
) -> Iterator[Batch]:
    """One PrefixLM example of exactly these lengths in each batch; pieces that are too short are passed over."""
    for piece in pieces:
        ids = encode(tokenizer, piece)[: source_length + target_length]
        if len(ids) == source_length + target_length:
            example = make_example(prefix_lm(ids, source_length), convention, ends=False)
            yield collate([[example]], convention.pad_token_id)
