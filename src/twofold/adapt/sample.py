"""A little text to measure a pair on before it is trained: PrefixLM examples of fixed lengths, by domain."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from twofold.data.convention import IGNORE_INDEX, Convention, make_example
from twofold.data.tokenize import encode
from twofold.models import EncoderDecoder
from twofold.models.stack import EncoderOutput
from twofold.objectives.prefix_lm import prefix_lm

ROWS_AT_ONCE = 4
"""Logits of so many rows exist at a time."""

HELD_OUT_SHARE = 10
"""Where something is fitted, every tenth document is held out: it chooses the ridge, and says how good the fit is."""


def default_texts() -> dict[str, list[str]]:
    """One domain that is on every machine: Python's own language reference, as `help()` shows it."""
    from pydoc_data.topics import topics

    # By length, for long runs of prose rather than one family of names that sorts together.
    found = sorted((text for text in topics.values() if len(text) > 1500), key=len)
    return {"python-docs": found[:: max(1, len(found) // 64)]}


def token_rows(
    model: EncoderDecoder, texts: Mapping[str, Sequence[str]], tokens: int, length: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Running text in rows, to fit on and to measure on: the domains' documents in turn.

    Args:
        tokens: in all, at most; a document gives only its share, up to four times the average.
        length: tokens of a row, at most.

    Returns:
        Token ids, int64 [at most `length`] each: of nine tenths of the documents, and of the others.

    Raises:
        ValueError: no tokenizer, or too little text for both parts.
    """
    if model.tokenizer is None:
        raise ValueError(
            "the model has no tokenizer, so it cannot be fitted on text; give it tokenizer files"
        )
    in_turn = itertools.zip_longest(*texts.values())
    documents = [text for texts_of_turn in in_turn for text in texts_of_turn if text]
    if len(documents) < 2:
        raise ValueError(
            f"a fit takes some documents to fit on and others to measure on; got {len(documents)}, give at least 2 "
            "(100 are better)"
        )
    most = max(length, 4 * tokens // len(documents))
    rows: dict[bool, list[Tensor]] = {True: [], False: []}
    left = tokens
    for i, text in enumerate(documents):
        # Characters enough for the tokens wanted; a tokenizer would take a novel whole.
        ids = encode(model.tokenizer, text[: 20 * most])[:most]
        for start in range(0, len(ids), length):
            row = torch.tensor(ids[start : start + length][:left])
            rows[i % min(HELD_OUT_SHARE, len(documents)) == 0].append(row)
            left -= len(row)
            if left <= 0:
                break
        if left <= 0:
            break
    if not rows[True] or not rows[False]:
        raise ValueError(
            f"{tokens} tokens of these {len(documents)} documents leave nothing to fit on or nothing to measure on; "
            "give more tokens or more documents"
        )
    return rows[False], rows[True]


class Sample:
    """Examples that are cut from the beginnings of documents, half read and half written."""

    def __init__(
        self,
        model: EncoderDecoder,
        texts: Mapping[str, Sequence[str]] | None = None,
        *,
        source_length: int,
        target_length: int,
        examples: int,
    ) -> None:
        """
        Args:
            model: for its tokenizer and convention.
            texts: domains by name, each a list of documents; only the first `source_length + target_length` tokens of
                a document count, and shorter ones are passed over. Default: `default_texts`.
            source_length, target_length: tokens read and written of each example.
            examples: documents of each domain, at most.

        Raises:
            ValueError: no tokenizer, or a domain with fewer than two documents that are long enough.
        """
        if model.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer, so it cannot be measured on text; give it tokenizer files"
            )
        self._model = model
        self._lengths = source_length, target_length
        self._batches = {
            name: self._cut(name, documents, examples)
            for name, documents in (texts or default_texts()).items()
        }

    @property
    def examples(self) -> dict[str, int]:
        """By domain."""
        return {name: sum(len(b[0]) for b in batches) for name, batches in self._batches.items()}

    def _cut(self, name: str, documents: Sequence[str], examples: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Source ids [B, S], decoder inputs [B, T] and labels [B, T] of each batch, without padding."""
        convention = Convention.of(self._model.config)
        source_length, target_length = self._lengths
        found = []
        for document in documents:
            # Characters enough for the tokens wanted; a tokenizer would take a novel whole.
            ids = encode(self._model.tokenizer, document[: 20 * (source_length + target_length)])
            if len(ids) < source_length + target_length:
                continue
            pair = prefix_lm(ids[: source_length + target_length], source_length)
            example = make_example(pair, convention, ends=False)
            found.append((example.source, example.decoder_input_ids, example.labels))
            if len(found) == examples:
                break
        if len(found) < 2:
            raise ValueError(
                f"domain {name!r} has {len(found)} documents of {source_length + target_length} tokens or more; give "
                "at least 2 (8 are better), or lower source_length and target_length"
            )
        batches = []
        for start in range(0, len(found), ROWS_AT_ONCE):
            columns = zip(*found[start : start + ROWS_AT_ONCE], strict=True)
            source, decoder_ids, labels = (torch.from_numpy(np.stack(column)) for column in columns)
            batches.append((source, decoder_ids, labels))
        return batches

    @torch.no_grad()
    def read(self, model: EncoderDecoder) -> dict[str, list[EncoderOutput]]:
        """What the model's encoder makes of the sources, for `losses` of decoders that read it."""
        device = next(model.parameters()).device
        return {
            name: [
                model.encode(source.to(device), torch.ones_like(source, device=device))
                for source, _, _ in batches
            ]
            for name, batches in self._batches.items()
        }

    @torch.no_grad()
    def losses(
        self, model: EncoderDecoder, read: Mapping[str, Sequence[EncoderOutput]] | None = None
    ) -> dict[str, Tensor]:
        """Mean loss of each example in nats per target token, float64 [examples] on the CPU, by domain.

        Args:
            model: with the tokenizer and the convention of the sample's.
            read: of `read`, where the encoder has read the sources already.
        """
        read = self.read(model) if read is None else read
        return {
            name: torch.cat([_loss(model, *pair) for pair in zip(batches, read[name], strict=True)])
            for name, batches in self._batches.items()
        }


def _loss(model: EncoderDecoder, batch: tuple[Tensor, Tensor, Tensor], source: EncoderOutput) -> Tensor:
    device = source.last_hidden_state.device
    _, decoder_ids, labels = (x.to(device) for x in batch)
    logits_BTV = model(decoder_input_ids=decoder_ids, encoder_output=source).logits
    losses = F.cross_entropy(logits_BTV.transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none")
    return (losses.double().sum(dim=1) / (labels != IGNORE_INDEX).sum(dim=1)).cpu()
