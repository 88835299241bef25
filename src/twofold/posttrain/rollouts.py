"""Answers by the engine, with the weights that are being trained.

Nothing goes over the disk. Where it can, the engine runs the very parameters that the optimizer changes in place, and
no weight is copied. Else it runs a copy in memory that is filled before each rollout: in another precision, whole
beside a model that is sharded over ranks, or with an adapter merged. What OpenVINO has compiled holds weights in an
order of its own that cannot be written to from outside, so that backend is made anew from memory: for SmolLM2-135M's
pair a second or two each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from twofold.config.rollouts import RolloutEngineConfig
from twofold.infer import Engine, Request, Sampling
from twofold.models import EncoderDecoder
from twofold.posttrain.prompts import Prompt
from twofold.train.adapters import has_adapter
from twofold.train.copies import copy_weights, empty_copy
from twofold.train.world import World


class Answer(NamedTuple):
    """What was written to a prompt."""

    token_ids: tuple[int, ...]
    """At least one; a stop token, where one came, is the last."""

    text: str
    """Without special tokens."""

    is_truncated: bool
    """No stop token came."""


class RolloutEngine:
    """The engine on weights that change.

    Attributes:
        policy: what answers are sampled from, whole on this rank: the trained model itself, or the copy.
    """

    def __init__(self, model: EncoderDecoder, config: RolloutEngineConfig, world: World) -> None:
        """Nothing is allocated before `refresh`.

        Args:
            model: the one that is trained; with several ranks it may be sharded by the time of `refresh`.
            config: how to sample, and what runs it.
        """
        self._model, self._config, self._world = model, config, world
        self._engine: Engine | None = None
        self.policy = model

    def refresh(self) -> None:
        """Take the weights as they are now; on all ranks. To be called after updates, before `answer`."""
        with evaluating(self._model):
            if self._has_copy:
                if self._engine is None:
                    self.policy = empty_copy(self._model, self._dtype, self._world.device)
                copy_weights(self.policy, self._model)
            if self._config.backend == "openvino":
                self._engine = None  # gone before another one needs its memory
            if self._engine is None:
                self._engine = self._new_engine()

    def answer(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], *, num_samples: int, temperature: float
    ) -> list[list[Answer]]:
        """Answers to each prompt, with the weights of the last `refresh`.

        Args:
            seeds: of each prompt; its answer i draws with `seed + i`.
            num_samples: answers to each prompt.
            temperature: 0: greedily.
        """
        assert self._engine is not None
        with evaluating(self._model):
            handles = [
                self._engine.submit(
                    Request(
                        source_ids=prompt.source.tolist(),
                        prefix_ids=prompt.prefix.tolist(),
                        max_new_tokens=self._config.max_new_tokens,
                        sampling=Sampling(temperature=temperature, seed=seed),
                        n=num_samples,
                    )
                )
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
            return [
                [Answer(c.token_ids, c.text, c.finish_reason != "stop") for c in handle.result()]
                for handle in handles
            ]

    @property
    def _has_copy(self) -> bool:
        is_other_precision = self._config.backend != "openvino" and self._config.precision is not None
        return self._world.size > 1 or is_other_precision or has_adapter(self._model)

    @property
    def _dtype(self) -> torch.dtype:
        is_bfloat16 = self._config.precision == "bfloat16" and self._config.backend != "openvino"
        return torch.bfloat16 if is_bfloat16 else torch.float32

    def _new_engine(self) -> Engine:
        config = self._config
        is_openvino = config.backend == "openvino"
        return Engine(
            self.policy,
            backend="openvino" if is_openvino else "torch",
            precision=config.precision if is_openvino else None,
            device=self._world.device,
            batch_size=config.batch_size,
            cache_bytes=config.cache_bytes,
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; the mode stays as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def answer_seed(seed: int, rollout: int, draw: int) -> int:
    """A seed of its own for every prompt that is drawn in a run, 62 bits, so that the answers' own fit behind it."""
    found = np.random.SeedSequence((seed, rollout, draw)).generate_state(1, np.uint64)[0]
    return int(found >> np.uint64(2))
