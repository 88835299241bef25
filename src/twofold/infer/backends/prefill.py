"""How requests begin in PyTorch: the model itself reads sources and prefixes, all of them in one padded batch.

Letters: B requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twofold.infer.backends.base import Start
from twofold.infer.padding import padded
from twofold.models import DecoderCache, EncoderDecoder


def prefill(
    model: EncoderDecoder, starts: Sequence[Start], device: torch.device
) -> tuple[DecoderCache, Tensor]:
    """What the decoder leaves in its cache, sources padded on the right and prefixes on the left; and the logits of
    each request's first new token, float32 [B, V]."""
    encoded = model.encode(*padded([start.source_ids for start in starts], "right", device))
    prefix_ids, prefix_mask = padded([start.prefix_ids for start in starts], "left", device)
    cache = DecoderCache()
    x_BTD, _ = model.decoder(prefix_ids, prefix_mask.long(), encoded, cache)
    logits_BV: Tensor = model.lm_head(x_BTD[:, -1:])[:, 0]
    return cache, logits_BV
