"""The model: `EncoderDecoder`'s modules, under the same names, with transformers' calls around them.

Letters: B batch, S source tokens, T target tokens, D decoder width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForSeq2SeqLM, GenerationMixin, PreTrainedModel, initialization
from transformers.modeling_outputs import Seq2SeqLMOutput

from twofold.config import EncoderDecoderConfig
from twofold.data.convention import IGNORE_INDEX
from twofold.hf.adapters import register_lora_targets
from twofold.hf.configuration import TwofoldConfig
from twofold.hf.generation import (
    SourceReader,
    TwofoldCache,
    as_encoder_output,
    refuse,
    shift_labels,
    take_last_token,
)
from twofold.models import EncoderDecoder
from twofold.models.layers import Embedding, RMSNorm
from twofold.models.stack import Decoder


class TwofoldForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A pair that transformers, its Trainer and PEFT take for one of theirs.

    `input_ids` are a whole source, as the tokenizer gives it. Where the pair's decoder starts from the last source
    token, that token is moved there whenever `decoder_input_ids` are left out, in `forward` with labels and in
    `generate`; with `decoder_input_ids` (a chat template's assistant header, say) the source stays whole.

    Attributes:
        pair_config: what the model is.
    """

    config_class = TwofoldConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _is_stateful = True
    """Sliding layers forget, so that a cache cannot be cut back."""

    def __init__(self, config: TwofoldConfig) -> None:
        super().__init__(config)
        self.pair_config = config.read_pair()
        pair = EncoderDecoder(self.pair_config)
        self.model, self.lm_head = pair.model, pair.lm_head
        self._tied_weights_keys = _shared_parameters(self)
        self.post_init()
        if config._attn_implementation == "eager":
            pair.set_attention_backend("eager")

    @classmethod
    def of(cls, pair: EncoderDecoder) -> Self:
        """A model around the very modules of a pair: what trains one trains the other."""
        config = TwofoldConfig.of(pair.config)
        config.dtype = pair.lm_head.out_proj.weight.dtype
        with torch.device("meta"):
            model = cls(config)
        model.model, model.lm_head = pair.model, pair.lm_head
        model.train(pair.training)
        return model

    @property
    def pair(self) -> EncoderDecoder:
        """The pair, of the very same modules."""
        return EncoderDecoder.of_modules(self.pair_config, self.model, self.lm_head)

    def get_encoder(self, *_: Any, **__: Any) -> SourceReader:
        """The encoder, called as one of transformers."""
        return SourceReader(self.pair_config, self.model.encoder)

    def get_decoder(self) -> Decoder:
        """The decoder's stack."""
        decoder: Decoder = self.model.decoder
        return decoder

    def get_input_embeddings(self) -> Embedding:
        """The encoder's table; the decoder's is another where `tie_word_embeddings` is not "all"."""
        table: Embedding = self.model.encoder.embed_tokens
        return table

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Take over the weights of a table of the same shape, for the decoder too where both are tied.

        Raises:
            ValueError: another shape.
        """
        table = self.get_input_embeddings()
        weight = value.weight
        assert isinstance(weight, nn.Parameter)
        if weight.shape != table.weight.shape:
            raise ValueError(
                f"input embeddings have the shape {list(table.weight.shape)}, got {list(weight.shape)}; change the "
                "vocabulary with resize_token_embeddings"
            )
        table.weight = weight
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear:
        """The linear layer of the head."""
        head: nn.Linear = self.lm_head.out_proj
        return head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Put another linear layer into the head."""
        self.lm_head.out_proj = new_embeddings

    @torch.no_grad()
    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Embedding:
        """Change the vocabulary of both tables, the head, and the config.

        Args:
            new_num_tokens: rows to have; None: as many as there are.
            pad_to_multiple_of: rounded up to one.
            mean_resizing: new rows are the mean of the old ones; else drawn with the stack's `initializer_range`.

        Raises:
            ValueError: a size below 1.
        """
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size < 1:
            raise ValueError(f"a vocabulary needs at least 1 token, got {size}")
        std = None if mean_resizing else self.pair_config.decoder.initializer_range
        resized: dict[int, nn.Parameter] = {}
        tables = (self.model.encoder.embed_tokens, self.model.decoder.embed_tokens, self.lm_head.out_proj)
        for table in {id(table): table for table in tables}.values():  # tied stacks have one table
            old = table.weight
            if id(old) not in resized:
                resized[id(old)] = nn.Parameter(_with_rows(old, size, std), requires_grad=old.requires_grad)
            table.weight = resized[id(old)]
            setattr(table, "num_embeddings" if isinstance(table, nn.Embedding) else "out_features", size)
        fields = self.pair_config.model_dump()
        for side in ("encoder", "decoder"):
            fields[side]["vocab_size"] = size
        self.pair_config = EncoderDecoderConfig.model_validate(fields)
        self.config.set_pair(self.pair_config)
        return self.get_input_embeddings()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """What is one parameter under several names, tied stacks included: later name to first."""
        return dict(self._tied_weights_keys or {})

    def enable_input_require_grads(self) -> None:
        """Let gradients through frozen embeddings, of both sides."""
        tables = {id(t): t for t in (self.model.encoder.embed_tokens, self.model.decoder.embed_tokens)}
        self._require_grads_hooks = [t.register_forward_hook(_require_grad) for t in tables.values()]

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Called while loading; a folder without generation_config.json takes its tokens from the pair."""
        super().adjust_generation_fn(*args, **kwargs)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            if getattr(self.generation_config, name) is None:
                setattr(self.generation_config, name, getattr(self.config, name))

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; see the class for what the decoder starts from.

        Raises:
            ValueError: an empty source, or an encoder output alone where the decoder starts from the source's last
                token.
        """
        starts_from_source = self.pair_config.decoder_start == "last_source_token"
        if starts_from_source and kwargs.get("decoder_start_token_id") is None:
            prefix: Tensor | None = kwargs.get("decoder_input_ids")
            if prefix is not None:
                start_B1 = prefix[:, :1]
            else:
                ids = kwargs.pop("input_ids", None) if inputs is None else inputs
                if ids is None:
                    raise ValueError(
                        "this model's decoder starts from the last source token, so generate needs input_ids; or "
                        "pass decoder_input_ids"
                    )
                refuse(encoder_outputs=kwargs.get("encoder_outputs"))
                inputs, mask, start_B1 = take_last_token(self.pair_config, ids, kwargs.get("attention_mask"))
                kwargs["attention_mask"] = mask
            kwargs["decoder_start_token_id"] = start_B1[:, 0].tolist()
        return super().generate(inputs, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: TwofoldCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Seq2SeqLMOutput | tuple[Any, ...]:
        """Logits of the token after each decoder input, and the loss of the labels.

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, S], not 0 = real token; `EncoderDecoder.forward` says what holds without one.
            decoder_input_ids: int64 [B, T]. Left out: made of `labels`.
            decoder_attention_mask: [B, T]; longer ones are of earlier tokens too. Without it all are real tokens, as
                a generated one always is; only padding on the left needs one.
            encoder_outputs: of `get_encoder()`, instead of `input_ids`.
            past_key_values: what an earlier call returned; the same object is extended.
            labels: int64 [B, T], the target, its end token included, not shifted; -100 is ignored.
            use_cache: return `past_key_values`; default: without labels.
            logits_to_keep: only of the last so many decoder inputs; 0: of all.
            num_items_in_batch: the loss is the sum over labels divided by this; default: by their number.

        Raises:
            ValueError: see `EncoderDecoder.forward`; or an argument that these models do not take.
        """
        refuse(
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            output_attentions=output_attentions,
        )
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("decoder_input_ids are missing; pass them, or labels to make them of")
            input_ids, attention_mask, start_B1 = self._start(input_ids, attention_mask, labels)
            decoder_input_ids, decoder_attention_mask = shift_labels(labels, start_B1)
        if encoder_outputs is None:
            if input_ids is None:
                raise ValueError("pass either input_ids or encoder_outputs")
            encoder_outputs = self.get_encoder()(
                input_ids, attention_mask, output_hidden_states=output_hidden_states
            )
        if past_key_values is None and (use_cache or (use_cache is None and labels is None)):
            past_key_values = TwofoldCache()
        if decoder_attention_mask is None:
            decoder_attention_mask = torch.ones_like(
                decoder_input_ids
            )  # a pad token that was generated is a token
        n_new = decoder_input_ids.shape[1]
        x_BTD, _, hidden = self.pair.states(
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask[:, -n_new:],
            encoder_output=as_encoder_output(self.pair_config, encoder_outputs, attention_mask),
            cache=None if past_key_values is None else past_key_values.own,
            output_hidden_states=bool(output_hidden_states),
        )
        logits_BTV: Tensor = self.lm_head(x_BTD[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            total = F.cross_entropy(
                logits_BTV.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
            )
            loss = total / (
                (labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
            )
        output = Seq2SeqLMOutput(
            loss=loss,
            logits=logits_BTV,
            past_key_values=past_key_values,
            decoder_hidden_states=hidden or None,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
        )
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def _start(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, labels: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Source, its mask, and the decoder's first input, by the pair's convention."""
        if self.pair_config.decoder_start == "bos":
            assert self.pair_config.bos_token_id is not None
            return input_ids, attention_mask, labels.new_full((len(labels), 1), self.pair_config.bos_token_id)
        if input_ids is None:
            raise ValueError(
                "this model's decoder starts from the last source token, so labels need input_ids; or pass "
                "decoder_input_ids"
            )
        return take_last_token(self.pair_config, input_ids, attention_mask)

    def _init_weights(self, module: nn.Module) -> None:
        """What transformers calls for each module that no checkpoint fills."""
        std = self.pair_config.decoder.initializer_range
        if isinstance(module, RMSNorm):
            initialization.constant_(module.weight, 0.0 if module.adds_one else 1.0)
        elif isinstance(module, nn.Embedding):
            initialization.normal_(module.weight, std=std)
            if isinstance(module, Embedding) and module.eoi_token_id is not None:
                initialization.zeros_(module.eoi_embedding)
        elif isinstance(module, nn.Linear):
            initialization.normal_(module.weight, std=std)
            if module.bias is not None:
                initialization.zeros_(module.bias)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`forward` makes the cache."""
        return False

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Compute every n-th block's activations again in the backward pass, or no block's."""
        self.gradient_checkpointing = enable
        for stack in (self.model.encoder, self.model.decoder):
            for i, block in enumerate(stack.layers):
                block.__dict__.pop("forward", None)
                if enable and i % every_n_layers == 0:
                    block.__dict__["forward"] = partial(
                        _checkpointed, block, block.forward, gradient_checkpointing_func
                    )


def _shared_parameters(model: nn.Module) -> dict[str, str]:
    """Every later name of a parameter that has several, with its first."""
    first: dict[int, str] = {}
    names = [
        (name, first.setdefault(id(p), name)) for name, p in model.named_parameters(remove_duplicate=False)
    ]
    return {name: source for name, source in names if name != source}


def _with_rows(old_VD: Tensor, size: int, std: float | None) -> Tensor:
    """The first rows of a table, and new ones: drawn with `std`, or the mean."""
    n_new = size - len(old_VD)
    if n_new <= 0:
        return old_VD[:size].clone()
    new = old_VD.float().mean(0, keepdim=True).expand(n_new, -1)
    if std is not None:
        new = torch.randn_like(new) * std
    return torch.cat([old_VD, new.to(old_VD.dtype)])


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def _checkpointed(
    block: nn.Module, forward: Callable[..., Any], run: Callable[..., Any], *arguments: Any
) -> Any:
    return run(forward, *arguments) if block.training and torch.is_grad_enabled() else forward(*arguments)


AutoModelForSeq2SeqLM.register(TwofoldConfig, TwofoldForConditionalGeneration, exist_ok=True)
register_lora_targets()
