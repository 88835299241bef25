"""Reward models: the encoder of a pair reads a prompt and a reply as one text, and a head gives it a number.

B: texts. S: tokens of a text. E: width of the encoder. P: pairs. K: bins of confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from twofold.checkpoint import resolve
from twofold.checkpoint.load import fill, read_config
from twofold.data import Batch, Convention, Example
from twofold.data.chat import Messages, record_to_example
from twofold.infer.limits import check_source
from twofold.infer.padding import padded
from twofold.models import EncoderDecoder, EncoderModel
from twofold.models.encoder_decoder import locate_tokens
from twofold.models.heads import ClassificationHead, last_token
from twofold.objectives.pair import Tokens
from twofold.posttrain.pairs import Collate, Pair
from twofold.posttrain.preferences import share_above_zero
from twofold.train.step import Objective

_BATCH_TOKENS = 8192
"""In one batch of `RewardModel.score`, padding included."""

_NUM_BINS = 10
"""Of the calibration error, between a confidence of 0.5 and 1."""


class RewardModel(EncoderModel):
    """An encoder, and one number for each text, read at its last token: the stop token of the reply.

    Rewards mean something in comparison only: sigmoid(r_a - r_b) is how likely reply a is preferred to b. What all
    replies to a prompt have in common is not learned.
    """

    new_modules = ("head",)

    def __init__(self, model: EncoderDecoder) -> None:
        """`model`: its encoder is used, and trained with the head; the decoder is not kept."""
        super().__init__(model.config)
        self.tokenizer, self.adaptation, self.history = model.tokenizer, model.adaptation, model.history
        self.encoder = model.encoder
        self.head = ClassificationHead(
            model.config.encoder.hidden_size, 1, model.config.classifier_dropout_rate
        )

    @classmethod
    def of_pair(cls, model: EncoderDecoder, seed: int) -> Self:
        """A model to be trained. The head's weights are drawn from normal(0, 1 / (E + 1)) (Stiennon et al. 2020, arXiv
        2009.01325), so that rewards start near 0 whatever the width."""
        reward_model = cls(model)
        layer = reward_model.head.out_proj
        noise = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            layer.weight.copy_(noise / (layer.in_features + 1) ** 0.5)
            layer.bias.zero_()
        return reward_model.train(model.training)

    def forward(self, input_ids: Tensor, is_real: Tensor) -> Tensor:
        """Rewards, float32 [B].

        Args:
            input_ids: int64 [B, S], see `whole_text`.
            is_real: bool or int [B, S]; 0 is padding, on either side.
        """
        output = self.encoder(input_ids, locate_tokens(self.config, "encoder", input_ids, is_real))
        rewards_B1: Tensor = self.head(last_token(output.last_hidden_state, output.tokens))
        return rewards_B1[:, 0].float()

    @torch.no_grad()
    def score(self, prompts: Sequence[str | Messages], replies: Sequence[str]) -> Tensor:
        """Rewards of replies, each to its prompt, float32 [B] on the CPU; without dropout, the mode stays as it was.

        Args:
            prompts: texts (a user's turn, where the tokenizer has a chat template) or conversations.
            replies: as many.

        Raises:
            ValueError: not as many, no tokenizer, an empty reply, a text that is too long, or one that the chat
                template or the convention refuses.
        """
        if self.tokenizer is None:
            raise ValueError(
                "the reward model has no tokenizer to read text with; put its files into the folder"
            )
        if len(prompts) != len(replies):
            raise ValueError(f"every reply needs its prompt: got {len(prompts)} and {len(replies)}")
        convention = Convention.of(self.config)
        texts: list[list[int]] = []
        for n, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
            record = (
                {"prompt": prompt, "completion": reply}
                if isinstance(prompt, str)
                else {"messages": [*prompt, {"role": "assistant", "content": reply}]}
            )
            example = record_to_example(record, self.tokenizer, convention)
            texts.append(whole_text(example, convention).tolist())
            check_source(self.config, texts[-1], name=f"prompt and reply {n}")
        was_training, device = self.training, self.head.out_proj.weight.device
        self.eval()
        rewards = torch.empty(len(texts))
        try:
            for rows in _by_length([len(text) for text in texts]):
                rewards[rows] = self(*padded([texts[n] for n in rows], "right", device)).cpu()
        finally:
            self.train(was_training)
        return rewards


def whole_text(example: Example, convention: Convention) -> Tokens:
    """Prompt and reply as one text, int64 [S]: the source, what the decoder is given of the text, and the target with
    its stop token. A BOS that only starts a decoder is no part of it."""
    given = example.decoder_prefix if convention.decoder_start == "last_source_token" else ()
    return np.concatenate([example.source, np.asarray(given, dtype=np.int64), example.target])


def load_reward_model(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> RewardModel:
    """Read a reward model that stage `reward` wrote, in eval mode. Arguments as for `twofold.load`.

    Raises:
        ValueError: no reward model, or tensors that do not fit its config.json.
        FileNotFoundError: nothing is there.
    """
    checkpoint = resolve(path)
    if checkpoint.config.get("architectures") != ["RewardModel"]:
        raise ValueError(
            f"{checkpoint.name} is no reward model (architectures in its config.json: "
            f"{checkpoint.config.get('architectures')}); train one with stage: reward"
        )
    config, _ = read_config(checkpoint)
    with torch.device("meta"):
        model = RewardModel(EncoderDecoder(config))
    return fill(model, checkpoint, None, dtype=dtype, device=device)


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardBatch(Batch):
    """Texts for an encoder alone: the chosen reply of each pair with its prompt, then the rejected one, in rows of
    their own. The decoder's tensors are empty."""

    margins: Tensor
    """float32 [P]: by how much the rewards should differ."""

    @property
    def num_scored_tokens(self) -> int:
        """Texts that get a reward."""
        return len(self.input_ids)


class RewardObjective(Objective[RewardModel]):
    """Bradley-Terry: the chosen reply of a pair wins with probability sigmoid(r_c - r_r).

    The loss of a pair is -log sigmoid(r_c - r_r - margin) (Stiennon et al. 2020, arXiv 2009.01325, section 3.4; the
    margin as in Llama 2, arXiv 2307.09288, equation 2).

    Metrics: `accuracy`, how often the chosen reply has the higher reward (a tie counts half); `margin`, the mean of
    r_c - r_r; `calibration_error` (Guo et al. 2017, arXiv 1706.04599, equation 3): the confidence sigmoid(|r_c - r_r|)
    of each pair against whether it was right, in 10 bins from 0.5 to 1, sum over bins of |mean right - mean confidence|
    weighted with the bin's share of the pairs (of one batch, where a step has few pairs, it says little).
    """

    metric_names = ("accuracy", "margin", *(f"gap_{k}" for k in range(_NUM_BINS)))

    def forward(self, batch: Batch, scored: Tensor) -> Tensor:
        """See `Objective.forward`; the batch is a `RewardBatch`."""
        assert isinstance(batch, RewardBatch)
        device = batch.input_ids.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            rewards_P2 = self.model(batch.input_ids, batch.segment_ids).view(-1, 2)
        margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
        self.note(share_above_zero(margins_P), margins_P.sum(), *_gaps(margins_P.detach()))
        return -F.logsigmoid(margins_P - batch.margins).sum()

    def count(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch.input_ids) // 2

    def reported(self, means: dict[str, float]) -> dict[str, float]:
        """See `Objective.reported`."""
        gaps = [means[f"gap_{k}"] for k in range(_NUM_BINS)]
        told = {name: mean for name, mean in means.items() if not name.startswith("gap_")}
        return told | {"calibration_error": sum(map(abs, gaps))}


def _gaps(margins_P: Tensor) -> Tensor:
    """Sum over the pairs of each bin of (right - confidence), float32 [K]; a tie is half right."""
    confidence_P = torch.sigmoid(margins_P.abs())
    right_P = (margins_P.sign() + 1) / 2
    bin_P = ((confidence_P - 0.5) * 2 * _NUM_BINS).long().clamp(max=_NUM_BINS - 1)
    return torch.zeros(_NUM_BINS, device=margins_P.device).index_add(0, bin_P, right_P - confidence_P)


def collate_texts(convention: Convention) -> Collate:
    """What makes a `RewardBatch` of pairs."""

    def collate(pairs: Sequence[Pair], numbers: Sequence[int]) -> RewardBatch:
        replies = [reply for pair in pairs for reply in (pair.chosen, pair.rejected)]
        texts = [whole_text(reply, convention) for reply in replies]
        input_ids = torch.full((len(texts), max(map(len, texts))), convention.pad_token_id)
        segment_ids = torch.zeros_like(input_ids)
        for n, text in enumerate(texts):
            input_ids[n, : len(text)] = torch.from_numpy(text)
            segment_ids[n, : len(text)] = 1
        empty = input_ids[:, :0]
        return RewardBatch(
            input_ids=input_ids,
            segment_ids=segment_ids,
            decoder_input_ids=empty,
            decoder_segment_ids=empty,
            labels=empty,
            documents=tuple(pair.where for pair in pairs),
            margins=torch.tensor([pair.margin for pair in pairs]),
        )

    return collate


def _by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Row numbers in batches of similar length."""
    batches: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lambda n: lengths[n]):
        if not batches or (len(batches[-1]) + 1) * lengths[n] > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(n)
    return batches
