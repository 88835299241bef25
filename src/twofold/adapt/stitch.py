"""Closed-form stitching: a decoder reads an encoder of another width before anything is trained.

Where two donors differ, the decoder's k and v projections cannot take what the encoder's layers read. But on the same
text both streams stand for the same tokens, so a linear map M from what encoder layer `aligned_layers[l]` reads to what
decoder layer l would read of that text by itself is found by ridge regression, and the source's projections are the
decoder's own behind it: source_k_proj = k_proj M, source_v_proj = v_proj M, with the intercept in their biases. (As
the regression is linear in what it predicts, that is also the ridge regression of keys and values themselves.)

The regression needs only sums of products over tokens. They are taken batch by batch, in float64, so text of any length
takes the memory of one square matrix per layer and part of the text; and every ridge strength is tried on them.

Letters: B batch, L tokens of a row, N tokens, E encoder width, D decoder width, P = K H the width of a projection.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from twofold.adapt.sample import default_texts
from twofold.data.tokenize import encode
from twofold.models import EncoderDecoder
from twofold.models.attention import Attention
from twofold.models.stack import DecoderBlock

DEFAULT_TOKENS = 200_000

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Strengths that are tried, in units of the mean variance of what the encoder layer reads."""

HELD_OUT_SHARE = 10
"""Every tenth document is held out: it chooses the ridge, and says how much is explained."""

ROWS_AT_ONCE = 4


@dataclass(frozen=True)
class LayerFit:
    """One decoder layer; shares of the variance that is explained on held-out text, 1 at best."""

    encoder_layer: int | None
    """That it reads; None: the normed output of the last."""
    ridge: float
    """The strength that explains most, of `RIDGES`."""
    reads: float
    """Of what the decoder layer reads."""
    keys: float
    """Of keys, before norm and rotation."""
    values: float


@dataclass(frozen=True)
class Stitch:
    """Source projections of a pair, and how well they fit."""

    tokens: int
    """Fitted on."""
    held_out_tokens: int
    length: int
    """Tokens that were read at a time, at most."""
    layers: tuple[LayerFit, ...]
    projections: Mapping[str, Tensor] = field(repr=False)
    """Float32, by the names of the pair's parameters."""

    def as_json(self) -> dict[str, Any]:
        """All but the projections, for a file."""
        return {
            "tokens": self.tokens,
            "held_out_tokens": self.held_out_tokens,
            "length": self.length,
            "layers": [asdict(layer) for layer in self.layers],
        }


@torch.no_grad()
def stitch(
    model: EncoderDecoder,
    texts: Mapping[str, Sequence[str]] | None = None,
    *,
    tokens: int = DEFAULT_TOKENS,
    length: int = 256,
    watch: Callable[[Iterator[int], int], Iterator[int]] = lambda steps, total: steps,
) -> Stitch:
    """Fit the source projections of a pair whose two stacks are language models of one tokenizer.

    Takes one pass of each stack over the text.

    Args:
        model: with a tokenizer and projections of its own for the source. Its encoder reads under the masks it has,
            its decoder reads the text alone, which makes it the decoder's donor. Left as it was.
        texts: domains by name, each a list of documents. Default: `default_texts`.
        tokens: read in all, at most; a document gives only its share, up to four times the average.
        length: tokens that are read at a time.
        watch: wraps the batches, each the number of its tokens, with the number of all; for a progress bar.

    Raises:
        ValueError: a pair without such projections or without a tokenizer, or fewer than two documents.
    """
    config = model.config
    if config.source_projections != "own":
        raise ValueError(
            "stitching fits projections that a merged decoder has for the source alone (start='stitched'), got "
            f"layout={config.layout!r}, source_projections={config.source_projections!r}"
        )
    if model.tokenizer is None:
        raise ValueError(
            "the model has no tokenizer, so it cannot be fitted on text; give it tokenizer files"
        )
    fitted, held_out = _rows(model, texts or default_texts(), tokens, length)
    sums = {True: _zero_moments(model), False: _zero_moments(model)}
    was_training = model.training
    model.eval()

    def steps() -> Iterator[int]:
        for is_held_out, rows in ((False, fitted), (True, held_out)):
            for start in range(0, len(rows), ROWS_AT_ONCE):
                batch = rows[start : start + ROWS_AT_ONCE]
                _add(model, batch, sums[is_held_out])
                yield sum(map(len, batch))

    n_tokens = {name: sum(map(len, rows)) for name, rows in (("fitted", fitted), ("held_out", held_out))}
    for _ in watch(steps(), sum(n_tokens.values())):
        pass
    model.train(was_training)

    found: list[LayerFit] = []
    projections: dict[str, Tensor] = {}
    for i, block in enumerate(_blocks(model)):
        encoder_layer = None if config.aligned_layers is None else config.aligned_layers[i]
        fit, tensors = _fit_layer(block.self_attn, sums[False][i], sums[True][i], encoder_layer)
        found.append(fit)
        projections |= {f"model.decoder.layers.{i}.self_attn.{name}": x for name, x in tensors.items()}
    return Stitch(n_tokens["fitted"], n_tokens["held_out"], length, tuple(found), projections)


class Moments:
    """Sums over tokens of the products of all that belongs to a token: inputs [E], outputs [D], and 1."""

    def __init__(self, n_inputs: int, n_outputs: int, device: torch.device | None = None) -> None:
        size = n_inputs + n_outputs + 1
        self.n_inputs = n_inputs
        self.sums = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, x_NE: Tensor, y_ND: Tensor) -> None:
        """Further tokens."""
        both = torch.cat([x_NE.double(), y_ND.double(), x_NE.new_ones(len(x_NE), 1).double()], dim=1)
        self.sums.addmm_(both.T, both)

    @property
    def mean(self) -> Tensor:
        """Of inputs and outputs, [E + D]."""
        return self.sums[-1, :-1] / self.sums[-1, -1]

    @property
    def covariance(self) -> Tensor:
        """Of inputs and outputs, [E + D, E + D]."""
        return self.sums[:-1, :-1] / self.sums[-1, -1] - torch.outer(self.mean, self.mean)

    def residual(self, map_DE: Tensor, intercept_D: Tensor) -> Tensor:
        """Mean of r r^T, [D, D], where r = y - map x - intercept."""
        r = torch.cat([-map_DE, torch.eye(len(map_DE)).to(map_DE), -intercept_D[:, None]], dim=1)
        return r @ (self.sums / self.sums[-1, -1]) @ r.T

    def explained(self, residual_DD: Tensor, weight_PD: Tensor) -> float:
        """Share of the variance of `weight y` that is not in a residual of y."""
        variance_DD = self.covariance[self.n_inputs :, self.n_inputs :]
        left, whole = (((weight_PD @ x) * weight_PD).sum().item() for x in (residual_DD, variance_DD))
        return 1.0 - left / whole


def ridge_maps(moments: Moments, ridges: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """For each strength the map [D, E] and intercept [D] that minimise, over the tokens of the moments,
    mean |y - map x - intercept|^2 + strength * mean variance of x * |map|^2."""
    n, covariance, mean = moments.n_inputs, moments.covariance, moments.mean
    variances_E, axes_EE = torch.linalg.eigh(covariance[:n, :n])
    onto_axes_ED = axes_EE.T @ covariance[:n, n:]
    for ridge in ridges:
        penalised_E = variances_E.clamp(min=0) + ridge * variances_E.mean()
        map_DE = (axes_EE @ (onto_axes_ED / penalised_E[:, None])).T
        yield map_DE, mean[n:] - map_DE @ mean[:n]


def _fit_layer(
    attention: Attention, moments: Moments, held_out: Moments, encoder_layer: int | None
) -> tuple[LayerFit, dict[str, Tensor]]:
    """The best of the ridge strengths, and the layer's projections behind its map."""
    identity_DD = torch.eye(attention.k_proj.in_features).to(moments.sums)
    tried = []
    for ridge, (map_DE, intercept_D) in zip(RIDGES, ridge_maps(moments, RIDGES), strict=True):
        residual_DD = held_out.residual(map_DE, intercept_D)
        tried.append((held_out.explained(residual_DD, identity_DD), ridge, map_DE, intercept_D, residual_DD))
    reads, ridge, map_DE, intercept_D, residual_DD = max(tried, key=lambda one: one[0])
    explained, tensors = {}, {}
    for name in ("k_proj", "v_proj"):
        projection = getattr(attention, name)
        weight_PD = projection.weight.double()
        explained[name] = held_out.explained(residual_DD, weight_PD)
        bias_P = weight_PD @ intercept_D + (0.0 if projection.bias is None else projection.bias.double())
        tensors[f"source_{name}.weight"] = (weight_PD @ map_DE).float().cpu()
        tensors[f"source_{name}.bias"] = bias_P.float().cpu()
    return LayerFit(encoder_layer, ridge, reads, explained["k_proj"], explained["v_proj"]), tensors


def _blocks(model: EncoderDecoder) -> list[DecoderBlock]:
    return [block for block in model.decoder.layers if isinstance(block, DecoderBlock)]


def _zero_moments(model: EncoderDecoder) -> list[Moments]:
    sizes = model.config.encoder.hidden_size, model.config.decoder.hidden_size
    device = next(model.parameters()).device
    return [Moments(*sizes, device) for _ in model.decoder.layers]


def _add(model: EncoderDecoder, rows: Sequence[Tensor], sums: Sequence[Moments]) -> None:
    """What both sides read of these rows, without padding."""
    device = next(model.parameters()).device
    ids_BL = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device)
    lengths_B = torch.tensor([len(row) for row in rows], device=device)
    mask_BL = torch.arange(ids_BL.shape[1], device=device) < lengths_B[:, None]
    memory = model.encode(ids_BL, mask_BL).memory
    alone = model.encode(ids_BL[:, :0], mask_BL[:, :0])
    _, _, hidden = model.states(
        decoder_input_ids=ids_BL,
        decoder_attention_mask=mask_BL,
        encoder_output=alone,
        output_hidden_states=True,
    )
    for i, (block, moments) in enumerate(zip(_blocks(model), sums, strict=True)):
        read_BLD = block.pre_self_attn_layernorm(hidden[i])
        moments.add(memory[i if len(memory) > 1 else 0][mask_BL], read_BLD[mask_BL])


def _rows(
    model: EncoderDecoder, texts: Mapping[str, Sequence[str]], tokens: int, length: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Token ids, int64 [at most `length`] each, to fit on and to hold out: the domains' documents in turn."""
    in_turn = itertools.zip_longest(*texts.values())
    documents = [text for texts_of_turn in in_turn for text in texts_of_turn if text]
    if len(documents) < 2:
        raise ValueError(
            f"stitching fits on some documents and measures on others; got {len(documents)}, give at least 2 (100 "
            "are better)"
        )
    bos = [model.config.bos_token_id] if model.config.source_bos else []
    most = max(length, 4 * tokens // len(documents))
    rows: dict[bool, list[Tensor]] = {True: [], False: []}
    left = tokens
    for i, text in enumerate(documents):
        # Characters enough for the tokens wanted; a tokenizer would take a novel whole.
        ids = encode(model.tokenizer, text[: 20 * most])[:most]
        for start in range(0, len(ids), length - len(bos)):
            row = torch.tensor([*bos, *ids[start : start + length - len(bos)]][:left])
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
