"""What the study compares: how a pair starts, what its encoder sees, and how that changes while it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import twofold
from benchmarks.study.text import Texts
from twofold.adapt.depth import DepthChoice
from twofold.adapt.profile import profile_encoder
from twofold.adapt.refit import refit_decoder
from twofold.adapt.stitch import stitch
from twofold.models import EncoderDecoder

PROFILED = 4
"""Pieces of each domain that a profile reads."""

FITTED, FITTED_TOKENS = 60, 46_000
"""Pieces of each domain that projections are fitted on, and their tokens in rows of 256."""

LOSSLESS: Mapping[str, Any] = {"start": "lossless", "encoder_mask": "causal"}


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
    cross_warmup: float = 0.0
    """Share of the run in which cross-attention trains alone."""
    stitch_tokens: int = 0
    """That a stitched start fits on; 0: as the other fits."""
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


def arms(
    n_layers: int, kept_layers: Mapping[int, tuple[int, ...]], decoder: str | None = None
) -> dict[str, Arm]:
    """By name.

    Args:
        n_layers: of the donor.
        kept_layers: decoder layers that were found to be missed most, by their number (`depth`).
        decoder: a donor of another width for the decoder; adds arms of pairs of the two.
    """
    sink = {**LOSSLESS, "encoder_mask": "sink"}
    faint = {**sink, "future_share": 0.1}
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
        "share 0.1": Arm("lossless, sink mask, at most a tenth of the attention for later keys", faint),
        "share 0.3": Arm("lossless, sink mask, three tenths of it", {**sink, "future_share": 0.3}),
        "growing": Arm(
            "from a tenth of the attention to all of it",
            faint,
            opening={"kind": "future_share", "steps": 0.5},
        ),
        "kd": Arm("lossless, sink mask, the donor teaches", sink, distillation=KD),
        "layers": Arm(
            "opened layer by layer from the top", LOSSLESS, opening={"kind": "layers", "steps": 0.5}
        ),
        "future_share": Arm(
            "opened by a growing share", LOSSLESS, opening={"kind": "future_share", "steps": 0.5}
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
        "stitched": Arm(
            "aligned reads, the source's projections fitted anew",
            {"start": "stitched", "encoder_mask": "causal"},
        ),
        "stitched final": Arm(
            "the encoder's output read by all layers, through fitted projections",
            {"start": "stitched", "encoder_mask": "causal", "reads": "final"},
            1e-4,
            distillation=KD_HIDDEN,
        ),
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
        mended = {**faint, "decoder_depth": kept, "choose": partial(_chosen, layers)}
        found[f"decoder {kept} refit"] = Arm(
            f"{says}, refitted in closed form, the donor teaches", mended, 1e-4, distillation=KD
        )
    half = evenly(n_layers // 2, n_layers)
    found[f"encoder {n_layers // 2}"] = Arm(
        f"{n_layers // 2} encoder layers, evenly spread, the donor teaches",
        {**faint, "encoder_layers": half},
        1e-4,
        distillation=KD,
    )
    if decoder is not None:
        stitched = {"start": "stitched", "decoder": decoder}
        for thousands in (2, 8, 24):
            found[f"stitched {thousands}k"] = Arm(
                f"two donors, source projections fitted on {thousands},000 tokens",
                stitched,
                stitch_tokens=1000 * thousands,
            )
        found["stitched sink"] = Arm(
            "the same, fitted under the sink mask", {**stitched, "encoder_mask": "sink"}, stitch_tokens=24_000
        )
        found["unequal published"] = Arm(
            "two donors, published start: random cross-attention, trained alone for a quarter of the run",
            {"start": "published", "decoder": decoder},
            2e-4,
            cross_warmup=0.25,
        )
    return found


def _chosen(layers: tuple[int, ...], model: EncoderDecoder, keep: int) -> DepthChoice:
    """Layers that were measured before (`depth`)."""
    return DepthChoice(layers, {}, ())


def make(donor: str, arm: Arm, texts: Texts, seed: int) -> EncoderDecoder:
    """The arm's pair before training."""
    settings = dict(arm.adapt)
    if settings.get("encoder_mask") == "auto":
        settings["profile"] = partial(profile_encoder, texts=texts.pieces("profile", PROFILED))
    if settings["start"] == "stitched":
        tokens = arm.stitch_tokens or FITTED_TOKENS
        settings["stitcher"] = partial(stitch, texts=texts.pieces("train", FITTED), tokens=tokens)
    if "decoder_depth" in settings:
        pieces = texts.pieces("train", FITTED)
        settings["refit"] = partial(refit_decoder, texts=pieces, tokens=FITTED_TOKENS)
    model = twofold.adapt(donor, dtype=torch.float32, seed=seed, **settings)
    if arm.is_random:
        model.initialise_randomly(seed)
    return model
