"""Part a of the training benchmark: real tokens per second against Seq2SeqTrainer; see `training.py`."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from training_cases import B_B, B_B_QUICK, Shape, smollm2_tokenizer, write_model, write_part, write_pool
from training_contend import contend, contend_apart
from training_ours import synchronise

PAIRS_PER_STEP = 8
"""Seq2SeqTrainer's default batch."""

PACKED_SHARE = 0.97
"""Of a packed row's source side that holds tokens, to give our step as many of them as theirs on average."""

LOSS_TOLERANCE = 1e-4


class Case(NamedTuple):
    """One model and the pool it is trained on."""

    suffix: str
    """Of the metrics' names."""
    shape: Shape
    vocab_size: int
    pairs: int
    tried_pairs: int
    """Of the search for the best settings."""
    source_limit: int
    target_limit: int | None
    timeout_s: float


QUICK = Case("", B_B_QUICK, 49_152, 16, 8, 192, 48, 60.0)
FULL = Case("", B_B, 49_152, 96, 24, 1024, None, 3600.0)
# Logits of targets as they are would need 20 GB in the peer; limited for both.
LARGE_VOCABULARY = Case("_256k", B_B, 256_000, 96, 24, 1024, 128, 3600.0)
SHORTER = Case("_512", B_B, 49_152, 96, 24, 512, 128, 3600.0)


def throughput(
    case: Case,
    *,
    quick: bool,
    device: str,
    work: Path | None,
    with_compile: bool,
    pairs: int | None,
    largest_batch: int = 8,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and details of a case."""
    if pairs is not None:
        case = case._replace(pairs=pairs, tried_pairs=min(case.tried_pairs, pairs))
    with tempfile.TemporaryDirectory(dir=work) as folder:
        # Small models share a process: importing would take longer than measuring.
        run: Run = (lambda spec, _: contend(spec)) if quick else contend_apart
        figures, found = Comparison(case, device, Path(folder), run, with_compile, largest_batch).run()
    metrics = {name + case.suffix: value for name, value in figures.items()}
    return metrics, {"throughput" + case.suffix: found}


Run = Callable[[dict[str, Any], float], dict[str, Any]]


class Comparison:
    """Ours, theirs as it comes, theirs at its best, ours again."""

    def __init__(
        self, case: Case, device: str, folder: Path, run: Run, with_compile: bool, largest_batch: int
    ) -> None:
        self._case, self._run, self._with_compile = case, run, with_compile
        self._largest_batch = largest_batch
        tokenizer = smollm2_tokenizer()
        write_model(case.shape, case.vocab_size, folder / "model")
        self._pool, self._tried, self._check = (
            folder / name for name in ("pool.jsonl", "tried.jsonl", "check.jsonl")
        )
        limits = {"source_limit": case.source_limit, "target_limit": case.target_limit}
        self._lengths = write_pool(self._pool, tokenizer, case.pairs, **limits)
        write_part(self._pool, self._tried, tokenizer, case.tried_pairs)
        write_part(self._pool, self._check, tokenizer, min(PAIRS_PER_STEP, case.tried_pairs))
        self._common = {"model": str(folder / "model"), "device": device}
        self._device = device
        self._precisions = ["float32", "bfloat16"] if bfloat16_is_faster(device) else ["float32"]

    def run(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Metrics without suffix, and details."""
        our_settings, our_tries = self._search(
            [{"contender": "ours", **one} for one in self._our_candidates()]
        )
        best_settings, best_tries = self._search(self._peer_candidates())
        check = {"check": str(self._check)}
        runs = {"first": self._measure(our_settings | check)}
        runs["default"] = self._measure_default(check)
        loss_difference = self._compare_losses(runs["first"]["check"], runs["default"]["check"])
        runs["best"] = self._measure(best_settings)
        runs["last"] = self._measure(our_settings)
        ours = mean([self._rate(runs["first"]), self._rate(runs["last"])])
        metrics = {
            "tokens_per_s": ours,
            "seq2seq_trainer_tokens_per_s": self._rate(runs["default"]),
            "seq2seq_trainer_best_tokens_per_s": self._rate(runs["best"]),
            "tokens_per_s_over_seq2seq_trainer": ours / self._rate(runs["default"]),
            "tokens_per_s_over_seq2seq_trainer_best": ours / self._rate(runs["best"]),
            "drift": runs["last"]["tokens_per_s"] / runs["first"]["tokens_per_s"],
            "padding_share": padding_share(runs["first"]),
            "seq2seq_trainer_padding_share": padding_share(runs["default"]),
            "seq2seq_trainer_best_padding_share": padding_share(runs["best"]),
            "tokens_per_step": runs["first"]["real_tokens"] / runs["first"]["steps"],
            "seq2seq_trainer_tokens_per_step": runs["default"]["real_tokens"] / runs["default"]["steps"],
            "loss_relative_difference": loss_difference,
        }
        details = {
            "lengths": self._lengths,
            "vocab_size": self._case.vocab_size,
            "shape": self._case.shape._asdict(),
            "runs": runs,
            "our_settings": our_settings,
            "best_settings": best_settings,
            "our_tries": our_tries,
            "best_tries": best_tries,
            "precisions_tried": self._precisions,
        }
        return metrics, details

    def _our_candidates(self) -> list[dict[str, Any]]:
        """One long row a step, which holds the tokens of a step of theirs on average."""
        lengths = self._lengths
        per_step = PAIRS_PER_STEP * lengths["source_mean"] / PACKED_SHARE
        # Lengths of targets vary widely; with room for twice their mean, it is the sources that fill a row.
        target = rounded_up(max(lengths["target_longest"], 2 * PAIRS_PER_STEP * lengths["target_mean"]))
        row = {
            "source_length": rounded_up(max(per_step, self._case.source_limit)),
            "target_length": target,
            "rows_per_batch": 1,
        }
        return [{"precision": precision, **row} for precision in self._precisions]

    def _peer_candidates(self) -> list[dict[str, Any]]:
        from training_peer import candidates

        found = candidates(self._device, with_compile=self._with_compile)
        kept = [
            one
            for one in found
            if one["precision"] in self._precisions and one["batch_size"] <= self._largest_batch
        ]
        return [{"contender": "peer", "tuned": True, **one} for one in kept]

    def _search(self, tried: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The fastest settings over a small pool, and what all of them did; a single one is not tried."""
        if len(tried) == 1:
            return tried[0], []
        results = []
        for settings in tried:
            report = self._start(settings, self._tried, self._case.tried_pairs)
            results.append({**settings, **report})
        worked = [i for i, result in enumerate(results) if "failed" not in result]
        if not worked:
            reasons = {result["failed"] for result in results}
            raise RuntimeError(
                f"none of {len(tried)} settings could be measured: {'; '.join(sorted(reasons))}"
            )
        return tried[max(worked, key=lambda i: results[i]["tokens_per_s"])], results

    def _measure(self, settings: dict[str, Any]) -> dict[str, Any]:
        report = self._start(settings, self._pool, self._case.pairs)
        if "failed" in report:
            raise RuntimeError(f"{settings} could not be measured: {report['failed']}")
        return report

    def _measure_default(self, check: dict[str, Any]) -> dict[str, Any]:
        """The trainer as it comes; where memory is too short for its batch, split over accumulation steps."""
        report: dict[str, Any] = {}
        for size in (n for n in (8, 4, 2, 1) if n <= self._largest_batch):
            split = {"batch_size": size, "accumulate": PAIRS_PER_STEP // size}
            settings = {"contender": "peer", **split, **check}
            report = self._start(settings, self._pool, self._case.pairs)
            if report.get("failed") != "out of memory":
                break
        if "failed" in report:
            raise RuntimeError(f"Seq2SeqTrainer's defaults could not be measured: {report['failed']}")
        return report

    def _start(self, settings: dict[str, Any], pool: Path, pairs: int) -> dict[str, Any]:
        spec = {**self._common, **settings, "pool": str(pool)}
        if settings["contender"] == "ours":
            spec["measured_steps"] = max(pairs // PAIRS_PER_STEP, 1)
        report = self._run(spec, self._case.timeout_s)
        rate = f"{report['tokens_per_s']:,.1f} tokens/s" if "failed" not in report else report["failed"]
        shown = {key: value for key, value in settings.items() if key != "check"}
        print(f"{self._case.vocab_size:,} words, {pairs} pairs, {shown}: {rate}", file=sys.stderr, flush=True)
        return report

    @staticmethod
    def _rate(report: dict[str, Any]) -> float:
        rate: float = report["tokens_per_s"]
        return rate

    @staticmethod
    def _compare_losses(ours: dict[str, float], theirs: dict[str, float]) -> float:
        """Relative difference of the losses over the same pairs.

        Raises:
            RuntimeError: the two do not do the same work, so comparing their speed would say nothing.
        """
        counts = ("scored_tokens", "real_tokens")
        difference = abs(ours["loss"] - theirs["loss"]) / theirs["loss"]
        if any(ours[name] != theirs[name] for name in counts) or difference > LOSS_TOLERANCE:
            raise RuntimeError(f"the contenders differ in what they compute: ours {ours}, theirs {theirs}")
        return difference


def bfloat16_is_faster(device: str) -> bool:
    """Whether it multiplies matrices faster than float32 does here.

    A CPU without instructions for it takes about ten times as long, which is not worth an hour of tries.
    """

    def seconds(dtype: torch.dtype) -> float:
        a, b = (torch.ones(size, dtype=dtype, device=device) for size in ((1024, 768), (768, 2048)))
        took = []
        for _ in range(5):
            synchronise()
            started = time.perf_counter()
            a @ b
            synchronise()
            took.append(time.perf_counter() - started)
        return min(took)

    return seconds(torch.bfloat16) < seconds(torch.float32)


def padding_share(report: dict[str, Any]) -> float:
    """Positions without a real token, of all."""
    share: float = 1 - report["real_tokens"] / report["positions"]
    return share


def rounded_up(tokens: float, step: int = 64) -> int:
    return int(-(-tokens // step) * step)
