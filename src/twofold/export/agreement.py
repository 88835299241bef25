"""Whether an export computes what the model computes: log-probabilities of random tokens, one by one."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twofold.config import EncoderDecoderConfig
from twofold.models import EncoderDecoder

Sample = tuple[list[int], list[int]]
"""Source ids, and decoder ids with their start token."""

Run = Callable[[Sequence[Sample]], list[Tensor]]
"""Runs what was written: for each sample the log-probability of every decoder token after the first, [tokens - 1]."""

LENGTHS = ((1, 2), (5, 9), (17, 12), (40, 25))
"""Source and decoder tokens of the samples; fewer where the model takes less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """How an export is run."""

    run: Run
    """With the weights in float32; has to agree with the model."""
    run_rounded: Run | None = None
    """With the weights as they were written, where they were rounded: how far off it is, is reported."""
    max_source: int | None = None
    """Source tokens up to which the program that runs it is right."""


def samples(config: EncoderDecoderConfig, max_source: int | None = None) -> list[Sample]:
    """Random tokens, special ones left out, always the same; sources and targets begin as the pair's do."""
    rng = random.Random(0)
    special = {config.pad_token_id, config.bos_token_id, config.eoi_token_id, *config.eos_token_ids}
    ordinary = [token for token in range(config.decoder.vocab_size) if token not in special]
    limit = config.decoder.max_position_embeddings // 2
    longest = min(config.encoder.max_position_embeddings, limit, max_source or limit)
    found = []
    for n_source, n_target in LENGTHS:
        source = rng.choices(ordinary, k=min(n_source, longest))
        target = rng.choices(ordinary, k=max(2, min(n_target, limit)))
        if config.bos_token_id is not None:
            if config.source_bos:
                source = [config.bos_token_id, *source][:longest]
            if config.decoder_start == "bos":
                target[0] = config.bos_token_id
        found.append((source, target))
    return found


def in_float32(model: EncoderDecoder) -> EncoderDecoder:
    """The model on the CPU in float32 and eval mode; parameters that are so already are shared, not copied."""
    with torch.device("meta"):
        twin = EncoderDecoder(model.config)
    state = {name: p.detach().to("cpu", torch.float32) for name, p in model.named_parameters()}
    twin.load_state_dict(state, assign=True, strict=False)  # shared parameters come under one name
    twin.tie_weights()
    twin.tokenizer = model.tokenizer
    return twin.eval()


@torch.no_grad()
def expected_logprobs(model: EncoderDecoder, given: Sequence[Sample]) -> list[Tensor]:
    """`Run` of the model itself."""
    found = []
    for source, target in given:
        ids, decoder_ids = torch.tensor([source]), torch.tensor([target[:-1]])
        logits = model(ids, torch.ones_like(ids), decoder_ids, torch.ones_like(decoder_ids)).logits
        found.append(chosen_logprobs(logits, target))
    return found


def chosen_logprobs(logits_1TV: Tensor, target: Sequence[int]) -> Tensor:
    """float32 [T]: of each token after the first, given logits [1, T, V] that were computed from those before."""
    logprobs_TV = logits_1TV[0].float().log_softmax(dim=-1)
    return logprobs_TV.gather(1, torch.tensor(target[1:])[:, None])[:, 0]


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """NaN where one of them is no number."""
    pairs = zip(found, expected, strict=True)
    return torch.cat([(ours - theirs).abs() for ours, theirs in pairs]).max().item()
