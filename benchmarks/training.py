"""Training measured: against Seq2SeqTrainer, the loss's memory, one large GPU, scaling, and the loader alone.

    export TWOFOLD_DATA=/path/to/data
    python benchmarks/training.py [--quick] [--part a --part b ...] [--out benchmarks/results/training.json]

Parts are measured apart and merged into the file of `--out`, each with its own command, commit, hardware and date;
parts on a GPU (`--device cuda`) stand beside those on a CPU. The last line printed is one JSON object with flat
`metrics`.

a. Real tokens per second, both sides, padding not counted, against transformers' `Seq2SeqTrainer`. Fair, because:
   - Both load the same T5Gemma checkpoint (B-B shapes, random weights scaled so that both soft-caps bend scores and
     logits), train all parameters with AdamW, clip at 1.0, and see the same pairs of P3 under the same tokenizer.
     Before anything is timed, both compute the float32 loss over the same pairs; they must agree to 1e-4, with the
     same counts of tokens, or the benchmark stops.
   - A step has 8 pairs on average on both sides: the trainer's default batch, and one packed row of ours that holds as
     many tokens. `tokens_per_step` and `seq2seq_trainer_tokens_per_step` say how near that is.
   - The pool is a sample whose source lengths are spread like those of all of P3, cut at 1024. The trainer does a
     whole epoch of it, so that neither long nor short batches are preferred, whatever order it takes; ours does as
     many steps. Warm-up and loading are not timed, making batches is; the trainer gets its pairs tokenised.
   - Theirs runs with its defaults, and with the best of a search over precision, attention, batch size with
     accumulation (smaller batches pad less) and, with `--compile`, torch.compile, with length grouping and fused AdamW
     in all of them. SDPA is left out because it has no soft-cap and computes another model. bfloat16 is tried where
     a matrix product is faster in it. Ours searches precision only.
   - One contender runs at a time, in a fresh process, ours first and last: `drift` is the ratio of the two.
   - Where memory is too short for the default batch of 8, it is split over accumulation steps, which pad less; the
     details say so, and part g shows the whole batch.
b. Peak memory of the loss, forward and backward, above inputs, weights and their gradients, over that of logits of
   all tokens; and the ratio of times, in turns. `loss_peak_over_plain` has the gradients in it.
c. 2B-2B shapes on a GPU: FLOPs per second, and their share of what a plain matrix product reaches.
d. Speed against sequence length, and against ranks that share this machine's cores.
e. The loader on one thread, from the token store to finished batches.
f. Part a with a vocabulary of 256,000, metrics ending in `_256k`; targets are cut to 128 tokens for both, as the
   trainer's logits would not fit a small machine otherwise.
g. Part a with sources cut at 512 tokens and targets at 128 for both, so that the trainer's default batch of 8 pairs
   fits a machine of 24 GB; metrics end in `_512`.

`--quick` takes small shapes and few steps of parts a, b and e unless parts are named: under a minute on two cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import publish, result
from training_loader import loader_speed
from training_loss import loss_costs
from training_scaling import scaling, single_gpu
from training_throughput import FULL, LARGE_VOCABULARY, QUICK, SHORTER, Case, throughput

PARTS = "abcdefg"
QUICK_PARTS = "abe"

Figures = tuple[dict[str, float], dict[str, Any]]


def main() -> None:
    options = parse_options()

    def against_trainer(case: Case) -> Figures:
        return throughput(
            case,
            quick=options.quick,
            device=options.device,
            work=options.work,
            with_compile=options.compile,
            pairs=options.pairs,
            largest_batch=options.largest_batch,
        )

    parts: dict[str, Callable[[], Figures]] = {
        "a": lambda: against_trainer(QUICK if options.quick else FULL),
        "b": lambda: loss_costs(quick=options.quick, device=options.device),
        "c": lambda: single_gpu(options.device),
        "d": lambda: scaling(quick=options.quick, device=options.device),
        "e": lambda: loader_speed(quick=options.quick),
        "f": lambda: against_trainer(LARGE_VOCABULARY),
        "g": lambda: against_trainer(SHORTER),
    }
    measured = {}
    for part in options.part or (QUICK_PARTS if options.quick else PARTS):
        metrics, details = parts[part]()
        rounded = {name: float(f"{value:.4g}") for name, value in metrics.items()}
        measured[part] = result(f"training, part {part}", rounded, details)
        if options.out is not None:  # at once: a part takes long, and a later one can fail
            merge(measured, options.out, options.device)
    if options.out is not None:
        publish(merge(measured, options.out, options.device), options.out)
    else:
        publish(combined(measured), None)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, few steps")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only this one; may be repeated")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where parts a to d run")
    parser.add_argument(
        "--pairs", type=int, help="of parts a, f, g: size of the pool; default: 96, quick: 16"
    )
    parser.add_argument(
        "--compile", action="store_true", help="of parts a, f, g: try torch.compile in the trainer"
    )
    parser.add_argument(
        "--largest-batch",
        type=int,
        default=8,
        choices=[8, 4, 2, 1],
        help="of parts a, f, g: pairs the trainer takes at once, the rest by accumulation; less where memory is short",
    )
    parser.add_argument("--work", type=Path, help="folder for models (4 GB); default: a temporary one")
    parser.add_argument("--out", type=Path, help="merge the result into this file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but PyTorch finds no CUDA device")
    if options.pairs is not None and options.pairs < 8:
        parser.error(f"--pairs must be at least 8, one step's, got {options.pairs}")
    return options


def merge(measured: dict[str, dict[str, Any]], out: Path, device: str) -> dict[str, Any]:
    """Put parts into the file, beside those that are there; a part measured again replaces the older one."""
    known = json.loads(out.read_text())["parts"] if out.exists() else {}
    named = {part if device == "cpu" else f"{part} on {device}": found for part, found in measured.items()}
    whole = combined({**known, **named})
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(whole, indent=1) + "\n")
    partial.replace(out)
    return whole


def combined(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One report; metrics of parts on a GPU get its name in front."""
    metrics = {
        ("cuda_" if part.endswith("cuda") else "") + name: value
        for part, found in sorted(parts.items())
        for name, value in found["metrics"].items()
    }
    return {"benchmark": "training", "metrics": metrics, "parts": dict(sorted(parts.items()))}


if __name__ == "__main__":
    main()
