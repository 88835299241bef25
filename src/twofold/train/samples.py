"""Answers to a few held-out prompts while a model trains.

The engine runs the very model that trains. Where that is sharded over ranks, or has an adapter, it runs a copy on the
main rank that is gathered for the occasion, with the adapter merged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from twofold.config.watching import SamplesConfig
from twofold.data import Batch
from twofold.data.batch import Texts
from twofold.infer import Engine, Request
from twofold.infer.limits import check_inputs
from twofold.models import EncoderDecoder, EncoderModel
from twofold.train.adapters import has_adapter, plain_parameters
from twofold.train.world import World


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and what came of it."""

    prompt: str
    """What encoder and decoder were given, special tokens included."""
    reference: str
    answer: str


class Sampler:
    """Answers the same prompts whenever it is asked."""

    def __init__(
        self, model: EncoderModel, batches: Iterable[Batch], config: SamplesConfig, world: World
    ) -> None:
        """
        Args:
            model: the one that trains; with several ranks it may be sharded later.
            batches: held out.

        Raises:
            ValueError: the model writes nothing or has no tokenizer, nothing is held out, or a prompt leaves no room
                for an answer.
        """
        if not isinstance(model, EncoderDecoder) or model.tokenizer is None:
            raise ValueError(
                "samples are texts that the model writes, but this one has no "
                f"{'decoder' if not isinstance(model, EncoderDecoder) else 'tokenizer'}; set samples=null"
            )
        self._model, self._config, self._world = model, config, world
        self._prompts: list[Texts] = list(islice((t for b in batches for t in b.texts()), config.count))
        if not self._prompts:
            raise ValueError(
                "samples answer held-out prompts, and nothing is held out; set data.held_out or "
                "data.held_out_fraction, or remove samples"
            )
        for n, prompt in enumerate(self._prompts):
            check_inputs(
                model.config, prompt.source, prompt.prefix, config.max_new_tokens, name=f"held-out prompt {n}"
            )

    def answer(self) -> list[Sample]:
        """With the weights as they are; on all ranks, of which the main one gets the answers."""
        model = self._model
        if self._world.size > 1 or has_adapter(model):
            copied = copy_whole(model, self._world)
            if copied is None:
                return []
            model = copied
        was_training = self._model.training
        engine = Engine(model, backend="torch", device=self._world.device, batch_size=len(self._prompts))
        try:
            handles = [engine.submit(self._request(prompt)) for prompt in self._prompts]
            answers = [handle.result()[0].text for handle in handles]
        finally:
            engine.close(cancel=True)
            self._model.train(was_training)
        return [self._sample(p, answer) for p, answer in zip(self._prompts, answers, strict=True)]

    def _request(self, prompt: Texts) -> Request:
        n_new = self._config.max_new_tokens
        return Request(source_ids=prompt.source, prefix_ids=prompt.prefix, max_new_tokens=n_new)

    def _sample(self, prompt: Texts, answer: str) -> Sample:
        tokenizer: Any = self._model.tokenizer
        given = tokenizer.decode([*prompt.source, *prompt.prefix])
        return Sample(given, tokenizer.decode(prompt.target, skip_special_tokens=True), answer)


@torch.no_grad()
def copy_whole(model: EncoderDecoder, world: World) -> EncoderDecoder | None:
    """A copy of a model without adapter and sharding, in eval mode on the main rank's device; None on the others.

    All ranks call it: tensors are gathered one by one.
    """
    tensors = {}
    for name, plain in plain_parameters(model).items():
        tensor = plain.tensor()
        if world.is_main:
            tensors[name] = nn.Parameter(tensor.to(world.device, copy=True), requires_grad=False)
    if not world.is_main:
        return None
    with torch.device("meta"):
        copied = EncoderDecoder(model.config)
    copied.load_state_dict(tensors, assign=True, strict=False)  # shared parameters come under one name
    copied.tie_weights()
    copied.tokenizer = model.tokenizer
    return copied.eval()
