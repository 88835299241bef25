"""How far an encoder can be opened for nothing: what opening costs, measured on a little text.

A lossless pair with a causal encoder is its donor. Letting a layer's tokens see those after them changes what the
decoder reads, and donors differ in which layers bear that: SmolLM2 nearly all of them, as long as the first token of a
text keeps seeing itself alone (`sink`), Gemma 3 the upper half. The profile takes the first of these that costs no more
than a budget:

1. all layers open;
2. all layers open, with later keys at a tenth of their weight, which training can let grow to the whole;
3. as many layers as can be open together, those first that cost least by themselves.

All losses are of PrefixLM: a text is cut in two halves, one read, one written, and the second is scored.

Nothing is trained, and nothing but the mask is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from twofold.adapt.sample import Sample
from twofold.config import EncoderMask
from twofold.models import EncoderDecoder

DEFAULT_BUDGET = 0.03
"""Nats per target token, on each domain, that `encoder_mask="auto"` may cost before any training."""


FAINT_WEIGHT = 0.1
"""Of keys after the query, where the whole weight costs too much."""


@dataclass(frozen=True)
class Opened:
    """Some layers open, and what that did."""

    layers: tuple[int, ...]
    future_weight: float
    """See `EncoderDecoderConfig.encoder_future_weight`."""
    cost: dict[str, float]
    """By domain: nats per target token above the causal encoder's loss."""
    noise: dict[str, float]
    """By domain: standard error of that difference over examples."""

    @property
    def worst(self) -> float:
        """Of all domains."""
        return max(self.cost.values())


@dataclass(frozen=True)
class Profile:
    """What it costs to open the encoder of a lossless pair."""

    mask: EncoderMask
    """What layers were opened to."""
    budget: float
    loss: dict[str, float]
    """By domain, nats per target token, with a causal encoder: the donor's."""
    examples: dict[str, int]
    """By domain; each has `source_length` + `target_length` tokens."""
    source_length: int
    target_length: int
    chosen: Opened
    """As open as the budget allows; no layers where even one costs more."""
    whole: Opened
    """All layers."""
    faint: Opened
    """All layers, later keys at `FAINT_WEIGHT`."""
    alone: tuple[Opened, ...]
    """Each layer by itself, by its number; empty where layers were not measured one by one."""
    order: tuple[int, ...]
    """Layers by their cost alone on their worst domain, cheapest first."""
    together: tuple[Opened, ...]
    """The first n layers of that order, for the n that were tried, growing."""

    @property
    def encoder_mask(self) -> tuple[EncoderMask, ...]:
        """One per layer: the mask for the layers that are opened, `causal` for the others."""
        opened = set(self.chosen.layers)
        return tuple(self.mask if i in opened else "causal" for i in self.whole.layers)

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return asdict(self) | {"encoder_mask": self.encoder_mask}


def profile_encoder(
    model: EncoderDecoder,
    texts: Mapping[str, Sequence[str]] | None = None,
    *,
    mask: EncoderMask = "sink",
    budget: float = DEFAULT_BUDGET,
    source_length: int = 128,
    target_length: int = 128,
    examples: int = 8,
    each_layer: bool = False,
    watch: Callable[[Iterator[Opened], int], Iterator[Opened]] = lambda steps, total: steps,
) -> Profile:
    """Measure how far the encoder of a lossless pair can be opened.

    Takes three forward passes over all examples, and one for each layer and some log2(layers) more where layers are
    measured one by one.

    Args:
        model: with a tokenizer, aligned reads and merged layout; its mask and mode are left as they were.
        texts, source_length, target_length, examples: see `Sample`; lengths are cut to what the model can read.
        mask: what layers are opened to, `sink` or `bidirectional`.
        budget: nats per target token that the opened layers together may cost on each domain.
        each_layer: measure layers one by one also where all of them can be opened.
        watch: wraps the layers as they are measured, with their number, for a progress bar.

    Raises:
        ValueError: a pair that is not its donor with a causal encoder, so that costs would mean nothing; no
            tokenizer; `mask` is causal; or a domain without a document that is long enough.
    """
    config = model.config
    if config.layout != "merged" or config.reads != "aligned":
        raise ValueError(
            f"a profile compares with the donor, which the pair must equal while its encoder is causal: that is "
            f"start='lossless' (layout 'merged', reads 'aligned'), got {config.layout!r} and {config.reads!r}"
        )
    if mask == "causal":
        raise ValueError("mask is what layers are opened to, 'sink' or 'bidirectional', got 'causal'")
    half = config.encoder.max_position_embeddings // 2
    lengths = {"source_length": min(source_length, half), "target_length": min(target_length, half)}
    sample = Sample(model, texts, examples=examples, **lengths)
    n_layers = config.encoder.num_hidden_layers
    with _left_as_it_was(model):
        meter = _Meter(model, sample, mask)
        everything = tuple(range(n_layers))
        whole, faint = meter.opened(everything), meter.opened(everything, FAINT_WEIGHT)
        fitting = [one for one in (whole, faint) if one.worst <= budget]
        alone: tuple[Opened, ...] = ()
        together: tuple[Opened, ...] = (whole,)
        if each_layer or not fitting:
            alone = tuple(watch((meter.opened((i,)) for i in everything), n_layers))
            together = (*_halved(meter, _cheapest_first(alone), budget), whole)
            fitting += [one for one in reversed(together) if one.worst <= budget]
        chosen = fitting[0] if fitting else meter.opened(())
    return Profile(
        mask=mask,
        budget=budget,
        loss={name: losses.mean().item() for name, losses in meter.closed.items()},
        examples=sample.examples,
        **lengths,
        chosen=chosen,
        whole=whole,
        faint=faint,
        alone=alone,
        order=_cheapest_first(alone),
        together=together,
    )


def _cheapest_first(alone: Sequence[Opened]) -> tuple[int, ...]:
    return tuple(sorted(range(len(alone)), key=lambda i: alone[i].worst))


def _halved(meter: _Meter, order: Sequence[int], budget: float) -> list[Opened]:
    """The first n layers of an order, measured for the n that a search by halves tries, growing; all are known not to
    fit. Costs of more layers are taken to be higher."""
    tried = {}
    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        tried[middle] = meter.opened(order[:middle])
        low, high = (middle, high) if tried[middle].worst <= budget else (low, middle)
    return [tried[n] for n in sorted(tried)]


class _Meter:
    """Losses under a choice of open layers, beside those of the causal encoder."""

    def __init__(self, model: EncoderDecoder, sample: Sample, mask: EncoderMask) -> None:
        self._model, self._sample, self._mask = model, sample, mask
        self.closed = self._losses(())

    def opened(self, layers: Sequence[int], future_weight: float = 1.0) -> Opened:
        losses = self._losses(layers, future_weight)
        above = {name: losses[name] - self.closed[name] for name in losses}
        return Opened(
            tuple(layers),
            future_weight,
            {name: x.mean().item() for name, x in above.items()},
            {name: (x.std() / len(x) ** 0.5).item() for name, x in above.items()},
        )

    def _losses(self, layers: Sequence[int], future_weight: float = 1.0) -> dict[str, Tensor]:
        n_layers = self._model.config.encoder.num_hidden_layers
        masks = [self._mask if i in layers else "causal" for i in range(n_layers)]
        self._model.set_encoder_mask(masks, future_weight=future_weight)
        return self._sample.losses(self._model)


@contextmanager
def _left_as_it_was(model: EncoderDecoder) -> Iterator[None]:
    masks, weight, is_training = model.config.encoder_mask, model.config.encoder_future_weight, model.training
    model.eval()
    try:
        yield
    finally:
        model.set_encoder_mask(masks, future_weight=weight)
        model.train(is_training)
