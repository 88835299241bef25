"""The decoder as a chain of OpenVINO graphs, cut where attention reads keys and values.

Between two cuts nothing depends on other tokens, so a call takes M tokens of any rows and places, without padding;
attention itself is `ragged.attend`. For a separate layout the chain is: queries, keys and values of layer 0 | its
output projection, queries of its cross-attention | output projection, MLP, queries, keys and values of layer 1 | ...
| logits. The merged layout has every other cut only.

Letters: M tokens, D width, N query heads, K key-value heads, H head_dim, V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as op
import torch
from torch import Tensor

from twofold.config import LayerType
from twofold.infer.backends.base import Attend, Floats
from twofold.infer.backends.openvino.compiling import Compiler
from twofold.infer.backends.openvino.lower import Lowering, Node, Rope, ints, model_of, parameter
from twofold.models import EncoderDecoder
from twofold.models.attention import Attention
from twofold.models.stack import DecoderBlock

_EXACT_TOKENS, _TOKENS_STEP = 8, 4
"""Calls with more tokens are filled up to the next multiple: OpenVINO prepares itself for every size that is new, which
takes it as long as a step (SmolLM2's pair, 2 cores: 20 ms), and rows that end one by one go through all of them."""
_KEPT_SIZES = 16
"""Numbers of tokens M for which buffers are kept."""
_KEPT_TOKENS = 64
"""Larger calls, which are prefixes and not steps, are given theirs anew."""


@dataclass(frozen=True)
class Piece:
    """One graph of the chain, and the attention that follows it."""

    compiled: Future[Any]
    inputs: tuple[str, ...]
    rope_type: LayerType | None
    """Which rotation it needs."""
    has_state: bool
    """Its first output is x; the first piece takes x as it is."""
    layer: int = 0
    attention: Attention | None = None
    """None after the last."""
    has_new: bool = False
    """The attention is over the row's own tokens (too): their keys and values are the last two outputs."""


@dataclass
class Bound:
    """The chain with buffers for M tokens."""

    x: Floats
    attended: Floats
    rope: dict[LayerType, tuple[Floats, Floats]]
    logits: Floats
    requests: list[Any] = field(default_factory=list)
    outputs: list[list[Floats]] = field(default_factory=list)


class DecoderChain:
    """`DecoderRun` for any number of tokens.

    Args:
        model: whose weights are read; it stays what embeds tokens.
        lowering: how weights are kept.
        compiler: from a graph to what runs it.
    """

    def __init__(self, model: EncoderDecoder, lowering: Lowering, compiler: Compiler) -> None:
        self._model, self._lower = model, lowering
        self._pieces = list(self._cut(compiler))
        self._bound: OrderedDict[int, Bound] = OrderedDict()

    @torch.no_grad()
    def run(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """See `DecoderRun`."""
        decoder, n = self._model.decoder, len(input_ids)
        bound = self._bound_for(_size(n))
        torch.from_numpy(bound.x[:n]).copy_(decoder.embed_tokens(input_ids))
        for layer_type, tables in decoder.rope(positions[:, None]).items():
            for into, table in zip(bound.rope[layer_type], tables, strict=True):
                torch.from_numpy(into[:n]).copy_(table[:, 0])
        for piece, request, outputs in zip(self._pieces, bound.requests, bound.outputs, strict=True):
            request.infer()
            if piece.attention is not None:
                q, *new = (output[:n] for output in outputs[int(piece.has_state) :])
                attend(piece.layer, piece.attention, q, (new[0], new[1]) if new else None, bound.attended[:n])
        return torch.from_numpy(bound.logits[:n])

    def _bound_for(self, n_tokens: int) -> Bound:
        if n_tokens in self._bound:
            self._bound.move_to_end(n_tokens)
            return self._bound[n_tokens]
        bound = self._bind(n_tokens)
        if n_tokens <= _KEPT_TOKENS:
            self._bound[n_tokens] = bound
            if len(self._bound) > _KEPT_SIZES:
                self._bound.popitem(last=False)
        return bound

    def _bind(self, n_tokens: int) -> Bound:
        config = self._model.decoder.stack_config

        def zeros(*shape: int) -> Floats:
            return np.zeros((n_tokens, *shape), np.float32)  # no row that only fills up is ever no number

        bound = Bound(
            x=zeros(config.hidden_size),
            attended=zeros(config.num_attention_heads, config.head_dim),
            rope={t: (zeros(1, config.head_dim), zeros(1, config.head_dim)) for t in config.rope},
            logits=zeros(config.vocab_size),
        )
        x = bound.x
        for piece in self._pieces:
            given = {"x": x, "attended": bound.attended}
            if piece.rope_type is not None:
                given |= dict(zip(("cos", "sin"), bound.rope[piece.rope_type], strict=True))
            request = piece.compiled.result().create_infer_request()
            for name in piece.inputs:
                request.set_tensor(name, ov.Tensor(given[name], shared_memory=True))
            outputs = [bound.logits]
            if piece.attention is not None:
                q = zeros(piece.attention.n_heads, piece.attention.head_dim)
                kv = [
                    zeros(piece.attention.n_kv_heads, piece.attention.head_dim)
                    for _ in range(2 * piece.has_new)
                ]
                outputs = [zeros(config.hidden_size)] * piece.has_state + [q, *kv]
                x = outputs[0] if piece.has_state else x
            for i, output in enumerate(outputs):
                request.set_output_tensor(i, ov.Tensor(output, shared_memory=True))
            bound.requests.append(request)
            bound.outputs.append(outputs)
        return bound

    def _cut(self, compiler: Compiler) -> Iterator[Piece]:
        """The chain, piece by piece."""
        decoder, lower = self._model.decoder, self._lower
        graph = _Graph(self._model)
        x = graph.input("x")
        for i, (layer, layer_type) in enumerate(
            zip(decoder.layers, decoder.stack_config.layer_types, strict=True)
        ):
            assert isinstance(layer, DecoderBlock)
            rope = graph.rope(layer_type)
            read = lower.rms_norm(layer.pre_self_attn_layernorm, x)
            q = lower.queries(layer.self_attn, read, rope)
            new = lower.keys_values(layer.self_attn, read, rope)
            yield graph.piece(compiler, [] if i == 0 else [x], [q, *new], i, layer.self_attn)
            graph = _Graph(self._model)
            x = lower.attended(
                layer.self_attn, layer.post_self_attn_layernorm, graph.input("x"), graph.input("attended")
            )
            if not decoder.is_merged:
                read = lower.rms_norm(layer.pre_cross_attn_layernorm, x)
                q = lower.queries(
                    layer.cross_attn, read, graph.rope(layer_type) if decoder.cross_rope else None
                )
                yield graph.piece(compiler, [x], [q], i, layer.cross_attn)
                graph = _Graph(self._model)
                x = lower.attended(
                    layer.cross_attn,
                    layer.post_cross_attn_layernorm,
                    graph.input("x"),
                    graph.input("attended"),
                )
            x = lower.feed_forward(layer, x)
        logits = lower.head(self._model.lm_head, lower.rms_norm(decoder.norm, x))
        yield graph.piece(compiler, [], [logits], 0, None)


def _size(n_tokens: int) -> int:
    """Of the call that so many tokens are run with."""
    return n_tokens if n_tokens <= _EXACT_TOKENS else -(-n_tokens // _TOKENS_STEP) * _TOKENS_STEP


class _Graph:
    """One piece while it is being made. Inside it tokens stand in a second dimension of 1: [M, 1, D]."""

    def __init__(self, model: EncoderDecoder) -> None:
        config = model.decoder.stack_config
        self._shapes = {
            "x": (config.hidden_size,),
            "attended": (config.num_attention_heads, config.head_dim),
            "cos": (1, config.head_dim),
            "sin": (1, config.head_dim),
        }
        self._inputs: dict[str, Node] = {}
        self._rope_type: LayerType | None = None

    def input(self, name: str) -> Node:
        """[M, 1, ...]."""
        self._inputs[name] = parameter(name, [-1, *self._shapes[name]])
        return op.unsqueeze(self._inputs[name], ints(1))

    def rope(self, layer_type: LayerType) -> Rope:
        """The rotation of all tokens; one for each piece."""
        assert self._rope_type in (None, layer_type)
        self._rope_type = layer_type
        return self.input("cos"), self.input("sin")

    def piece(
        self,
        compiler: Compiler,
        state: list[Node],
        others: list[Node],
        layer: int,
        attention: Attention | None,
    ) -> Piece:
        """What was made so far, its outputs without the second dimension."""
        outputs = [op.squeeze(node, ints(1)) for node in (*state, *others)]
        return Piece(
            compiled=compiler(model_of(outputs, list(self._inputs.values()), "decoder")),
            inputs=tuple(self._inputs),
            rope_type=self._rope_type,
            has_state=bool(state),
            layer=layer,
            attention=attention,
            has_new=len(others) == 3,
        )
