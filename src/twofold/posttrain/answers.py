"""Several answers to one source, which the encoder reads once: what preferences and reinforcement learning train on.

B: sources. S: source positions. R: answers of all sources. T: decoder positions. N: scored labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twofold.data import Batch
from twofold.data.batch import IGNORE_INDEX, Texts
from twofold.data.convention import Example
from twofold.models import EncoderDecoder
from twofold.train.loss import chunked_logprobs


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswersBatch(Batch):
    """A batch whose decoder rows name the source they answer: one source a row on one side, one answer a row on the
    other. Of `Batch`, the decoder's tensors have R rows here, all in segment 1."""

    source_of: Tensor
    """int64 [R]: the row of `input_ids` that an answer is to."""

    @property
    def num_answers(self) -> int:
        return len(self.source_of)

    def texts(self) -> Iterator[Texts]:
        """Of every source its first answer."""
        before = -1
        for row, n in enumerate(self.source_of.tolist()):
            if n != before:
                yield self._texts(self.input_ids[n][self.segment_ids[n] == 1], row, 1)
            before = n


def answer_tensors(answers: Sequence[Sequence[Example]], pad_token_id: int) -> dict[str, Tensor]:
    """The fields of an `AnswersBatch`, padded on the right.

    Args:
        answers: for every source its answers, as examples that share it.
        pad_token_id: fills both inputs; labels are padded with IGNORE_INDEX.

    Raises:
        ValueError: a source without an answer, or answers of one group to different sources.
    """
    for n, group in enumerate(answers):
        if not group:
            raise ValueError(f"source {n} has no answer; leave it out")
        if any(len(e.source) != len(group[0].source) or (e.source != group[0].source).any() for e in group):
            raise ValueError(f"the answers of group {n} are to different sources; make a group of each")
    rows = [example for group in answers for example in group]
    n_source = max(len(group[0].source) for group in answers)
    n_target = max(example.decoder_length for example in rows)
    input_ids = torch.full((len(answers), n_source), pad_token_id)
    segment_ids = torch.zeros_like(input_ids)
    decoder_input_ids = torch.full((len(rows), n_target), pad_token_id)
    decoder_segment_ids = torch.zeros_like(decoder_input_ids)
    labels = torch.full_like(decoder_input_ids, IGNORE_INDEX)
    for n, group in enumerate(answers):
        source = torch.from_numpy(group[0].source)
        input_ids[n, : len(source)] = source
        segment_ids[n, : len(source)] = 1
    for n, example in enumerate(rows):
        decoder_input_ids[n, : example.decoder_length] = torch.from_numpy(example.decoder_input_ids)
        decoder_segment_ids[n, : example.decoder_length] = 1
        labels[n, : example.decoder_length] = torch.from_numpy(example.labels)
    counts = torch.tensor([len(group) for group in answers])
    return {
        "input_ids": input_ids,
        "segment_ids": segment_ids,
        "decoder_input_ids": decoder_input_ids,
        "decoder_segment_ids": decoder_segment_ids,
        "labels": labels,
        "source_of": torch.arange(len(answers)).repeat_interleave(counts),
    }


def label_logprobs(
    model: EncoderDecoder, batch: AnswersBatch, scored: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Log-probability of every scored label, float32 [N], with gradients; sources are encoded once.

    Args:
        batch: on the model's device.
        scored: int64 [N], see `scored_positions`.
        temperature: what logits are divided by before the softmax.
    """
    encoded = model.encode(batch.input_ids, segment_ids=batch.segment_ids).select(batch.source_of)
    states_RTD, _, _ = model.states(
        decoder_input_ids=batch.decoder_input_ids,
        decoder_segment_ids=batch.decoder_segment_ids,
        encoder_output=encoded,
    )
    head = model.lm_head
    labels_N = batch.labels.flatten()[scored]
    states_ND = states_RTD.flatten(0, 1)[scored]
    softcap = head.softcap
    if temperature != 1.0:
        # cap tanh(z / cap) / t = (cap / t) tanh((z / t) / (cap / t))
        states_ND = states_ND / temperature
        softcap = None if softcap is None else softcap / temperature
    return chunked_logprobs(states_ND, labels_N, head.out_proj.weight, softcap=softcap)


def per_answer(values_N: Tensor, batch: AnswersBatch, scored: Tensor) -> Tensor:
    """Sums over the labels of each answer, [R]."""
    row_N = scored // batch.labels.shape[1]
    return values_N.new_zeros(batch.num_answers).index_add(0, row_N, values_N)
