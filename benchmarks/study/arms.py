"""What the study compares: how a pair starts, what its encoder sees, and how that changes while it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import twofold
from benchmarks.study.text import Texts
from twofold.adapt.profile import profile_encoder
from twofold.models import EncoderDecoder

PROFILED = 4
"""Pieces of each domain that a profile reads."""

LOSSLESS: Mapping[str, Any] = {"start": "lossless"}


@dataclass(frozen=True)
class Arm:
    """One way to make and train a pair."""

    says: str
    adapt: Mapping[str, Any]
    """Arguments of `twofold.adapt`."""
    learning_rate: float = 5e-5
    opening: Mapping[str, Any] | None = None
    """Of `TrainSettings.opening`; `steps` is a share of the run here."""
    future_weight: float = 1.0
    is_random: bool = False
    """All parameters are drawn anew."""
    data: Mapping[str, Any] = field(default_factory=dict)


def evenly(kept: int, of: int) -> tuple[int, ...]:
    """Layers at equal distances, the first and the last among them."""
    return tuple(round(i * (of - 1) / (kept - 1)) for i in range(kept))


def arms(n_layers: int) -> dict[str, Arm]:
    """By name; `n_layers` of the donor."""
    sink = {**LOSSLESS, "encoder_mask": "sink"}
    like_lossless = {"reads": "aligned", "cross_rope": True, "decoder_positions": "continue"}
    aligned = {**like_lossless, "decoder_start": "last_source_token", "encoder_mask": "causal"}
    found = {
        "control": Arm("the donor, decoder-only, one stack of weights", {**LOSSLESS, "tie_stacks": True}),
        "causal": Arm("lossless, causal encoder: two copies of the donor", LOSSLESS),
        "sink": Arm("lossless, every encoder row but the first open", sink),
        "open": Arm("lossless, every encoder row open", {**LOSSLESS, "encoder_mask": "bidirectional"}),
        "auto": Arm(
            "lossless, opened as far as the profile's budget goes", {**LOSSLESS, "encoder_mask": "auto"}
        ),
        "sink tied": Arm("lossless, sink mask, one stack of weights", {**sink, "tie_stacks": True}),
        "weight 0.1": Arm("lossless, sink mask, later keys count a tenth", sink, future_weight=0.1),
        "weight 0.01": Arm("lossless, sink mask, later keys count a hundredth", sink, future_weight=0.01),
        "layers": Arm(
            "opened layer by layer from the top", LOSSLESS, opening={"kind": "layers", "steps": 0.5}
        ),
        "future_weight": Arm(
            "opened by a growing weight", LOSSLESS, opening={"kind": "future_weight", "steps": 0.5}
        ),
        "growing": Arm(
            "sink mask, later keys count a tenth and more and more",
            sink,
            opening={"kind": "future_weight", "steps": 0.5, "lowest_weight": 0.1},
            future_weight=0.1,
        ),
        "batches": Arm(
            "opened in a growing share of batches", LOSSLESS, opening={"kind": "batches", "steps": 0.5}
        ),
        "published": Arm("published start: separate, final, copied", {"start": "published"}, 2e-4),
        "scaled copy": Arm(
            "published start, cross-attention's output times 0.1", {"start": "scaled_copy"}, 2e-4
        ),
        "merged final": Arm("T5Gemma 2's layout", {"start": "published", "layout": "merged"}, 2e-4),
        "aligned separate": Arm(
            "aligned reads, separate cross-attention", {"start": "published", **aligned}, 2e-4
        ),
        "aligned separate scaled": Arm(
            "the same, output times 0.1", {"start": "scaled_copy", **aligned}, 1e-4
        ),
        "scratch": Arm("random weights, published layout", {"start": "published"}, 5e-4, is_random=True),
        "ul2": Arm(
            "lossless, sink mask, UL2", sink, data={"objective": {"name": "ul2", "preset": "t5gemma2"}}
        ),
    }
    for kept in (2 * n_layers // 3, n_layers // 2, n_layers // 3, n_layers // 4):
        layers = evenly(kept, n_layers)
        found[f"decoder {kept}"] = Arm(
            f"sink mask, {kept} decoder layers", {**sink, "decoder_layers": layers}, 1e-4
        )
    return found


def make(donor: str, arm: Arm, texts: Texts, seed: int) -> EncoderDecoder:
    """The arm's pair before training."""
    settings = dict(arm.adapt)
    if settings.get("encoder_mask") == "auto":
        settings["profile"] = partial(profile_encoder, texts=texts.pieces("profile", PROFILED))
    model = twofold.adapt(donor, dtype=torch.float32, seed=seed, **settings)
    if arm.future_weight != 1.0:
        model.set_encoder_mask(model.config.encoder_mask, future_weight=arm.future_weight)
    if arm.is_random:
        model.initialise_randomly(seed)
    return model
