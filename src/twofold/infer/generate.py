"""Plain generation: encode once, then one decoder step per token, with the cache. Slow, and obviously right.

`generate` takes token ids and is the reference that the engine is held to.

Letters: B rows, S source tokens, P tokens of decoder prefixes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from twofold.infer.limits import check_inputs
from twofold.infer.padding import padded
from twofold.infer.sampling import Sampler, Sampling
from twofold.models import DecoderCache, EncoderDecoder


@dataclass(frozen=True)
class Generated:
    """What one row got."""

    token_ids: tuple[int, ...]
    """New tokens, without the decoder prefix, the end token included where one came."""
    finish_reason: Literal["stop", "length"]


@torch.no_grad()
def generate(
    model: EncoderDecoder,
    sources: Sequence[Sequence[int]],
    prefixes: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_token_ids: Sequence[int] | None = None,
) -> list[Generated]:
    """Continue each decoder prefix, given its source. Rows may have unequal lengths.

    Args:
        model: on any device; put into eval mode by the caller.
        sources: encoder token ids of each row; a row may be empty.
        prefixes: decoder token ids that are given, at least one per row (BOS, the last source token, or a chat
            template's assistant header).
        max_new_tokens: at most this many for each row.
        sampling: default greedy.
        stop_token_ids: a row ends after one of these; default the model's `eos_token_ids`.

    Raises:
        ValueError: no rows, unequal numbers of sources and prefixes, an empty prefix, an id outside the vocabulary, or
            a row that would pass `max_position_embeddings`.
    """
    _check(model, sources, prefixes, max_new_tokens)
    stop = set(model.config.eos_token_ids if stop_token_ids is None else stop_token_ids)
    device = next(model.parameters()).device
    source_ids, source_mask = padded(sources, "right", device)
    step_ids, step_mask = padded(prefixes, "left", device)
    sampler = Sampler(sampling or Sampling(), len(sources), device)

    encoder_output = model.encode(source_ids, source_mask)
    cache = DecoderCache()
    produced: list[list[int]] = [[] for _ in sources]
    is_open = [True] * len(sources)
    for _ in range(max_new_tokens):
        output = model(
            decoder_input_ids=step_ids,
            decoder_attention_mask=step_mask,
            encoder_output=encoder_output,
            cache=cache,
        )
        next_B = sampler.choose(output.logits[:, -1])
        for row, token in enumerate(next_B.tolist()):
            if is_open[row]:
                produced[row].append(token)
                is_open[row] = token not in stop
        if not any(is_open):
            break
        step_ids = next_B[:, None]
        step_mask = torch.tensor(is_open, device=device)[:, None]  # finished rows go on as padding
    return [
        Generated(tuple(tokens), "length" if still_open else "stop")
        for tokens, still_open in zip(produced, is_open, strict=True)
    ]


def _check(
    model: EncoderDecoder,
    sources: Sequence[Sequence[int]],
    prefixes: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> None:
    if not sources or len(sources) != len(prefixes):
        raise ValueError(
            f"need at least one source and one decoder prefix for each, got {len(sources)} sources and "
            f"{len(prefixes)} prefixes"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    for row, (source, prefix) in enumerate(zip(sources, prefixes, strict=True)):
        check_inputs(model.config, source, prefix, max_new_tokens, name=f"row {row}")
