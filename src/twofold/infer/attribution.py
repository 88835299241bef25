"""What an answer looked at: the attention of each of its tokens to the tokens of the source.

The weights are those the decoder computes with, in one pass over the given answer. The row of an answer token is that
of the query it was predicted by: the decoder position before it, whose input is the token before.

Where the rest of a row went depends on the layout. A `separate` cross-attention has a softmax over the source alone:
a row sums to 1. A `merged` layer has one softmax over the source and the decoder's own tokens; the weights on the
source are left as they are in it and sum to less than 1, and `own` is what they lack.

Letters: L layers, N heads, T answer tokens, S source tokens; P decoder prefix tokens; A keys that one layer attends to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from twofold.infer.limits import check_ids, check_inputs
from twofold.models import EncoderDecoder
from twofold.models.attention import Attention, attention_weights
from twofold.models.cache import KeyValues
from twofold.models.masks import AttentionMask

Keep = Literal["mean", "layers", "heads", "all"]
"""What is not averaged: nothing (one map), layers (each the mean of its heads), heads (each the mean over layers, of
head i in all of them), or both."""

_WEIGHTS_AT_ONCE = 2**24
"""Float32 weights of one layer that exist at the same time, 64 MiB: longer answers are taken in pieces."""


@dataclass(frozen=True)
class Attribution:
    """Attention weights of one answer. L and N are 1 where they were averaged."""

    weights: Tensor
    """float32 [L, N, T, S] on the CPU: on each source token; see the module for what a row sums to."""
    own: Tensor
    """float32 [L, N, T]: on the decoder's own tokens; 0 where cross-attention is a sub-layer of its own."""


@torch.no_grad()
def attribute(
    model: EncoderDecoder,
    source: Sequence[int],
    prefix: Sequence[int],
    answer: Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    keep: Keep = "mean",
) -> Attribution:
    """Attention of every answer token to every source token, from one pass of the model.

    Averages are taken layer by layer: besides the result, memory holds the weights of at most one layer, in pieces.

    Args:
        model: in evaluation mode.
        source: encoder token ids.
        prefix: decoder token ids before the answer, at least one.
        answer: token ids, given or generated, at least one.
        layers: of the decoder, each once; the result has them in this order. None: all.
        heads: of each layer, likewise.
        keep: see there. `all` takes 4 L N T S bytes: 560 MB for 26 layers, 8 heads, 450 and 1,500 tokens.

    Raises:
        ValueError: an empty source or answer, a layer or head that does not exist or comes twice, ids outside the
            vocabulary, or more tokens than the model has positions.
    """
    config = model.config.decoder
    if len(source) == 0 or len(answer) == 0:
        raise ValueError(
            f"attribution needs a source and an answer, got {len(source)} and {len(answer)} tokens; give both"
        )
    if keep not in ("mean", "layers", "heads", "all"):
        raise ValueError(f"unknown keep={keep!r}; use 'mean', 'layers', 'heads' or 'all'")
    # The last token is predicted, and never read: it needs no position.
    check_inputs(model.config, source, prefix, len(answer) - 1, name="the answer")
    check_ids(model.config, answer, "the answer")
    chosen_layers = _chosen(layers, config.num_hidden_layers, "layers")
    chosen_heads = _chosen(heads, config.num_attention_heads, "heads")

    device = model.lm_head.out_proj.weight.device
    decoder_ids = torch.tensor([[*prefix, *answer[:-1]]], device=device)
    collector = _Collector(chosen_layers, chosen_heads, len(source), len(answer), keep)
    encoded = model.encode(torch.tensor([source], device=device), torch.ones(1, len(source), device=device))
    model.decoder(decoder_ids, torch.ones_like(decoder_ids), encoded, observe=collector)
    return Attribution(collector.weights.cpu(), collector.own.cpu())


def _chosen(given: Sequence[int] | None, n: int, name: str) -> list[int]:
    chosen = list(range(n)) if given is None else list(given)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(n)):
        raise ValueError(f"{name} must be different numbers from 0 to {n - 1}, at least one, got {chosen}")
    return chosen


class _Collector:
    """Observes the decoder layer by layer, and keeps what is wanted of its weights."""

    def __init__(self, layers: list[int], heads: list[int], n_source: int, n_answer: int, keep: Keep) -> None:
        self._layers, self._heads, self._n_source, self._n_answer = layers, heads, n_source, n_answer
        self._keeps_layers, self._keeps_heads = keep in ("layers", "all"), keep in ("heads", "all")
        self._next_layer = 0
        n_layers, n_heads = len(layers) if self._keeps_layers else 1, len(heads) if self._keeps_heads else 1
        self._shape = (n_layers, n_heads, n_answer)
        self.weights = torch.empty(0)
        self.own = torch.empty(0)

    def __call__(self, attention: Attention, q_BNTH: Tensor, seen: KeyValues, mask: AttentionMask) -> None:
        layer, self._next_layer = self._next_layer, self._next_layer + 1
        if layer == 0:
            self.weights = torch.zeros(*self._shape, self._n_source, device=q_BNTH.device)
            self.own = torch.zeros(self._shape, device=q_BNTH.device)
        if layer not in self._layers:
            return
        place = self._layers.index(layer) if self._keeps_layers else 0
        share = 1.0 if self._keeps_layers else 1.0 / len(self._layers)
        n_queries, n_groups = q_BNTH.shape[2], attention.n_heads // attention.n_kv_heads
        keys_1NAH = seen.keys[:, [head // n_groups for head in self._heads]].float()
        step = max(1, _WEIGHTS_AT_ONCE // (len(self._heads) * seen.length))
        for start in range(n_queries - self._n_answer, n_queries, step):
            rows = slice(start, min(start + step, n_queries))
            weights_NTA = attention_weights(
                q_BNTH[:, self._heads, rows].float(),
                keys_1NAH,
                mask.dense[:, rows],
                scale=attention.scale,
                softcap=attention.softcap,
            )[0]
            if not self._keeps_heads:
                weights_NTA = weights_NTA.mean(dim=0, keepdim=True)
            answered = slice(rows.start - n_queries + self._n_answer, rows.stop - n_queries + self._n_answer)
            self.weights[place, :, answered] += share * weights_NTA[..., : self._n_source]
            self.own[place, :, answered] += share * weights_NTA[..., self._n_source :].sum(dim=-1)
