"""What a model costs by its shapes alone: operations of an answer, bytes of weights and of keys and values.

Operations are counted as in `models.flops`: exact for the architecture, windows and causality to the token, whatever
a backend computes beyond that. Bytes are those of the CPU engine's formats (`infer.backends.openvino`): in int8 every
matrix has one float32 scale a row, in int4 one for 64 neighbours; vectors stay in float32, and keys and values are int8
with a float32 scale for each token and head.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from twofold.config import EncoderDecoderConfig
from twofold.evaluate.contender import Kind, kind_of
from twofold.evaluate.latency import Latency
from twofold.infer.backends import Precision
from twofold.models import EncoderDecoder
from twofold.models.flops import decoder_only_flops, forward_flops

FORMAT = 1

_INT4_GROUP = 64

_OF_THE_SOURCE = (".cross_attn.k_", ".cross_attn.v_", ".source_k_", ".source_v_")
"""In names of decoder parameters that are used once, when a source has been read, and not for each token."""


@dataclass(frozen=True, slots=True)
class AnswerFlops:
    """Operations of one answer."""

    reading: int
    """The encoder and the source's keys and values; of a decoder-only model its prefill."""
    writing: int
    """All target tokens, one after another, from caches; scoring them at once is the same work."""

    @property
    def total(self) -> int:
        return self.reading + self.writing


def answer_flops(config: EncoderDecoderConfig, source_tokens: int, target_tokens: int) -> AnswerFlops:
    """Operations to read a source and write, or score, a target.

    Args:
        config: of a pair, or of a decoder-only model as `open_contender` opens it, which is counted as the one causal
            stack that it is.
        source_tokens: read by the encoder, or by the prompt.
        target_tokens: the LM head runs on these only.

    Raises:
        ValueError: a negative number.
    """
    if source_tokens < 0 or target_tokens < 0:
        raise ValueError(
            f"lengths must be 0 or more tokens, got {source_tokens} to read and {target_tokens} to write"
        )
    if kind_of(config) == "decoder-only":
        reading = decoder_only_flops(config.decoder, source_tokens, 0)
        total = decoder_only_flops(config.decoder, source_tokens, target_tokens)
    else:
        reading = forward_flops(config, source_tokens, 0)
        total = forward_flops(config, source_tokens, target_tokens)
    return AnswerFlops(reading, total - reading)


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Sizes of a model at one precision."""

    parameters: int
    """Each counted once, however often it is shared."""
    parameters_per_token: int
    """Read for every token that is written: the decoder's blocks and the LM head, without what only the source needs.
    Batch 1 on a machine bound by its memory decodes at the speed of these."""
    weight_bytes: int
    weight_bytes_per_token: int
    """Of `parameters_per_token`."""
    cache_bytes_per_token: int
    """Keys and values of one token in all decoder layers, read or written: the source's are made by the decoder's
    projections. An engine that forgets what a window has left behind keeps less."""


def footprint(config: EncoderDecoderConfig, precision: Precision) -> Footprint:
    """Sizes of the model that a configuration describes; nothing is allocated."""
    with torch.device("meta"):
        model = EncoderDecoder(config)
    read: dict[int, Tensor] = {
        id(parameter): parameter
        for name, parameter in model.decoder.named_parameters()
        if not name.startswith("embed_tokens") and not any(part in f".{name}" for part in _OF_THE_SOURCE)
    }
    head = model.lm_head.out_proj.weight
    read[id(head)] = head
    whole = list(model.parameters())
    return Footprint(
        parameters=sum(parameter.numel() for parameter in whole),
        parameters_per_token=sum(parameter.numel() for parameter in read.values()),
        weight_bytes=sum(_bytes(parameter, precision) for parameter in whole),
        weight_bytes_per_token=sum(_bytes(parameter, precision) for parameter in read.values()),
        cache_bytes_per_token=_cache_bytes(config, precision),
    )


def _bytes(parameter: Tensor, precision: Precision) -> int:
    count = parameter.numel()
    if precision == "bfloat16":
        return 2 * count
    if precision == "float32" or parameter.ndim < 2:
        return 4 * count
    if precision == "int8":
        return count + 4 * parameter.shape[0]
    n_inputs = parameter.shape[1]
    group = next(size for size in (_INT4_GROUP, 32, 16, 8, 4, 2, 1) if n_inputs % size == 0)
    return count // 2 + 4 * (count // group)


def _cache_bytes(config: EncoderDecoderConfig, precision: Precision) -> int:
    decoder = config.decoder
    per_head = {"float32": 4 * decoder.head_dim, "bfloat16": 2 * decoder.head_dim}
    return (
        2
        * decoder.num_hidden_layers
        * decoder.num_key_value_heads
        * per_head.get(precision, decoder.head_dim + 4)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What is kept of a model's cost, so that a report can be made without the model."""

    path: str
    config: EncoderDecoderConfig
    latency: Latency | None = None
    """None: it was not measured."""

    @property
    def kind(self) -> Kind:
        return kind_of(self.config)

    def save(self, file: Path) -> None:
        """Write as JSON, whole or not at all; an older file of this name is replaced."""
        found = {
            "format": FORMAT,
            "path": self.path,
            "config": self.config.model_dump(mode="json"),
            "latency": None if self.latency is None else asdict(self.latency),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}.{os.getpid()}")
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        part.replace(file)

    @classmethod
    def load(cls, file: Path) -> Cost:
        """Read what `save` wrote.

        Raises:
            ValueError: not such a file.
        """
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if (given := found["format"]) != FORMAT:
                raise ValueError(f"its format is {given!r}, this version reads {FORMAT}")
            return cls(
                path=found["path"],
                config=EncoderDecoderConfig.model_validate(found["config"]),
                latency=None if found["latency"] is None else Latency.read(found["latency"]),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is not a cost file of `twofold frontier`: {error}") from error
