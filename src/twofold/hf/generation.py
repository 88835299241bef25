"""What `generate` of transformers carries from step to step: the encoder's output and the cache.

Letters: B batch, S source tokens, T target tokens, M memories, E encoder width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from twofold.config import EncoderDecoderConfig
from twofold.data.convention import IGNORE_INDEX
from twofold.models import DecoderCache, EncoderOutput
from twofold.models.encoder_decoder import locate_tokens
from twofold.models.masks import Tokens
from twofold.models.stack import Encoder


@dataclass
class TwofoldEncoderOutput(ModelOutput):  # type: ignore[misc]
    """`EncoderOutput` in tensors with a batch row each, which `generate` repeats for samples and beams."""

    last_hidden_state: Tensor | None = None
    """[B, S, E], after the final norm."""
    memory: Tensor | None = None
    """[B, M, S, E], what each decoder layer reads; None where all read `last_hidden_state`."""
    segments: Tensor | None = None
    """int64 [B, S]: 1, or 0 for padding."""
    hidden_states: tuple[Tensor, ...] | None = None
    """On request: the input of every layer, then the normed output."""


class SourceReader(nn.Module):
    """The encoder as transformers calls one.

    Args:
        config: of the pair.
        encoder: whose parameters these are.
    """

    main_input_name = "input_ids"

    def __init__(self, config: EncoderDecoderConfig, encoder: Encoder) -> None:
        super().__init__()
        self.pair_config, self.encoder = config, encoder

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> TwofoldEncoderOutput | tuple[Any, ...]:
        """Read all the given tokens; arguments as in transformers, errors as in `EncoderDecoder.encode`."""
        refuse(output_attentions=output_attentions)
        tokens = locate_tokens(self.pair_config, "encoder", input_ids, attention_mask)
        read: EncoderOutput = self.encoder(input_ids, tokens, output_hidden_states=bool(output_hidden_states))
        output = TwofoldEncoderOutput(
            last_hidden_state=read.last_hidden_state,
            memory=torch.stack(read.memory, dim=1) if self.pair_config.reads == "aligned" else None,
            segments=tokens.segments,
            hidden_states=read.hidden_states or None,
        )
        return output.to_tuple() if return_dict is False else output


def refuse(**settings: Any) -> None:
    """An error for what transformers' models take and ours do not.

    Raises:
        ValueError: one of them is set.
    """
    for name, value in settings.items():
        if value is not None and value is not False:
            raise ValueError(f"twofold models do not take {name}; leave it out")


def as_encoder_output(
    config: EncoderDecoderConfig, given: Any, attention_mask: Tensor | None
) -> EncoderOutput:
    """What the decoder takes, of what `SourceReader` or the caller made.

    Args:
        given: a `TwofoldEncoderOutput`; or, where decoder layers read the final output, any output or tuple that
            begins with it, whose tokens `attention_mask` tells apart.

    Raises:
        ValueError: what the layers read is not in it.
    """
    last_BSE: Tensor = given[0]
    segments: Tensor | None = getattr(given, "segments", None)
    memory: Tensor | None = getattr(given, "memory", None)
    if memory is None and config.reads == "aligned":
        raise ValueError(
            "decoder layers of this model read several encoder layers (reads='aligned'), which encoder_outputs do not "
            "have; pass what model.get_encoder() returned, or input_ids"
        )
    if segments is None:
        ones = torch.ones(last_BSE.shape[:2], dtype=torch.int64, device=last_BSE.device)
        segments = ones if attention_mask is None else (attention_mask != 0).long()
    memories = (last_BSE,) if memory is None else memory.unbind(dim=1)
    return EncoderOutput(last_BSE, memories, Tokens.from_segments(segments))


def take_last_token(
    config: EncoderDecoderConfig, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Move the last real token of each source to the decoder, which starts from it.

    Args:
        input_ids: int64 [B, S], padded on any side.
        attention_mask: as in `EncoderDecoder.forward`.

    Returns:
        The rest of the source and its mask, and the decoder's first input, int64 [B, 1].

    Raises:
        ValueError: a row without a real token.
    """
    tokens = locate_tokens(config, "encoder", input_ids, attention_mask)
    is_real_BS = tokens.segments > 0
    if not bool(is_real_BS.any(dim=1).all()):
        raise ValueError(
            "a source is empty, so it has no last token for the decoder to start from; give it text"
        )
    index_BS = torch.arange(is_real_BS.shape[1], device=is_real_BS.device).expand_as(is_real_BS)
    last_B1 = torch.where(is_real_BS, index_BS, -1).amax(dim=1, keepdim=True)
    rest_BS = is_real_BS & (index_BS != last_B1)
    # A token in the last column was its row's last; the encoder wants at least one column.
    n_left = max(1, input_ids.shape[1] - 1)
    return input_ids[:, :n_left], rest_BS[:, :n_left], input_ids.gather(1, last_B1)


def shift_labels(labels: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Decoder inputs for labels: the start token, then each label but the last.

    Args:
        labels: int64 [B, T], -100 where nothing is scored.
        start: int64 [B, 1].

    Returns:
        Decoder inputs and their mask, [B, T]; ignored labels are padding.
    """
    inputs_BT = torch.cat([start, labels[:, :-1]], dim=1)
    is_real_BT = inputs_BT != IGNORE_INDEX
    return inputs_BT.masked_fill(~is_real_BT, 0), is_real_BT


class TwofoldCache:
    """`DecoderCache` under the names by which `generate` calls one.

    Attributes:
        own: the cache itself.
    """

    is_compileable = False

    def __init__(self) -> None:
        self.own = DecoderCache()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Decoder tokens so far, the same in every layer."""
        return self.own.n_tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, int64 [B], in that order."""
        self.own.select(beam_idx)
