"""Ways to let an encoder see later keys that the library does not have, measured before any training.

    python -m benchmarks.study.later_keys DONOR --out benchmarks/results/study/gemma3-270m/later_keys.json

Written out in full attention scores, to find what is worth building. Beside the weight of later keys there is their
share: a factor that differs between queries and heads, so that all later keys together get at most so much of a query's
attention. And they can be mirrored: scored as if they stood as far before the query as they stand after it, where the
donor knows what a distance means. The first row is closed, as under the `sink` mask.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import twofold
from benchmarks.common import publish, result
from benchmarks.study.results import details_of, differences, mean, noise, rounded, show, write
from benchmarks.study.study import Meter
from benchmarks.study.text import Texts
from twofold.models import EncoderDecoder
from twofold.models.attention import Attention
from twofold.models.masks import AttentionMask
from twofold.models.stack import EncoderBlock


@dataclass(frozen=True)
class Look:
    """How one layer sees keys after the query."""

    weight: float = 1.0
    """Factor on their attention weight before the softmax."""
    share: float = 1.0
    """Of a query's attention that they get at most, all together."""
    is_mirrored: bool = False
    """Scored at their distance before the query, not after it."""


Looks = Callable[[int, int], Look | None]
"""Given a layer and the number of layers, how it looks; None: causal."""

VARIANTS: Mapping[str, Looks] = {
    "causal": lambda i, n: None,
    "weight 0.1": lambda i, n: Look(weight=0.1),
    "share 0.1": lambda i, n: Look(share=0.1),
    "share 0.3": lambda i, n: Look(share=0.3),
    "mirrored": lambda i, n: Look(is_mirrored=True),
    "mirrored, weight 0.1": lambda i, n: Look(weight=0.1, is_mirrored=True),
    "mirrored, share 0.1": lambda i, n: Look(share=0.1, is_mirrored=True),
    "mirrored, share 0.3": lambda i, n: Look(share=0.3, is_mirrored=True),
    "upper half": lambda i, n: Look() if i >= n // 2 else None,
    "upper half mirrored": lambda i, n: Look(is_mirrored=True) if i >= n // 2 else None,
}


def set_looks(model: EncoderDecoder, looks: Looks) -> None:
    """Make the encoder's layers look this way; rows must be whole, without padding, and shorter than any window."""
    layers = model.encoder.layers
    for i, layer in enumerate(layers):
        look = looks(i, len(layers))
        if look is None:
            layer.__dict__.pop("forward", None)
        else:
            layer.forward = partial(_forward, layer, look)


def _forward(
    layer: EncoderBlock, look: Look, x_BSD: Tensor, rope: tuple[Tensor, Tensor], mask: AttentionMask
) -> tuple[Tensor, Tensor]:
    """`EncoderBlock.forward` with another softmax."""
    read, attn = layer.pre_self_attn_layernorm(x_BSD), layer.self_attn
    cos, sin = rope
    earlier_BNSS = scores(attn, read, rope)
    later_BNSS = scores(attn, read, (cos, -sin)) if look.is_mirrored else earlier_BNSS
    is_later = torch.ones(x_BSD.shape[1], x_BSD.shape[1], dtype=torch.bool).triu(1)
    earlier_BNSS = earlier_BNSS.masked_fill(is_later, -torch.inf)
    later_BNSS = (later_BNSS + log(look.weight)).masked_fill(~is_later, -torch.inf)
    if look.share < 1:
        earlier, later = (x.logsumexp(-1, keepdim=True) for x in (earlier_BNSS, later_BNSS))
        most = earlier + log(look.share / (1 - look.share))
        later_BNSS = later_BNSS + torch.where(later > most, most - later, 0.0)
    later_BNSS[:, :, 0] = -torch.inf
    weights_BNSS = torch.where(is_later, later_BNSS, earlier_BNSS).softmax(-1)
    values = attn.keys_values(read, rope).values
    values_BNSH = values.repeat_interleave(attn.n_heads // attn.n_kv_heads, dim=1)
    attended = attn.o_proj((weights_BNSS @ values_BNSH).transpose(1, 2).flatten(2))
    return layer.feed_forward(x_BSD + layer.post_self_attn_layernorm(attended)), read


def scores(attn: Attention, read: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """[B, N, S, S], before any mask."""
    keys = attn.keys_values(read, rope).keys
    keys_BNSH = keys.repeat_interleave(attn.n_heads // attn.n_kv_heads, dim=1)
    scores_BNSS: Tensor = attn.queries(read, rope) @ keys_BNSH.transpose(-1, -2) * attn.scale
    return scores_BNSS if attn.softcap is None else attn.softcap * torch.tanh(scores_BNSS / attn.softcap)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("donor")
    parser.add_argument("--variant", action="append", choices=VARIANTS, default=[], help="may be repeated")
    parser.add_argument("--pieces", type=int, default=8, help="measured, of each domain")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = twofold.adapt(options.donor, start="lossless", encoder_mask="causal", dtype=torch.float32)
    meter = Meter(Texts(Path(os.environ["TWOFOLD_DATA"])), options.pieces)
    details: dict[str, Any] = details_of(options.out) or {}
    metrics: dict[str, float] = {}
    for name in dict.fromkeys(["causal", *(options.variant or VARIANTS)]):
        if name not in details:
            set_looks(model, VARIANTS[name])
            looks = [VARIANTS[name](i, len(model.encoder.layers)) for i in range(len(model.encoder.layers))]
            details[name] = {
                "looks": [None if look is None else asdict(look) for look in looks],
                "losses": meter.by_piece(model),
            }
        for domain, losses in details[name]["losses"].items():
            above = differences(losses, details["causal"]["losses"][domain], options.out)
            metrics |= {f"{name}, {domain}": mean(above), f"{name}, {domain}, noise": noise(above)}
        report = result("study, later keys, above the donor", rounded(metrics), details)
        write(options.out, report)
        show(f"{name}: {rounded({k: v for k, v in metrics.items() if k.startswith(f'{name}, ')})}")
    publish({**report, "details": {"variants": list(details)}}, None)


if __name__ == "__main__":
    main()
