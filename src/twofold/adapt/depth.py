"""Fewer decoder layers: which ones a pair misses least, measured, and the pair without them.

Decoding reads every weight of the decoder for every token, so its cost falls with its layers. With aligned reads a
decoder layer brings along the encoder layer it reads, so that what is left still fits together. Which layers can go
is measured, not guessed: in each round every layer that is left is taken out by itself, and those whose absence costs
least go, until as few are left as are wanted. (The order found at once, without rounds, takes neighbours out together:
each can be missed as long as the other is there.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from twofold.adapt.sample import Sample
from twofold.models import EncoderDecoder


@dataclass(frozen=True)
class Round:
    """What taking out one layer more would cost, and what was done."""

    left: tuple[int, ...]
    """Layers before the round, by their numbers in the whole decoder."""
    loss: dict[str, float]
    """Of these, by domain, nats per target token."""
    cost: tuple[float, ...]
    """For each of them, the loss without it less the loss with it, mean over domains."""
    removed: tuple[int, ...]


@dataclass(frozen=True)
class DepthChoice:
    """Which decoder layers to keep."""

    layers: tuple[int, ...]
    """Kept, in their order."""
    loss: dict[str, float]
    """With these alone, by domain, nats per target token, nothing trained."""
    rounds: tuple[Round, ...]

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return asdict(self)


def cut_decoder(model: EncoderDecoder, layers: Sequence[int]) -> EncoderDecoder:
    """The same pair with some decoder layers only; it shares all weights with `model`, and copies none.

    Args:
        layers: indices into the decoder, in the order in which they are to run.

    Raises:
        ValueError: an index outside the decoder, none at all, or tied stacks, which have equal depths.
    """
    config = model.config
    if config.tie_stacks:
        raise ValueError("tied stacks have one depth; cut the decoder of a pair without tie_stacks")
    changes: dict[str, Any] = {"decoder": config.decoder.with_layers(tuple(layers))}
    if config.aligned_layers is not None:
        changes["aligned_layers"] = tuple(config.aligned_layers[i] for i in layers)
    cut_config = type(config).model_validate(config.model_copy(update=changes).model_dump())
    with torch.device("meta"):
        cut = EncoderDecoder(cut_config)
    # Encoders of their own, as each hands over what its own decoder reads; what is in them is shared.
    for name, part in model.encoder.named_children():
        setattr(cut.encoder, name, part)
    for kept, i in enumerate(layers):
        cut.decoder.layers[kept] = model.decoder.layers[i]
    cut.decoder.embed_tokens, cut.decoder.norm = model.decoder.embed_tokens, model.decoder.norm
    cut.lm_head = model.lm_head
    cut.tokenizer = model.tokenizer
    return cut.train(model.training)


def choose_decoder_layers(
    model: EncoderDecoder,
    keep: int,
    texts: Mapping[str, Sequence[str]] | None = None,
    *,
    at_once: int = 2,
    source_length: int = 128,
    target_length: int = 128,
    examples: int = 8,
    watch: Callable[[Iterator[Round], int], Iterator[Round]] = lambda rounds, total: rounds,
) -> DepthChoice:
    """Find the decoder layers that a pair misses least, by taking them out round by round.

    The encoder reads the texts once. A round runs the decoder as often as it has layers left, so keeping 10 of 30 with
    two a round takes some 200 passes.

    Args:
        model: with a tokenizer; left as it was.
        keep: how many layers stay.
        at_once: layers that go in one round; 1 measures most.
        texts, source_length, target_length, examples: see `Sample`.
        watch: wraps the rounds as they are done, with their number, for a progress bar.

    Raises:
        ValueError: `keep` is not between 1 and the number of layers; see also `cut_decoder` and `Sample`.
    """
    n_layers = model.config.decoder.num_hidden_layers
    if not 1 <= keep <= n_layers or at_once < 1:
        raise ValueError(
            f"keep must lie between 1 and the decoder's {n_layers} layers, and at_once must be 1 or more, got "
            f"{keep} and {at_once}"
        )
    sample = Sample(model, texts, source_length=source_length, target_length=target_length, examples=examples)
    was_training = model.training
    model.eval()
    # Every cut of the decoder reads the same encoder; what each layer reads of it is picked below.
    read = sample.read(model)
    n_memories = len(next(iter(read.values()))[0].memory)

    def losses(layers: Sequence[int]) -> dict[str, float]:
        cut = cut_decoder(model, layers)
        chosen = {
            name: [
                replace(one, memory=tuple(one.memory[i] for i in layers)) if n_memories > 1 else one
                for one in of
            ]
            for name, of in read.items()
        }
        return {name: x.mean().item() for name, x in sample.losses(cut, chosen).items()}

    def mean(by_domain: Mapping[str, float]) -> float:
        return sum(by_domain.values()) / len(by_domain)

    def rounds() -> Iterator[Round]:
        left = list(range(n_layers))
        while len(left) > keep:
            whole = losses(left)
            cost = [mean(losses([i for i in left if i != out])) - mean(whole) for out in left]
            cheapest = sorted(range(len(left)), key=lambda i: cost[i])[: min(at_once, len(left) - keep)]
            removed = tuple(sorted(left[i] for i in cheapest))
            yield Round(tuple(left), whole, tuple(cost), removed)
            left = [i for i in left if i not in removed]

    try:
        done = tuple(watch(rounds(), -(-(n_layers - keep) // at_once)))
        gone = {i for one in done for i in one.removed}
        kept = tuple(i for i in range(n_layers) if i not in gone)
        return DepthChoice(kept, losses(kept), done)
    finally:
        model.train(was_training)
