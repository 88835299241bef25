"""What a model is: one stack of transformer blocks, and how two of them make an encoder-decoder.

`StackConfig` describes every supported decoder-only donor, so that shared code never asks which family a
stack came from. `EncoderDecoderConfig` adds the second stack and the four choices of how they meet
(`layout`, `reads`, `cross_rope`, `decoder_positions`). Fields that a `config.json` of the field has keep
its names.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from twofold.config.base import Config

LayerType = Literal["full_attention", "sliding_attention"]
EncoderMask = Literal["bidirectional", "causal", "sink"]


class RopeConfig(Config):
    """Rotary position embedding of one layer type."""

    theta: float = Field(gt=0)
    """Base of the geometric series of wavelengths."""
    scaling: Literal["default", "linear", "llama3"] = "default"
    """`linear`: frequencies divided by `factor`. `llama3`: only the long wavelengths, with a smooth border."""
    factor: float = Field(default=1.0, ge=1.0)
    low_freq_factor: float | None = None
    """`llama3` only: wavelengths above `original_max_position_embeddings / low_freq_factor` are divided."""
    high_freq_factor: float | None = None
    """`llama3` only: wavelengths below `original_max_position_embeddings / high_freq_factor` are kept."""
    original_max_position_embeddings: int | None = None

    @model_validator(mode="after")
    def _llama3_is_complete(self) -> Self:
        extra = (self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings)
        if self.scaling == "llama3" and None in extra:
            raise ValueError(
                "rope scaling 'llama3' needs low_freq_factor, high_freq_factor and "
                f"original_max_position_embeddings, got {extra}"
            )
        if self.scaling != "llama3" and any(value is not None for value in extra):
            raise ValueError(f"rope scaling {self.scaling!r} takes none of the llama3 settings, got {extra}")
        if self.scaling == "default" and self.factor != 1.0:
            raise ValueError(f"rope scaling 'default' takes no factor, got {self.factor}; use 'linear'")
        return self


class StackConfig(Config):
    """One stack of transformer blocks: an encoder, a decoder, or a decoder-only donor."""

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    hidden_activation: Literal["silu", "gelu_pytorch_tanh", "gelu"]
    rms_norm_eps: float = Field(gt=0)
    norm_adds_one: bool
    """RMSNorm multiplies by `1 + weight` (Gemma) instead of `weight`."""
    post_norms: bool
    """Sub-layer outputs are normed before the residual sum (Gemma 2 and 3), beside the pre-norms all have."""
    qk_norm: bool
    """Queries and keys are normed per head before RoPE (Gemma 3, Qwen 3)."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    scale_embeddings: bool
    """Embeddings are multiplied by sqrt(hidden_size), rounded to their dtype (Gemma)."""
    rope: dict[LayerType, RopeConfig]
    """One entry for each layer type in `layer_types`."""
    layer_types: tuple[LayerType, ...]
    """One entry per layer."""
    sliding_window: int | None = None
    """Tokens a query of a causal sliding layer sees, itself included."""
    bidirectional_window: Literal["each_side", "total"] = "each_side"
    """What `sliding_window` = W means in an encoder: W - 1 tokens to each side (T5Gemma), or W in total,
    (W + 1) // 2 to the left with the query itself and W // 2 to the right (T5Gemma 2)."""
    query_pre_attn_scalar: float = Field(gt=0)
    """Attention scores are multiplied by this to the power of -1/2."""
    attn_logit_softcapping: float | None = Field(default=None, gt=0)
    final_logit_softcapping: float | None = Field(default=None, gt=0)
    """Applied to the logits when this stack writes; an encoder's is kept for its config.json only."""
    max_position_embeddings: int = Field(gt=0)
    initializer_range: float = Field(default=0.02, gt=0)
    dropout_rate: float = Field(default=0.0, ge=0.0, lt=1.0)
    attention_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers; "
                "give one per layer"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        missing = set(self.layer_types) - set(self.rope)
        if missing:
            raise ValueError(
                f"rope has no entry for layer types {sorted(missing)}; it has {sorted(self.rope)}"
            )
        if "sliding_attention" in self.layer_types and (self.sliding_window or 0) < 1:
            raise ValueError(
                f"sliding layers need a sliding_window of at least 1 token, got {self.sliding_window}"
            )
        return self

    def with_layers(self, layers: tuple[int, ...]) -> "StackConfig":
        """This stack cut down to the given layer indices, in the given order.

        Raises:
            ValueError: no layer given, or an index outside the stack.
        """
        bad = [i for i in layers if not 0 <= i < self.num_hidden_layers]
        if bad or not layers:
            raise ValueError(
                f"layer subset {list(layers)} must hold indices from 0 to {self.num_hidden_layers - 1}"
                + (f"; out of range: {bad}" if bad else "; it is empty")
            )
        return self.model_copy(
            update={
                "num_hidden_layers": len(layers),
                "layer_types": tuple(self.layer_types[i] for i in layers),
            }
        )


class EncoderDecoderConfig(Config):
    """Two stacks and how they meet. Every published design is a point in the four choices `layout`, `reads`,
    `cross_rope` and `decoder_positions`: T5Gemma is separate, final, no, restart; T5Gemma 2 is merged, final,
    no, restart; RedLLM is separate, final, yes, continue; the lossless start is merged, aligned, yes,
    continue."""

    model_type: Literal["twofold"] = "twofold"
    encoder: StackConfig
    decoder: StackConfig
    layout: Literal["separate", "merged"]
    """`separate`: a cross-attention sub-layer of its own. `merged`: decoder self-attention takes encoder keys
    and values into the same softmax, made as `source_projections` says."""
    reads: Literal["final", "aligned"]
    """What the decoder sees of the encoder. `final`: the normed output of the last layer, in every decoder
    layer. `aligned`: decoder layer l sees what self-attention of encoder layer `aligned_layers[l]` sees, that
    layer's normed input."""
    cross_rope: bool
    """Queries and encoder keys are rotated in cross-attention, by the decoder layer's RoPE. In the merged
    layout queries always are, for their own keys; the choice is about encoder keys."""
    decoder_positions: Literal["restart", "continue"]
    """Decoder positions start at 0, or go on after the last source position."""
    aligned_layers: tuple[int, ...] | None = None
    """For `aligned` reads: one encoder layer index per decoder layer."""
    encoder_mask: tuple[EncoderMask, ...]
    """One entry per encoder layer. `sink` is bidirectional except for the first token of each segment, which
    sees only itself as it did in the causal donor."""
    encoder_future_weight: float = Field(default=1.0, gt=0, le=1)
    """In `bidirectional` and `sink` layers, the factor on the attention weight of keys after the query, before the
    softmax divides; below 1 for an encoder that is being opened by degrees."""
    tie_word_embeddings: Literal["all", "decoder", "none"]
    """`all`: encoder table, decoder table and LM head are one tensor. `decoder`: decoder table and head."""
    tie_stacks: bool = False
    """Encoder and decoder are one stack of weights, used under two masks: embedding, blocks and final norm are shared,
    stored once, and trained by both sides. The pair then has exactly its donor's parameters."""
    decoder_start: Literal["bos", "last_source_token"]
    """First decoder input: BOS (T5Gemma), or the last source token, which then leaves the source."""
    source_bos: bool
    """Text fed to the encoder begins with BOS."""
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a target; the first one is appended in training."""
    source_projections: Literal["shared", "own"] = "shared"
    """Of the merged layout. `shared`: k and v projections of decoder self-attention make the source's keys and values
    too, so both widths are equal. `own`: each decoder layer has a second pair of them for the source, with biases,
    from any encoder width; a k norm is shared all the same."""
    eoi_token_id: int | None = None
    """T5Gemma 2: this token's embedding is a tensor of its own, `eoi_embedding`, that is not scaled."""
    classifier_dropout_rate: float = Field(default=0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _stacks_fit(self) -> Self:
        encoder, decoder = self.encoder, self.decoder
        if encoder.vocab_size != decoder.vocab_size:
            raise ValueError(
                f"encoder vocab_size {encoder.vocab_size} != decoder vocab_size {decoder.vocab_size}; "
                "both sides must share one vocabulary"
            )
        has_own = self.source_projections == "own"
        if has_own and self.layout != "merged":
            raise ValueError(
                "source_projections='own' is for layout='merged'; with layout='separate' cross-attention has "
                "projections of its own anyhow. Leave it at 'shared'"
            )
        if self.layout == "merged" and not has_own and encoder.hidden_size != decoder.hidden_size:
            raise ValueError(
                f"merged attention shares k and v projections between both sides, so encoder width "
                f"{encoder.hidden_size} and decoder width {decoder.hidden_size} must be equal; "
                "use source_projections='own' or layout='separate'"
            )
        if self.tie_word_embeddings == "all" and encoder.hidden_size != decoder.hidden_size:
            raise ValueError(
                f"one embedding table for both sides needs equal widths, got {encoder.hidden_size} and "
                f"{decoder.hidden_size}; set tie_word_embeddings to 'decoder' or 'none'"
            )
        if self.tie_stacks and (
            self.layout != "merged" or has_own or encoder != decoder or self.tie_word_embeddings == "decoder"
        ):
            raise ValueError(
                "tie_stacks makes one stack of both, so it needs layout='merged', source_projections='shared', equal "
                f"stacks and tie_word_embeddings 'all' or 'none', got layout={self.layout!r}, source_projections="
                f"{self.source_projections!r}, {'equal' if encoder == decoder else 'unequal'} stacks and "
                f"{self.tie_word_embeddings!r}"
            )
        if (self.reads == "aligned") != (self.aligned_layers is not None):
            raise ValueError(
                f"aligned_layers must be given exactly when reads='aligned', got reads={self.reads!r}, "
                f"aligned_layers={self.aligned_layers}"
            )
        if self.aligned_layers is not None:
            bad = [i for i in self.aligned_layers if not 0 <= i < encoder.num_hidden_layers]
            if len(self.aligned_layers) != decoder.num_hidden_layers or bad:
                raise ValueError(
                    f"aligned_layers {list(self.aligned_layers)} must hold {decoder.num_hidden_layers} encoder "
                    f"layer indices from 0 to {encoder.num_hidden_layers - 1}, one per decoder layer"
                )
        if len(self.encoder_mask) != encoder.num_hidden_layers:
            raise ValueError(
                f"encoder_mask has {len(self.encoder_mask)} entries for {encoder.num_hidden_layers} encoder "
                "layers; give one per layer"
            )
        if self.decoder_start == "bos" and self.bos_token_id is None:
            raise ValueError(
                "decoder_start='bos' needs bos_token_id, which is not set; "
                "set it, or use decoder_start='last_source_token'"
            )
        return self

    @property
    def window_covers_source(self) -> bool:
        """On its sliding layers the decoder applies the window over source and target positions together, as
        the donor of an aligned, merged pair does. Everywhere else the whole source is visible."""
        return self.layout == "merged" and self.reads == "aligned" and self.decoder_positions == "continue"
