"""What autograd keeps between forward and backward, in bytes, for each kind of sub-layer.

This is an account of the code in `models/layers.py`, `models/attention.py` and `models/stack.py`: whoever changes
what they compute changes the function of the same name here. `tests/train/plan/account.py` prints it beside what
PyTorch really keeps.

Attention is taken to be fused (sdpa, flex, or per segment): it keeps queries, keys, values, its output and one
float32 number per query and head, and no T x S tensor. That does not hold for the eager backend, which only models
with both a soft-cap and attention dropout need.

n, m: source and target positions of a micro-batch, padding included. D, F, N, K, H as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from twofold.config import EncoderDecoderConfig, StackConfig
from twofold.models.flops import Checkpointing, Trained, trained_encoder_layers


@dataclass(frozen=True)
class Numbers:
    """Bytes of one number."""

    stream: int
    """Of the residual stream."""
    compute: int
    """Of what goes into matrix products."""
    has_bool_masks: bool = True
    """Dropout keeps bytes, as on CUDA; on the CPU its masks have the dtype of what they fall on."""

    @property
    def casts(self) -> bool:
        """Every linear layer casts its input to `compute`, a copy that is kept for its weight's gradient."""
        return self.stream != self.compute

    def mask(self, given: int) -> int:
        """Bytes of a number of a dropout mask over numbers of `given` bytes."""
        return 1 if self.has_bool_masks else given


FLOAT32 = Numbers(4, 4)
AUTOCAST = Numbers(4, 2)
"""bfloat16 on one device: float32 weights, embeddings and stream, products in bfloat16."""
BFLOAT16 = Numbers(2, 2)
"""bfloat16 with sharded weights: they are gathered in bfloat16, and the stream takes their dtype."""


@dataclass(frozen=True)
class Kept:
    """Bytes that one layer keeps until its backward pass."""

    self_attention: int = 0
    cross_attention: int = 0
    mlp: int = 0

    @property
    def total(self) -> int:
        return self.self_attention + self.cross_attention + self.mlp


@dataclass(frozen=True)
class Activations:
    """What a micro-batch keeps, layer by layer; a checkpointed layer's entry is what stays of it."""

    encoder: tuple[Kept, ...]
    decoder: tuple[Kept, ...]
    outside: int
    """Ids, final norms, and what both stacks hand on."""
    recomputed: int
    """Most that one checkpointed layer brings back while its backward pass runs."""

    @property
    def total(self) -> int:
        return sum(layer.total for layer in (*self.encoder, *self.decoder)) + self.outside

    def by_kind(self) -> dict[str, int]:
        """Bytes of each kind of sub-layer over all layers."""
        return {
            "encoder_self_attention": sum(layer.self_attention for layer in self.encoder),
            "encoder_mlp": sum(layer.mlp for layer in self.encoder),
            "decoder_self_attention": sum(layer.self_attention for layer in self.decoder),
            "decoder_cross_attention": sum(layer.cross_attention for layer in self.decoder),
            "decoder_mlp": sum(layer.mlp for layer in self.decoder),
            "outside_blocks": self.outside,
        }


def norm_bytes(width: int, given: int, stack: StackConfig, *, learns: bool) -> int:
    """RMSNorm, per vector: its input in float32, the inverse root, and the normed vector for the weight's gradient.

    Args:
        given: bytes of a number of the input.
    """
    normed = (4 if stack.norm_adds_one else given) * width if learns else 0
    return 4 * width + 4 + normed


def linear_inputs_bytes(width: int, n_linears: int, numbers: Numbers, *, learns: bool) -> int:
    """What linear layers keep of a vector that all of them read: it, or a cast copy for each."""
    if not learns:
        return 0
    return (n_linears if numbers.casts else 1) * numbers.compute * width


def heads_bytes(stack: StackConfig, n_heads: int, numbers: Numbers, *, learns: bool) -> int:
    """Queries, keys or values of one position as attention keeps them, with the norm before where there is one."""
    kept = numbers.compute * n_heads * stack.head_dim
    if stack.qk_norm:
        kept += n_heads * norm_bytes(stack.head_dim, numbers.compute, stack, learns=learns)
    return kept


def attended_bytes(stack: StackConfig, numbers: Numbers) -> int:
    """Output of fused attention for one query, which is also what o_proj reads, and its log-sum-exp per head."""
    return stack.num_attention_heads * (numbers.compute * stack.head_dim + 4)


def post_norm_bytes(stack: StackConfig, numbers: Numbers, *, learns: bool) -> int:
    """The norm behind a sub-layer, where there is one, and the dropout mask."""
    kept = numbers.mask(numbers.compute) * stack.hidden_size if stack.dropout_rate else 0
    if stack.post_norms:
        kept += norm_bytes(stack.hidden_size, numbers.compute, stack, learns=learns)
    return kept


def self_attention_bytes(stack: StackConfig, n: int, numbers: Numbers, *, learns: bool = True) -> int:
    """Self-attention over n positions, with the norms around it; each position is query, key and value."""
    width, kv_heads = stack.hidden_size, stack.num_key_value_heads
    per_position = (
        norm_bytes(width, numbers.stream, stack, learns=learns)
        + linear_inputs_bytes(width, 3, numbers, learns=learns)
        + heads_bytes(stack, stack.num_attention_heads, numbers, learns=learns)
        + heads_bytes(stack, kv_heads, numbers, learns=learns)
        + numbers.compute * kv_heads * stack.head_dim
        + attended_bytes(stack, numbers)
        + post_norm_bytes(stack, numbers, learns=learns)
    )
    return n * per_position


def source_keys_bytes(config: EncoderDecoderConfig, n: int, numbers: Numbers) -> int:
    """Keys and values that one decoder layer makes of n source positions. Without a cast, the encoder's output
    that they are made of is kept once for all layers, and counted there."""
    stack = config.decoder
    inputs = linear_inputs_bytes(config.encoder.hidden_size, 2, numbers, learns=True) if numbers.casts else 0
    keys = heads_bytes(stack, stack.num_key_value_heads, numbers, learns=True)
    values = numbers.compute * stack.num_key_value_heads * stack.head_dim
    return n * (inputs + keys + values)


def cross_attention_bytes(config: EncoderDecoderConfig, n: int, m: int, numbers: Numbers) -> int:
    """The cross-attention sub-layer of m target positions, or what the merged layout reads of the source."""
    source = source_keys_bytes(config, n, numbers)
    if config.layout == "merged":
        return source
    stack = config.decoder
    per_query = (
        norm_bytes(stack.hidden_size, numbers.stream, stack, learns=True)
        + linear_inputs_bytes(stack.hidden_size, 1, numbers, learns=True)
        + heads_bytes(stack, stack.num_attention_heads, numbers, learns=True)
        + attended_bytes(stack, numbers)
        + post_norm_bytes(stack, numbers, learns=True)
    )
    return source + m * per_query


def mlp_bytes(stack: StackConfig, n: int, numbers: Numbers, *, learns: bool = True) -> int:
    """The gated MLP with the norms around it: gate before and after its activation, up, and their product."""
    width, inner = stack.hidden_size, stack.intermediate_size
    per_position = (
        norm_bytes(width, numbers.stream, stack, learns=learns)
        + linear_inputs_bytes(width, 2, numbers, learns=learns)
        + numbers.compute * (3 + learns) * inner
        + (numbers.mask(numbers.compute) * inner if stack.dropout_rate else 0)
        + post_norm_bytes(stack, numbers, learns=learns)
    )
    return n * per_position


def products_bytes(
    stack: StackConfig, n: int, numbers: Numbers, *, memory: int = 0, is_separate: bool = False
) -> int:
    """What selective checkpointing keeps of a block: its input, and the outputs of matrix products and attention.

    Args:
        memory: source positions that a decoder block makes keys and values of.
        is_separate: the block has a cross-attention sub-layer.
    """
    heads, kv_heads = stack.num_attention_heads, stack.num_key_value_heads
    queries = n * (
        numbers.compute * (2 * heads * stack.head_dim + stack.hidden_size) + 4 * heads
    )  # q, attended, o
    keys = 2 * numbers.compute * kv_heads * stack.head_dim
    mlp = n * numbers.compute * (2 * stack.intermediate_size + stack.hidden_size)
    stream = n * numbers.stream * stack.hidden_size
    return stream + (1 + is_separate) * queries + (n + memory) * keys + mlp


def activations(
    config: EncoderDecoderConfig,
    n: int,
    m: int,
    numbers: Numbers,
    *,
    trained: Trained = "everything",
    checkpointing: Checkpointing = "none",
    answers: int = 1,
) -> Activations:
    """All that a micro-batch of n source and m target positions keeps, the loss apart.

    Args:
        answers: to every source; each has a copy of what the decoder reads of it.
    """
    encoder, decoder = config.encoder, config.decoder
    read = n * answers
    encoder_learns, decoder_learns = trained == "everything", trained != "cross_attention"
    n_trained = trained_encoder_layers(config) if encoder_learns else 0
    encoder_layer = Kept(self_attention_bytes(encoder, n, numbers), 0, mlp_bytes(encoder, n, numbers))
    encoder_layers = [encoder_layer] * n_trained + [Kept()] * (encoder.num_hidden_layers - n_trained)
    if (
        encoder_learns and n_trained < encoder.num_hidden_layers
    ):  # aligned reads end at this layer's first norm
        last = norm_bytes(encoder.hidden_size, numbers.stream, encoder, learns=True)
        last += 0 if numbers.casts else numbers.stream * encoder.hidden_size
        encoder_layers[n_trained] = Kept(self_attention=n * last)

    cross = cross_attention_bytes(config, read, m, numbers)
    own = self_attention_bytes(decoder, m, numbers, learns=decoder_learns)
    mlp = mlp_bytes(decoder, m, numbers, learns=decoder_learns)
    decoder_layers = [Kept(own, cross, mlp)] * decoder.num_hidden_layers
    if not decoder_learns:  # nothing before the first cross-attention asks for a gradient, its input included
        stream = norm_bytes(decoder.hidden_size, numbers.stream, decoder, learns=False)
        decoder_layers[0] = Kept(0, cross - m * stream, mlp)

    is_checkpointed = checkpointing != "none"
    outside = _outside_blocks(config, n, m, numbers, trained, is_checkpointed=is_checkpointed, read=read)
    if checkpointing == "none":
        return Activations(tuple(encoder_layers), tuple(decoder_layers), outside, 0)

    if checkpointing == "full":
        encoder_kept = n * numbers.stream * encoder.hidden_size
        decoder_kept = m * numbers.stream * decoder.hidden_size
    else:
        is_separate = config.layout == "separate"
        encoder_kept = products_bytes(encoder, n, numbers)
        decoder_kept = products_bytes(decoder, m, numbers, memory=read, is_separate=is_separate)
    recomputed = max(layer.total for layer in (*encoder_layers, *decoder_layers))
    # Which part of a block the bytes belong to is not kept apart; the input of a block is its self-attention's.
    return Activations(
        tuple(Kept(encoder_kept) if layer.total else layer for layer in encoder_layers),
        (Kept(decoder_kept),) * len(decoder_layers),
        outside,
        recomputed,
    )


def encoder_activations(
    config: EncoderDecoderConfig, n: int, numbers: Numbers, *, checkpointing: Checkpointing = "none"
) -> Activations:
    """All that an encoder alone keeps of n positions, where its end is read."""
    encoder = config.encoder
    layer = Kept(self_attention_bytes(encoder, n, numbers), 0, mlp_bytes(encoder, n, numbers))
    tables = 2 * 4 * n * encoder.head_dim * len(set(encoder.layer_types))
    outside = 8 * n + tables + n * norm_bytes(encoder.hidden_size, numbers.stream, encoder, learns=True)
    if encoder.dropout_rate:
        outside += 2 * numbers.mask(numbers.stream) * n * encoder.hidden_size
    recomputed = 0
    if checkpointing != "none":
        stream = n * numbers.stream * encoder.hidden_size
        kept = stream if checkpointing == "full" else products_bytes(encoder, n, numbers)
        layer, recomputed = Kept(kept), layer.total
    return Activations((layer,) * encoder.num_hidden_layers, (), outside, recomputed)


def _outside_blocks(
    config: EncoderDecoderConfig,
    n: int,
    m: int,
    numbers: Numbers,
    trained: Trained,
    *,
    is_checkpointed: bool,
    read: int,
) -> int:
    """Ids, RoPE tables, final norms, and what the decoder reads of the encoder; `read`: source positions it reads,
    more than n where several answers have copies of them."""
    encoder, decoder = config.encoder, config.decoder
    encoder_learns, decoder_learns = trained == "everything", trained != "cross_attention"
    kept = 8 * (encoder_learns * n + decoder_learns * m)
    tables = encoder_learns * n * encoder.head_dim * len(set(encoder.layer_types))
    decoder_types = len(set(decoder.layer_types))
    tables += (m + config.cross_rope * read) * decoder.head_dim * decoder_types
    kept += 2 * 4 * tables  # cosine and sine
    kept += m * norm_bytes(decoder.hidden_size, numbers.stream, decoder, learns=decoder_learns)
    has_final_read = config.aligned_layers is None
    if has_final_read and encoder_learns:
        kept += n * norm_bytes(encoder.hidden_size, numbers.stream, encoder, learns=True)
    if read > n:  # copies, which no layer of the encoder keeps
        kept += len(set(config.aligned_layers or (0,))) * read * numbers.stream * encoder.hidden_size
    elif is_checkpointed or not numbers.casts:
        # Aligned reads are what the encoder's own layers keep anyway, unless those are made again.
        is_shared = not has_final_read and encoder_learns and not is_checkpointed
        n_reads = 0 if is_shared else len(set(config.aligned_layers or (0,)))
        kept += n_reads * n * numbers.stream * encoder.hidden_size
    mask = numbers.mask(numbers.stream)  # behind embeddings and final norms
    if encoder.dropout_rate and encoder_learns:
        kept += (1 + has_final_read) * mask * n * encoder.hidden_size
    if decoder.dropout_rate:
        kept += (1 + decoder_learns) * mask * m * decoder.hidden_size
    return kept
