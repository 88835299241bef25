"""Bytes on one device at the moment of a step that needs most.

A step is followed event by event: the loss at the end of a forward pass, the backward pass layer by layer, the
gradients of the embeddings, the update. Sharded (FSDP2): master weights, gradients and moments are cut into as many
pieces as there are devices in a group; one block's weights at a time are gathered to compute with, the next one's on
the way, and tables, head and final norms for as long as the micro-batch lasts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from twofold.config import EncoderDecoderConfig
from twofold.models import EncoderDecoder
from twofold.models.flops import Checkpointing, Trained, trained_encoder_layers
from twofold.train.loss import CHUNK_BYTES
from twofold.train.plan.activations import (
    AUTOCAST,
    BFLOAT16,
    FLOAT32,
    Activations,
    Numbers,
    activations,
    encoder_activations,
)
from twofold.train.plan.teacher import Teacher


class Weight(NamedTuple):
    """One parameter, shared ones once."""

    name: str
    size: int
    is_matrix: bool
    block: str | None
    """`encoder.3`, `decoder.0`; None outside the blocks."""

    @property
    def is_table(self) -> bool:
        return "embed_tokens" in self.name or "lm_head" in self.name


@lru_cache(maxsize=16)
def weights_of(config_json: str) -> tuple[Weight, ...]:
    """All parameters of a pair, from its configuration as JSON, without allocating any."""
    with torch.device("meta"):
        model = EncoderDecoder(EncoderDecoderConfig.model_validate_json(config_json))
    found = []
    for name, parameter in model.named_parameters():
        words = name.split(".")
        block = f"{words[1]}.{words[3]}" if len(words) > 3 and words[2] == "layers" else None
        found.append(Weight(name, parameter.numel(), parameter.ndim >= 2, block))
    return tuple(found)


def setup_weights(config: EncoderDecoderConfig, setup: Setup) -> tuple[Weight, ...]:
    """What a run holds of a pair's parameters."""
    weights = weights_of(config.model_dump_json())
    if not setup.is_encoder_only:
        return weights
    return tuple(w for w in weights if w.name.startswith("model.encoder."))


def gets_gradient(config: EncoderDecoderConfig, name: str, trained: Trained) -> bool:
    """Whether a parameter gets a gradient, and with it moments: parameters without one are passed over."""
    is_encoder = name.startswith("model.encoder.") and not config.tie_stacks
    return _is_trained(name, trained) and (not is_encoder or _is_reached(config, name))


def _is_trained(name: str, trained: Trained) -> bool:
    if trained == "cross_attention":
        return "cross_attn" in name
    return trained == "everything" or not name.startswith("model.encoder.")


def _is_reached(config: EncoderDecoderConfig, name: str) -> bool:
    if config.aligned_layers is None or "embed_tokens" in name:
        return True
    last = trained_encoder_layers(config)
    words = name.split(".")
    if words[2] != "layers":  # the final norm: nothing reads its output
        return False
    return int(words[3]) < last or (int(words[3]) == last and words[4] == "pre_self_attn_layernorm")


@dataclass(frozen=True)
class Setup:
    """How a micro-batch is run; what memory depends on beside the model."""

    rows: int
    source_length: int
    target_length: int
    scored: int
    """Positions of a micro-batch with a label."""
    precision: Literal["float32", "bfloat16"]
    checkpointing: Checkpointing
    shards: int
    """Devices that share one copy of the weights; 1: nothing is sharded."""
    accumulates: bool
    """A device takes several micro-batches a step, so gradients are there when a forward pass begins."""
    is_cpu: bool = False
    has_ema: bool = False
    teacher: Teacher | None = None
    matched_layers: int = 0
    """Whose hidden states are compared with the teacher's."""
    answers: int = 1
    """To every source, see `twofold.models.flops.Row`; their target positions are counted in `target_length`."""
    reference_parameters: int = 0
    """Of a frozen model in the loop, held whole in float32."""
    is_encoder_only: bool = False
    """A reward model: no decoder, and a head that is not worth counting."""

    @property
    def numbers(self) -> Numbers:
        in_bfloat16 = AUTOCAST if self.shards == 1 else BFLOAT16
        numbers = FLOAT32 if self.precision == "float32" else in_bfloat16
        return replace(numbers, has_bool_masks=not self.is_cpu)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at its peak, by what they are for."""

    weights: int
    optimizer: int
    ema: int
    teacher: int
    """Its weights, whole on every device; its activations come and go."""
    reference: int
    """Likewise, of preferences."""
    gradients: int
    compute_weights: int
    """Copies in the dtype of computation: cast, or gathered from the shards."""
    activations: int
    loss: int
    """States and gradients that the chunked loss holds, and the logits of a chunk."""
    temporary: int
    """Of the layer whose backward pass runs, of a gradient on its way, or of the update."""
    when: Literal["loss", "backward", "embeddings", "update"]
    """The moment."""
    kept: Activations
    """Layer by layer, all that is kept at the end of the forward pass."""

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """By name, in bytes."""
        names = (
            "weights", "optimizer", "ema", "teacher", "reference", "gradients", "compute_weights", "activations",
            "loss", "temporary",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def peak_memory(config: EncoderDecoderConfig, setup: Setup, trained: Trained = "everything") -> Memory:
    """The moment of a step that needs most, moments of the optimizer included."""
    moments = _Step(config, setup, trained).moments()
    return max(moments, key=lambda memory: memory.total)


class _Step:
    """One step of one device, and what is there at each of its moments."""

    def __init__(self, config: EncoderDecoderConfig, setup: Setup, trained: Trained) -> None:
        self.config, self.setup = config, setup
        self.numbers = setup.numbers
        weights = setup_weights(config, setup)
        self.learned = [w for w in weights if setup.is_encoder_only or gets_gradient(config, w.name, trained)]
        self.total = sum(w.size for w in weights)
        self.num_learned = sum(w.size for w in self.learned)
        self.n, self.m = setup.rows * setup.source_length, setup.rows * setup.target_length
        if setup.is_encoder_only:
            self.kept = encoder_activations(config, self.n, self.numbers, checkpointing=setup.checkpointing)
        else:
            self.kept = activations(
                config,
                self.n,
                self.m,
                self.numbers,
                trained=trained,
                checkpointing=setup.checkpointing,
                answers=setup.answers,
            )
        self.blocks: dict[str | None, int] = {}
        for w in weights:
            self.blocks[w.block] = self.blocks.get(w.block, 0) + w.size
        self.largest_block = max(size for block, size in self.blocks.items() if block is not None)
        self.largest_matrix = max(w.size for w in weights if w.is_matrix and not w.is_table)
        self.table = config.decoder.vocab_size * config.decoder.hidden_size
        self.head_learns = trained != "cross_attention" and not setup.is_encoder_only
        # Autocast casts each weight once and holds it until the loss is there; from then on only the graph does.
        self.cast_at_loss = 0
        self.cast_weights: dict[str | None, int] = {}
        for w in weights:
            if not self.numbers.casts or not w.is_matrix or w.is_table:
                continue
            size, is_kept = self.numbers.compute * w.size, self._is_cast_kept(w, trained)
            if is_kept or _is_trained(w.name, trained):
                self.cast_at_loss += size
            if is_kept:
                self.cast_weights[w.block] = self.cast_weights.get(w.block, 0) + size

    def _is_cast_kept(self, weight: Weight, trained: Trained) -> bool:
        if self.setup.checkpointing == "full":
            return False
        if self.setup.is_encoder_only:
            return True
        if weight.name.startswith("model.encoder."):
            return trained == "everything" and _is_reached(self.config, weight.name)
        # Where a weight's input needs no gradient, the weight is not read again.
        reads_frozen = trained != "everything" and re.search(r"cross_attn\.[kv]_proj", weight.name)
        return not reads_frozen

    def moments(self) -> list[Memory]:
        shards = self.setup.shards
        is_sharded = shards > 1
        gradients_all = 4 * self.num_learned // shards
        before = gradients_all if self.setup.accumulates else 0
        gathered = self.numbers.compute * (self.blocks[None] + 2 * self.largest_block) if is_sharded else 0
        cast = sum(self.cast_weights.values())
        held, pending, chunk = self._loss()
        found = [
            self._memory(
                "loss", before, self.cast_at_loss + gathered, self.kept.total, held + pending + chunk, 0
            ),
        ]

        # Backward, last layer first: its activations are still there, the gradients behind it are made.
        left = self.kept.total
        made = before
        order = [("decoder", i) for i in reversed(range(len(self.kept.decoder)))]
        order += [("encoder", i) for i in reversed(range(len(self.kept.encoder)))]
        for side, i in order:
            layer = (self.kept.decoder if side == "decoder" else self.kept.encoder)[i]
            if layer.total:
                temporary = self._of_a_layer(side) + self.kept.recomputed
                if self.numbers.casts and self.setup.checkpointing == "full":
                    temporary += self.numbers.compute * self.largest_block
                if (
                    is_sharded
                ):  # a block's whole gradient, as computed and in float32 to be summed over devices
                    temporary += (self.numbers.compute + 4) * self.largest_block
                found.append(self._memory("backward", made, cast + gathered, left, pending, temporary))
            left -= layer.total
            block = f"{side}.{i}"
            cast -= self.cast_weights.get(block, 0)
            if not self.setup.accumulates:
                made += 4 * sum(w.size for w in self.learned if w.block == block) // shards

        # Gradients of tables are dense: the head's has been waiting, the embedding's is made and added to it.
        tables = [w.size for w in self.learned if w.is_table]
        if tables:
            number = self.numbers.compute if is_sharded else 4
            temporary = number * max(tables) + (4 * sum(tables) if is_sharded else 0)
            found.append(self._memory("embeddings", made, gathered, 0, pending, temporary))
        update = 2 * 4 * max(w.size for w in self.learned) if self.setup.is_cpu else 0
        found.append(self._memory("update", gradients_all, 0, 0, 0, update))
        return found

    def _loss(self) -> tuple[int, int, int]:
        """Bytes that hold the decoder's states, and those matched with a teacher's, until their backward pass, those of
        the head's gradient until it meets the embedding's, and those of a chunk."""
        if self.setup.is_encoder_only:
            return 0, 0, 0
        scored, stack = self.setup.scored, self.config.decoder
        n_rows = min(max(CHUNK_BYTES // (4 * stack.vocab_size), 1), scored)
        # Logits, and their exponents on the way to the softmax; in bfloat16 the product's own result before.
        chunk = 2 * 4 * n_rows * stack.vocab_size
        if self.setup.teacher is not None:
            chunk += 2 * 4 * n_rows * self.setup.teacher.vocab_size
        weight = 0
        if self.numbers.casts:
            weight += self.numbers.compute * self.table
        if self.numbers.compute == 2 and self.head_learns:
            chunk = max(
                chunk, 6 * n_rows * stack.vocab_size + 2 * self.table
            )  # a chunk's share of the gradient
        states = 2 * self.numbers.stream * scored * stack.hidden_size  # and their gradient
        # Matched states, and the teacher's as they come and normed.
        states += 3 * 4 * self.setup.matched_layers * scored * stack.hidden_size
        pending = 4 * self.table if self.head_learns else 0
        return states, pending, chunk + weight

    def _teacher(self) -> int:
        number = 4 if self.setup.precision == "float32" else 2
        return 0 if self.setup.teacher is None else number * self.setup.teacher.parameters

    def _of_a_layer(self, side: str) -> int:
        """Gradients that come and go within one layer: of the stream, of the MLP's inner vectors, of a weight."""
        stack = self.config.decoder if side == "decoder" else self.config.encoder
        positions = self.m if side == "decoder" else self.n
        stream = 2 * 4 * positions * stack.hidden_size
        inner = 3 * self.numbers.compute * positions * stack.intermediate_size
        weight = (4 + (self.numbers.compute if self.numbers.casts else 0)) * self.largest_matrix
        return stream + inner + (weight if self.setup.shards == 1 else 0)

    def _memory(
        self,
        when: Literal["loss", "backward", "embeddings", "update"],
        gradients: int,
        compute_weights: int,
        kept: int,
        loss: int,
        temporary: int,
    ) -> Memory:
        shards = self.setup.shards
        return Memory(
            weights=4 * self.total // shards,
            optimizer=8 * self.num_learned // shards,
            ema=4 * self.total // shards if self.setup.has_ema else 0,
            teacher=self._teacher(),
            reference=4 * self.setup.reference_parameters,
            gradients=gradients,
            compute_weights=compute_weights,
            activations=kept,
            loss=loss,
            temporary=temporary,
            when=when,
            kept=self.kept,
        )
