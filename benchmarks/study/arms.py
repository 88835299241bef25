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

LOSSLESS: Mapping[str, Any] = {"start": "lossless", "encoder_mask": "causal"}
"""The donor itself, in two stacks; arms say what they change."""


@dataclass(frozen=True)
class Arm:
    """One way to make and train a pair."""

    says: str
    adapt: Mapping[str, Any]
    """Arguments of `twofold.adapt`."""
    learning_rate: float = 5e-5
    opening: Mapping[str, Any] | None = None
    """Of `TrainSettings.opening`; `steps` is a share of the run here."""
    distillation: Mapping[str, Any] | None = None
    """Of a recipe; the donor is the teacher."""
    is_random: bool = False
    """All parameters are drawn anew."""
    data: Mapping[str, Any] = field(default_factory=dict)


KD: Mapping[str, Any] = {"share": 1.0}
"""The donor's whole distribution instead of the right token."""

KD_HIDDEN: Mapping[str, Any] = {"share": 1.0, "hidden_states": {"weight": 1.0}}
"""And the donor's hidden states."""


def evenly(kept: int, of: int) -> tuple[int, ...]:
    """Layers at equal distances, the first and the last among them."""
    return tuple(round(i * (of - 1) / (kept - 1)) for i in range(kept))


def arms(n_layers: int, kept_layers: Mapping[int, tuple[int, ...]]) -> dict[str, Arm]:
    """By name.

    Args:
        n_layers: of the donor.
        kept_layers: decoder layers that were found to be missed most, by their number (`depth`).
    """
    sink = {**LOSSLESS, "encoder_mask": "sink"}
    faint = {**sink, "future_weight": 0.1}
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
        "weight 0.1": Arm("lossless, sink mask, later keys count a tenth", faint),
        "weight 0.01": Arm(
            "lossless, sink mask, later keys count a hundredth", {**sink, "future_weight": 0.01}
        ),
        "growing": Arm(
            "from a tenth of the weight to the whole", faint, opening={"kind": "future_weight", "steps": 0.5}
        ),
        "kd": Arm("lossless, sink mask, the donor teaches", sink, distillation=KD),
        "layers": Arm(
            "opened layer by layer from the top", LOSSLESS, opening={"kind": "layers", "steps": 0.5}
        ),
        "future_weight": Arm(
            "opened by a growing weight", LOSSLESS, opening={"kind": "future_weight", "steps": 0.5}
        ),
        "batches": Arm(
            "opened in a growing share of batches", LOSSLESS, opening={"kind": "batches", "steps": 0.5}
        ),
        "published": Arm("published start: separate, final, copied", {"start": "published"}, 2e-4),
        "scaled copy": Arm(
            "published start, cross-attention's output times 0.1", {"start": "scaled_copy"}, 2e-4
        ),
        "published kd": Arm(
            "published start, the donor teaches", {"start": "published"}, 2e-4, distillation=KD
        ),
        "published kd hidden": Arm(
            "published start, the donor teaches, hidden states too",
            {"start": "published"},
            2e-4,
            distillation=KD_HIDDEN,
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
    for kept in (2 * n_layers // 3, n_layers // 2, n_layers // 3):
        spread = {**faint, "decoder_layers": evenly(kept, n_layers)}
        found[f"decoder {kept} evenly"] = Arm(
            f"{kept} decoder layers, evenly spread, the donor teaches", spread, 1e-4, distillation=KD
        )
    for kept, layers in kept_layers.items():
        cut = {**faint, "decoder_layers": layers}
        says = f"{kept} decoder layers, chosen by measurement"
        found[f"decoder {kept} labels"] = Arm(says, cut, 1e-4)
        found[f"decoder {kept} logits"] = Arm(f"{says}, the donor teaches", cut, 1e-4, distillation=KD)
        found[f"decoder {kept}"] = Arm(
            f"{says}, the donor teaches, hidden states too", cut, 1e-4, distillation=KD_HIDDEN
        )
    half = evenly(n_layers // 2, n_layers)
    found[f"encoder {n_layers // 2}"] = Arm(
        f"{n_layers // 2} encoder layers, evenly spread, the donor teaches",
        {**faint, "encoder_layers": half},
        1e-4,
        distillation=KD,
    )
    return found


def make(donor: str, arm: Arm, texts: Texts, seed: int) -> EncoderDecoder:
    """The arm's pair before training."""
    settings = dict(arm.adapt)
    if settings.get("encoder_mask") == "auto":
        settings["profile"] = partial(profile_encoder, texts=texts.pieces("profile", PROFILED))
    model = twofold.adapt(donor, dtype=torch.float32, seed=seed, **settings)
    if arm.is_random:
        model.initialise_randomly(seed)
    return model
