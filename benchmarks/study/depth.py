"""Which decoder layers a donor's pair misses least, for several depths: what the study's short decoders keep.

    python -m benchmarks.study.depth DONOR --keep 20 --keep 15 --keep 10 --keep 7 --out ...

Each depth is cut from the one before it. Losses are those before any training, on the pieces that profiles read, with
a causal encoder: what is lost is the decoder's alone.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

import twofold
from benchmarks.common import publish, result
from benchmarks.study.text import Texts
from twofold.adapt.depth import choose_decoder_layers, cut_decoder

FILE = "depth.json"


def kept_layers(folder: Path) -> dict[int, tuple[int, ...]]:
    """Donor layers that were found to be kept, by depth; empty where nothing was measured."""
    file = folder / FILE
    if not file.exists():
        return {}
    return {int(n): tuple(layers) for n, layers in json.loads(file.read_text())["details"]["kept"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("donor", help="folder, hub name or GGUF file of a decoder-only model")
    parser.add_argument("--keep", action="append", type=int, required=True, help="a depth; may be repeated")
    parser.add_argument("--pieces", type=int, default=2, help="read, of each domain")
    parser.add_argument("--at-once", type=int, default=2, help="layers that go in a round")
    parser.add_argument("--out", type=Path, required=True, help="folder of the donor's results")
    options = parser.parse_args()
    texts = Texts(Path(os.environ["TWOFOLD_DATA"])).pieces("profile", options.pieces)
    model = twofold.adapt(options.donor, start="lossless", encoder_mask="causal", dtype=torch.float32)
    of_donor = tuple(range(model.config.decoder.num_hidden_layers))
    kept: dict[int, tuple[int, ...]] = {}
    rounds: list[dict[str, Any]] = []
    metrics: dict[str, float] = {}
    for keep in sorted(options.keep, reverse=True):
        choice = choose_decoder_layers(model, keep, texts, at_once=options.at_once, examples=options.pieces)
        rounds += [
            {
                "left": [of_donor[i] for i in one.left],
                "cost": one.cost,
                "removed": [of_donor[i] for i in one.removed],
            }
            for one in choice.rounds
        ]
        model = cut_decoder(model, choice.layers)
        of_donor = tuple(of_donor[i] for i in choice.layers)
        kept[keep] = of_donor
        metrics |= {f"{name}_loss_{keep}_layers": float(f"{x:.5g}") for name, x in choice.loss.items()}
        print(keep, of_donor, choice.loss, flush=True)
    details = {"kept": {str(n): layers for n, layers in kept.items()}, "rounds": rounds}
    publish(result("study, decoder layers", metrics, details), options.out / FILE)


if __name__ == "__main__":
    main()
