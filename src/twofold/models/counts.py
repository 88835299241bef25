"""Exact parameter counts, by part, without allocating anything."""

import torch

from twofold.config import EncoderDecoderConfig
from twofold.models.encoder_decoder import EncoderDecoder


def parameter_counts(config: EncoderDecoderConfig) -> dict[str, int]:
    """Parameters of a pair, shared ones counted once.

    Returns:
        `embeddings` (tables, an untied LM head, `eoi_embedding`), `encoder` and `decoder` without embeddings and
        without `cross_attention` (its four projections, or those that a merged layer has for the source; the norms
        around it count as decoder, as in the published totals), and `total`.
    """
    with torch.device("meta"):
        model = EncoderDecoder(config)
    counts = dict.fromkeys(("embeddings", "encoder", "decoder", "cross_attention"), 0)
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or "lm_head" in name:
            part = "embeddings"
        elif ".cross_attn." in name or ".source_" in name:
            part = "cross_attention"
        else:
            part = "encoder" if name.startswith("model.encoder.") else "decoder"
        counts[part] += parameter.numel()
    return counts | {"total": sum(counts.values())}
