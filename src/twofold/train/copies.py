"""A whole copy of a model that trains, for what wants one: without shards, without adapter, in another dtype."""

from __future__ import annotations

import torch

from twofold.models import EncoderDecoder
from twofold.train.adapters import plain_parameters


def empty_copy(model: EncoderDecoder, dtype: torch.dtype, device: torch.device) -> EncoderDecoder:
    """A model of the same shape, frozen, in eval mode; its weights are whatever was in memory."""
    with torch.device("meta"):
        copy = EncoderDecoder(model.config)
    copy = copy.to(dtype).to_empty(device=device)
    copy.tie_weights()
    copy.tokenizer = model.tokenizer
    return copy.requires_grad_(False).eval()


@torch.no_grad()
def copy_weights(copy: EncoderDecoder | None, model: EncoderDecoder) -> None:
    """Give the copy the weights and masks of the model, in place: graphs go on reading them there.

    All ranks call it, because tensors are gathered one by one.

    Args:
        copy: None on a rank that has none.
    """
    masks, share = model.config.encoder_mask, model.config.encoder_future_share
    if copy is not None and (copy.config.encoder_mask, copy.config.encoder_future_share) != (masks, share):
        copy.set_encoder_mask(masks, future_share=share)
    own = {} if copy is None else dict(copy.named_parameters())
    for name, plain in plain_parameters(model).items():
        tensor = plain.tensor()
        if copy is not None:
            own.pop(name).copy_(tensor)
    assert not own
