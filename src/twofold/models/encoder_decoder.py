"""The encoder-decoder: ids in, logits out.

Letters: B batch, S source tokens, T target tokens, E encoder width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from twofold.config import EncoderDecoderConfig, EncoderMask, StackConfig
from twofold.config.history import History
from twofold.models.attention import Attention, Backend
from twofold.models.cache import DecoderCache
from twofold.models.layers import RMSNorm
from twofold.models.masks import Tokens
from twofold.models.stack import Decoder, Encoder, EncoderOutput


@dataclass(frozen=True)
class EncoderDecoderOutput:
    """What a call of the model returns."""

    logits: Tensor
    """float32 [B, T, V], soft-capped where the family does."""
    encoder: EncoderOutput
    decoder_hidden_states: tuple[Tensor, ...] = ()
    """On request: the input of every decoder layer, then the normed output, [B, T, D] each."""


class Stacks(nn.Module):
    """Both stacks, under the names that checkpoints use: `model.encoder`, `model.decoder`."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)


class LMHead(nn.Module):
    """Hidden states to logits; float32 from the soft-cap on, so that close candidates do not tie."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.out_proj = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.softcap = config.final_logit_softcapping

    def forward(self, x_BTD: Tensor) -> Tensor:
        logits_BTV: Tensor = self.out_proj(x_BTD).float()
        if self.softcap is not None:
            logits_BTV = self.softcap * torch.tanh(logits_BTV / self.softcap)
        return logits_BTV


class EncoderModel(nn.Module):
    """What training and checkpoints need of a model with an encoder, whatever it writes or answers.

    Attributes:
        config: what the pair is, or was, of which this is a part.
        tokenizer: a transformers tokenizer, or None; set by `twofold.load` and `twofold.adapt`.
        adaptation: what `twofold.adapt` did, tensor by tensor; None for a model that was loaded.
        new_modules: names of modules that begin at random and always train, whatever else is frozen.
        history: where it comes from and what was done to it, which its card tells; None for a model made otherwise.
    """

    new_modules: tuple[str, ...] = ()

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Any = None
        self.adaptation: dict[str, Any] | None = None
        self.history: History | None = None

    def tie_weights(self) -> None:
        """Make one parameter of what `config` says is one; here nothing is."""

    def set_encoder_mask(
        self, mask: EncoderMask | Sequence[EncoderMask], *, future_share: float = 1.0
    ) -> None:
        """Change what encoder layers see, in the model and in its config.

        Args:
            mask: one for all layers, or one per layer.
            future_share: see `EncoderDecoderConfig.encoder_future_share`.

        Raises:
            ValueError: not one per layer, or a share outside (0, 1].
        """
        masks = (mask,) * self.config.encoder.num_hidden_layers if isinstance(mask, str) else tuple(mask)
        fields = self.config.model_dump() | {"encoder_mask": masks, "encoder_future_share": future_share}
        self.config = EncoderDecoderConfig.model_validate(fields)
        for module in self.modules():
            if isinstance(module, Encoder):
                module.layer_masks, module.future_share = masks, future_share

    def set_attention_backend(self, backend: Backend) -> None:
        """Use one backend (see `models.attention.attend`) in every attention module."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend


class EncoderDecoder(EncoderModel):
    """Two stacks, the way `config` says they meet, and a language-model head."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__(config)
        self.model = Stacks(config)
        self.lm_head = LMHead(config.decoder)
        self.tie_weights()

    @classmethod
    def of_modules(cls, config: EncoderDecoderConfig, model: Stacks, lm_head: LMHead) -> Self:
        """A pair around modules that are there already, shared and not copied."""
        pair = cls.__new__(cls)
        nn.Module.__init__(pair)
        pair.config, pair.tokenizer, pair.adaptation, pair.history = config, None, None, None
        pair.model, pair.lm_head = model, lm_head
        return pair

    @property
    def encoder(self) -> Encoder:
        return self.model.encoder

    @property
    def decoder(self) -> Decoder:
        return self.model.decoder

    def tie_weights(self) -> None:
        """Make one parameter of what `tie_stacks` and `tie_word_embeddings` say is one."""
        if self.config.tie_stacks:
            self.decoder.embed_tokens, self.decoder.norm = self.encoder.embed_tokens, self.encoder.norm
            for encoder_block, decoder_block in zip(self.encoder.layers, self.decoder.layers, strict=True):
                for name, part in encoder_block.named_children():
                    setattr(decoder_block, name, part)
        if self.config.tie_word_embeddings == "all":
            self.decoder.embed_tokens.weight = self.encoder.embed_tokens.weight
            if self.config.eoi_token_id is not None:
                self.decoder.embed_tokens.eoi_embedding = self.encoder.embed_tokens.eoi_embedding
        if self.config.tie_word_embeddings != "none":
            self.lm_head.out_proj.weight = self.decoder.embed_tokens.weight

    @torch.no_grad()
    def initialise_randomly(self, seed: int) -> None:
        """Fill every parameter as a model trained from scratch starts: matrices from a normal distribution with
        each stack's `initializer_range`, norms neutral, biases zero."""
        generator = torch.Generator().manual_seed(seed)
        for stack in (self.encoder, self.decoder):
            for name, parameter in stack.named_parameters():
                if parameter.ndim == 2:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(noise * stack.stack_config.initializer_range)
                elif name.endswith(("bias", "eoi_embedding")):
                    parameter.zero_()
            for module in stack.modules():
                if isinstance(module, RMSNorm):
                    module.weight.fill_(0.0 if module.adds_one else 1.0)
        if self.config.tie_word_embeddings == "none":
            head = self.lm_head.out_proj.weight
            noise = torch.randn(head.shape, generator=generator)
            head.copy_(noise * self.config.decoder.initializer_range)

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        segment_ids: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> EncoderOutput:
        """Run the encoder alone. Arguments and errors as in `forward`."""
        tokens = locate_tokens(self.config, "encoder", input_ids, attention_mask, segment_ids)
        output: EncoderOutput = self.encoder(input_ids, tokens, output_hidden_states=output_hidden_states)
        return output

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        *,
        segment_ids: Tensor | None = None,
        decoder_segment_ids: Tensor | None = None,
        encoder_output: EncoderOutput | None = None,
        cache: DecoderCache | None = None,
        output_hidden_states: bool = False,
    ) -> EncoderDecoderOutput:
        """Logits of the token after each decoder input: `states`, then the head. Arguments and errors as there."""
        x_BTD, encoder_output, hidden = self.states(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            segment_ids=segment_ids,
            decoder_segment_ids=decoder_segment_ids,
            encoder_output=encoder_output,
            cache=cache,
            output_hidden_states=output_hidden_states,
        )
        return EncoderDecoderOutput(self.lm_head(x_BTD), encoder_output, hidden)

    def states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        *,
        segment_ids: Tensor | None = None,
        decoder_segment_ids: Tensor | None = None,
        encoder_output: EncoderOutput | None = None,
        cache: DecoderCache | None = None,
        output_hidden_states: bool = False,
    ) -> tuple[Tensor, EncoderOutput, tuple[Tensor, ...]]:
        """What the head reads: the decoder's normed states, for those who do not want all logits at once.

        Args:
            input_ids: int64 [B, S]. Left out when `encoder_output` is given.
            attention_mask: bool or int [B, S], True = real token. Without it and without `segment_ids`, tokens
                equal to `pad_token_id` are padding where that id is not also an end token, else all are real.
            decoder_input_ids: int64 [B, T]: the target shifted right, its start token first; or, with a filled
                `cache`, the tokens after those in it.
            decoder_attention_mask: bool or int [B, T], for the given tokens only.
            segment_ids: int64 [B, S], instead of `attention_mask`, for packed rows: 1, 2, 3... from the left, 0
                is padding. Nothing is seen across segments, and positions begin anew in each.
            decoder_segment_ids: int64 [B, T]; target segment i reads source segment i.
            encoder_output: what `encode` returned for these sources.
            cache: extended in place; pass it again with the next tokens.
            output_hidden_states: also return what every layer read.

        Returns:
            States [B, T, D], the encoder's output, and on request what every decoder layer read and the states.

        Raises:
            ValueError: missing or doubled arguments, wrong shapes, or a sequence longer than
                `max_position_embeddings`.
        """
        if decoder_input_ids is None:
            raise ValueError(
                "decoder_input_ids are missing; pass the target shifted right, start token first"
            )
        if (input_ids is None) == (encoder_output is None):
            raise ValueError("pass either input_ids or encoder_output: exactly one of them")
        if encoder_output is None:
            assert input_ids is not None
            encoder_output = self.encode(
                input_ids, attention_mask, segment_ids=segment_ids, output_hidden_states=output_hidden_states
            )
        elif attention_mask is not None or segment_ids is not None:
            raise ValueError(
                "attention_mask and segment_ids are part of encoder_output; pass them to encode()"
            )
        n_source_rows = encoder_output.tokens.segments.shape[0]
        if decoder_input_ids.shape[0] != n_source_rows:
            raise ValueError(
                f"decoder_input_ids have {decoder_input_ids.shape[0]} rows, the source has {n_source_rows}; "
                "give one target row per source row"
            )
        n_before = 0 if cache is None else cache.n_tokens
        if self.config.decoder_positions == "continue" and segment_ids is None:
            n_before += encoder_output.tokens.segments.shape[1]
        own = locate_tokens(
            self.config,
            "decoder",
            decoder_input_ids,
            decoder_attention_mask,
            decoder_segment_ids,
            n_before=n_before,
        )
        x_BTD, hidden = self.decoder(
            decoder_input_ids,
            own.segments,
            encoder_output,
            cache,
            is_plain=own.is_plain,
            output_hidden_states=output_hidden_states,
        )
        return x_BTD, encoder_output, hidden


def locate_tokens(
    config: EncoderDecoderConfig,
    side: Literal["encoder", "decoder"],
    ids: Tensor,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None = None,
    *,
    n_before: int = 0,
) -> Tokens:
    """Check the ids and mask of one side (see `EncoderDecoder.forward`) and turn them into positions and segments.

    Args:
        n_before: tokens that stand before these, for the length limit.
    """
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{side} ids must be an int64 tensor [batch, tokens], got {ids.dtype} {list(ids.shape)}"
        )
    if attention_mask is not None and segment_ids is not None:
        raise ValueError(f"{side}: pass an attention mask or segment ids, not both")
    given = attention_mask if attention_mask is not None else segment_ids
    if given is not None and given.shape != ids.shape:
        raise ValueError(
            f"{side} mask or segment ids must have the shape of the ids, {list(ids.shape)}, got {list(given.shape)}"
        )
    stack = config.encoder if side == "encoder" else config.decoder
    limit, n_tokens = stack.max_position_embeddings, n_before + ids.shape[1]
    if segment_ids is None and n_tokens > limit:  # packed rows: positions begin anew in each segment
        raise ValueError(
            f"{side} sequence of {n_tokens} tokens is longer than max_position_embeddings ({limit}); "
            "shorten or split the text"
        )
    if segment_ids is not None:
        return Tokens.from_segments(segment_ids.long())
    if attention_mask is not None:
        return Tokens.from_segments((attention_mask != 0).long())
    pad = config.pad_token_id
    if pad is not None and pad not in (*config.eos_token_ids, config.bos_token_id):
        return Tokens.from_segments((ids != pad).long())
    return Tokens.from_segments(torch.ones_like(ids, dtype=torch.int64), is_plain=True)
