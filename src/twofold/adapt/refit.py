"""A decoder that has lost layers, mended in closed form before it is trained.

Where layers are taken out, the layer before the gap leaves the residual stream as the next one has never seen it. The
projection with which each layer that is left closes (`mlp.down_proj`) is fitted anew, one layer after another, so that
the stream comes as near as it can to what the whole decoder's next kept layer reads, and in the end to what its final
norm reads. What a layer adds is linear in that projection, so this is a ridge regression towards the weights it had

    min_W  mean_n |wanted_n - W a_n|^2 / |stream_n|^2  +  strength * mean |a|^2 * |W - W_0|^2 / F

with a what the projection reads, computed behind the layers that were fitted before. Each token weighs by the inverse
of its stream's squared length, since what reads the stream norms it. Nothing is added to the decoder: it stays as
small as it is. (A linear map in place of the layers that are gone, folded into the projection before it, is the idea
of ReplaceMe, arXiv 2505.02819; here the whole projection is fitted, and so is every later one.)

Letters: B batch, T target tokens, N tokens, D decoder width, F MLP width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from twofold.adapt.sample import ROWS_AT_ONCE, default_texts, token_rows
from twofold.data import Batch, Convention, collate
from twofold.data.convention import make_example
from twofold.models import EncoderDecoder
from twofold.models.stack import DecoderBlock
from twofold.objectives.prefix_lm import prefix_lm

DEFAULT_TOKENS = 40_000

NEGLIGIBLE = 1e-6
"""Relative squared distance below which a layer is as it should be: there is no gap behind it, nor before."""

RIDGES = (1e-2, 1e-1, 1.0, 10.0)
"""Strengths that are tried."""


@dataclass(frozen=True)
class LayerRefit:
    """One layer; squared distances from what is wanted to the stream behind the layer, relative to the squared length
    of what is wanted, mean over held-out tokens."""

    layer: int
    """Its number in the whole decoder."""
    ridge: float | None
    """The strength that came nearest; None: the weights it had did."""
    before: float
    after: float


@dataclass(frozen=True)
class Refit:
    """New projections for a decoder with fewer layers."""

    tokens: int
    """Of targets, fitted on."""
    held_out_tokens: int
    layers: tuple[LayerRefit, ...]
    weights: Mapping[str, Tensor] = field(repr=False)
    """[D, F], by the names of the short pair's parameters."""

    def as_json(self) -> dict[str, Any]:
        """All but the weights, for a file."""
        return {
            "tokens": self.tokens,
            "held_out_tokens": self.held_out_tokens,
            "layers": [asdict(layer) for layer in self.layers],
        }


Fitted = tuple[LayerRefit, Tensor]
"""A layer, and its new projection."""


@dataclass
class _Tokens:
    """A batch on its way through the short decoder."""

    stream_BTD: Tensor
    """What the next layer to be fitted reads."""
    memory: list[Tensor]
    views: list[Any]
    """Of each kept layer: its other arguments."""
    wanted: list[Tensor]
    """[B, T, D] for each kept layer: the stream behind it in the whole decoder, where the next kept layer begins."""


def refit_decoder(
    model: EncoderDecoder,
    layers: Sequence[int],
    texts: Mapping[str, Sequence[str]] | None = None,
    *,
    tokens: int = DEFAULT_TOKENS,
    length: int = 256,
    watch: Callable[[Iterator[Fitted], int], Iterator[Fitted]] = lambda layers, total: layers,
) -> Refit:
    """Fit what the kept layers of a decoder write to what its other layers would have made of it.

    Takes one pass of the whole pair over the text, and one of the kept layers. Streams of all target tokens are held in
    memory, two for each kept layer.

    Args:
        model: the whole pair, with a tokenizer, in the merged layout; left as it was.
        layers: of its decoder that are kept, in order.
        texts: domains by name, each a list of documents. Default: `default_texts`.
        tokens: read and written in all, at most; half of them are targets.
        length: tokens of an example: half is read, half is written.
        watch: wraps the layers as they are fitted, with their number, for a progress bar.

    Raises:
        ValueError: a family that norms what the MLP adds, so that it is not linear in the projection; another layout;
            and as `token_rows`.
    """
    config = model.config
    if config.decoder.post_norms or config.layout != "merged":
        raise ValueError(
            "refitting needs a stream to which the MLP's last projection adds as it is, in the merged layout; got "
            f"layout={config.layout!r}, post_norms={config.decoder.post_norms}. Train the short decoder instead"
        )
    length = min(length, config.decoder.max_position_embeddings) // 2 * 2
    parts = token_rows(model, texts or default_texts(), tokens, length)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            read = [
                [_read(model, batch, layers) for batch in _examples(model, rows, length)] for rows in parts
            ]
            fitted = list(watch(_fit(model, layers, *read), len(layers)))
    finally:
        model.train(was_training)
    n_fitted, n_held_out = (sum(batch.stream_BTD.shape[:2].numel() for batch in part) for part in read)
    return Refit(
        n_fitted,
        n_held_out,
        tuple(layer for layer, _ in fitted),
        {f"model.decoder.layers.{i}.mlp.down_proj.weight": weight for i, (_, weight) in enumerate(fitted)},
    )


def _examples(model: EncoderDecoder, rows: Sequence[Tensor], length: int) -> Iterator[Batch]:
    """PrefixLM of the rows that are whole, half read and half written; nothing is padded."""
    convention = Convention.of(model.config)
    examples = [
        [make_example(prefix_lm(row.numpy(), length // 2), convention, ends=False)]
        for row in rows
        if len(row) == length
    ]
    if not examples:
        raise ValueError(
            f"no document has {length} tokens, so no part of a decoder can be fitted on them; give longer documents, "
            "or lower length"
        )
    for start in range(0, len(examples), ROWS_AT_ONCE):
        yield collate(examples[start : start + ROWS_AT_ONCE], convention.pad_token_id)


def _read(model: EncoderDecoder, batch: Batch, layers: Sequence[int]) -> _Tokens:
    """What the whole pair makes of a batch, as far as the kept layers need it."""
    calls: list[tuple[Any, ...]] = []
    ends: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda _, args: calls.append(args)) for block in model.decoder.layers
    ]
    handles.append(model.decoder.norm.register_forward_pre_hook(lambda _, args: ends.append(args[0])))
    batch = batch.to(next(model.parameters()).device)
    try:
        model.states(
            input_ids=batch.input_ids,
            segment_ids=batch.segment_ids,
            decoder_input_ids=batch.decoder_input_ids,
            decoder_segment_ids=batch.decoder_segment_ids,
        )
    finally:
        for handle in handles:
            handle.remove()
    _, memory, views, _ = zip(*calls, strict=True)
    wanted = [calls[i][0] for i in layers[1:]] + ends
    return _Tokens(calls[0][0], [memory[i] for i in layers], [views[i] for i in layers], wanted)


class _Sums:
    """Over tokens, each by its weight: of a a^T, y a^T and |y|^2, where y is what the projection should add."""

    def __init__(self, d_model: int, d_ff: int, device: torch.device) -> None:
        zeros: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.inputs_FF, self.both_DF = torch.zeros(d_ff, d_ff, **zeros), torch.zeros(d_model, d_ff, **zeros)
        self.outputs, self.tokens = 0.0, 0

    def add(self, a_BTF: Tensor, y_BTD: Tensor, weight_BT: Tensor) -> None:
        root_N1 = weight_BT.double().sqrt().flatten()[:, None]
        a_NF, y_ND = a_BTF.double().flatten(0, 1) * root_N1, y_BTD.double().flatten(0, 1) * root_N1
        self.inputs_FF.addmm_(a_NF.T, a_NF)
        self.both_DF.addmm_(y_ND.T, a_NF)
        self.outputs += y_ND.square().sum().item()
        self.tokens += len(y_ND)

    def distance(self, weight_DF: Tensor) -> float:
        """Mean over tokens of weight * |y - W a|^2."""
        crossed = (weight_DF * self.both_DF).sum() * 2
        squared = ((weight_DF @ self.inputs_FF) * weight_DF).sum()
        return (self.outputs - crossed.item() + squared.item()) / self.tokens


def _fit(
    model: EncoderDecoder, layers: Sequence[int], fitted: list[_Tokens], held_out: list[_Tokens]
) -> Iterator[Fitted]:
    """Each kept layer with its new projection, in order; streams go on through it."""
    for place, i in enumerate(layers):
        block = model.decoder.layers[i]
        assert isinstance(block, DecoderBlock)
        projection = block.mlp.down_proj
        old_DF = projection.weight.double()
        d_model, d_ff = old_DF.shape
        sums = [_Sums(d_model, d_ff, old_DF.device) for _ in range(2)]
        inner: list[tuple[_Tokens, Tensor]] = []
        for of_part, batches in zip(sums, (fitted, held_out), strict=True):
            for batch in batches:
                x_BTD, _ = block.attend(batch.stream_BTD, batch.memory[place], batch.views[place], None)
                a_BTF = block.mlp.inner(block.pre_feedforward_layernorm(x_BTD))
                batch.stream_BTD = x_BTD if projection.bias is None else x_BTD + projection.bias
                wanted_BTD = batch.wanted[place]
                weight_BT = 1.0 / wanted_BTD.double().square().sum(dim=-1)
                of_part.add(a_BTF, wanted_BTD - batch.stream_BTD, weight_BT)
                inner.append((batch, a_BTF))
        before = sums[1].distance(old_DF)
        best, ridge, new_DF = before, None, old_DF
        strengths = RIDGES if before > NEGLIGIBLE else ()
        for strength, tried_DF in zip(strengths, _ridge_fits(sums[0], old_DF, strengths), strict=True):
            distance = sums[1].distance(tried_DF)
            if distance < best:
                best, ridge, new_DF = distance, strength, tried_DF
        weight = new_DF.to(projection.weight.dtype)
        for batch, a_BTF in inner:
            batch.stream_BTD = batch.stream_BTD + F.linear(a_BTF, weight)
        yield LayerRefit(i, ridge, before, best), weight


def _ridge_fits(sums: _Sums, old_DF: Tensor, ridges: Sequence[float]) -> Iterator[Tensor]:
    """The projection for each strength."""
    if not ridges:
        return
    variances_F, axes_FF = torch.linalg.eigh(sums.inputs_FF)
    missing_DF = (sums.both_DF - old_DF @ sums.inputs_FF) @ axes_FF
    for ridge in ridges:
        penalised_F = variances_F.clamp(min=0) + ridge * variances_F.mean()
        yield old_DF + (missing_DF / penalised_F) @ axes_FF.T
