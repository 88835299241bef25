"""Part d of the training benchmark: speed against sequence length and against ranks; see `training.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from training_cases import SMALL, data_file, t5gemma_config, write_model
from training_ours import RandomBatches, measure

import twofold

VOCABULARY = 32_768
SOURCE_LENGTHS = (512, 1024, 2048, 4096, 8192)
RANKS = (1, 2, 4)
LAUNCH = "import sys; from twofold.cli import main; sys.argv[0] = 'twofold'; main()"


def scaling(*, quick: bool, device: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and details of both."""
    metrics, details = scaling_with_length(SOURCE_LENGTHS[:2] if quick else SOURCE_LENGTHS, device)
    more_metrics, more_details = scaling_with_ranks(RANKS[:2] if quick else RANKS, steps=4 if quick else 12)
    return metrics | more_metrics, details | more_details


def scaling_with_length(lengths: tuple[int, ...], device: str) -> tuple[dict[str, float], dict[str, Any]]:
    """One example a step, with a target of a quarter of its source."""
    metrics, runs = {}, []
    for length in lengths:
        model = twofold.EncoderDecoder(t5gemma_config(SMALL, VOCABULARY))
        model.initialise_randomly(seed=0)
        found = measure(
            model,
            RandomBatches(VOCABULARY, length, length // 4),
            device=device,
            precision="bfloat16" if device == "cuda" else "float32",
            warmup_steps=1,
            measured_steps=max(2, 4096 // length),
        )
        metrics[f"tokens_per_s_at_{length}"] = found["tokens_per_s"]
        runs.append({"source_length": length, "target_length": length // 4, **found})
        print(
            f"source of {length} tokens: {found['tokens_per_s']:,.0f} tokens/s", file=sys.stderr, flush=True
        )
    ratio = runs[-1]["tokens_per_s"] / runs[0]["tokens_per_s"]
    return metrics | {"tokens_per_s_longest_over_shortest": ratio}, {"lengths": runs}


def scaling_with_ranks(ranks: tuple[int, ...], steps: int) -> tuple[dict[str, float], dict[str, Any]]:
    """The same recipe on 1, 2, ... processes of this machine (gloo), which share its cores."""
    metrics: dict[str, float] = {}
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(SMALL._replace(num_layers=4), 49_152, folder / "model")
        for count in ranks:
            found = run_ranks(folder, count, max(ranks), steps)
            runs[str(count)] = found
            print(f"{count} ranks: {found}", file=sys.stderr, flush=True)
            if "failed" not in found:
                metrics[f"tokens_per_s_on_{count}_ranks"] = found["tokens_per_s"]
    one = metrics.get("tokens_per_s_on_1_ranks")
    if one is not None:
        metrics |= {
            f"speed_of_{count}_ranks_over_one": metrics[f"tokens_per_s_on_{count}_ranks"] / one
            for count in ranks[1:]
            if f"tokens_per_s_on_{count}_ranks" in metrics
        }
    losses = {tuple(run["losses"]) for run in runs.values() if "failed" not in run}
    if losses and max(abs(a - b) for run in losses for a, b in zip(run, min(losses), strict=True)) > 1e-3:
        raise RuntimeError(f"the losses depend on the number of ranks: {runs}")
    return metrics, {"ranks": runs}


def run_ranks(folder: Path, count: int, streams: int, steps: int) -> dict[str, Any]:
    """`twofold train` under torchrun, with as many streams in each run as there are ranks in the largest."""
    threads = max(1, (os.cpu_count() or 1) // count)
    recipe = folder / f"ranks{count}.yaml"
    recipe.write_text(yaml.safe_dump(rank_recipe(folder, count, streams, steps)))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "--no-python"]
    program = [sys.executable, "-W", "ignore", "-c", LAUNCH, "train", str(recipe)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, *program],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return {"failed": done.stderr[:1500]}  # the ranks' own words come before the launcher's
    lines = (folder / f"run{count}" / "metrics.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    measured = [line for line in written if "loss" in line][2:]  # two steps of warm-up
    return {
        "tokens_per_s": sum(line["real_tokens"] for line in measured)
        / sum(line["seconds"] for line in measured),
        "threads_per_rank": threads,
        "losses": [line["loss"] for line in measured],
    }


def rank_recipe(folder: Path, count: int, streams: int, steps: int) -> dict[str, Any]:
    return {
        "stage": "pretrain",
        "model": {"path": str(folder / "model")},
        "data": {
            "sources": [{"path": str(data_file("corpora/peps.jsonl.gz"))}],
            "source_length": 256,
            "target_length": 64,
            "rows_per_batch": 1,
        },
        "output": str(folder / f"run{count}"),
        "steps": steps,
        "accumulate_batches": streams,
        "optimizer": {"learning_rate": 1e-5},
        "tensorboard": False,
        "device": "cpu",
    }


def single_gpu(device: str) -> tuple[dict[str, float], dict[str, Any]]:
    """2B-2B shapes, 4096 + 4096 tokens a step in bfloat16, beside the rate of a plain matrix product.

    FLOPs are those of the model, counted exactly; what checkpointing computes twice counts once.
    """
    if device != "cuda":
        return {}, {"gpu": {"skipped": "2B-2B shapes need a CUDA device with 110 GB; run with --device cuda"}}
    from training_cases import TWO_B

    from twofold.models.flops import example_row, training_flops

    config = t5gemma_config(TWO_B, 256_000)
    model = twofold.EncoderDecoder(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    product_flops = product_rate()
    found = measure(
        model,
        RandomBatches(256_000, 4096, 4096),
        device=device,
        precision="bfloat16",
        warmup_steps=3,
        measured_steps=10,
    )
    flops = training_flops(config, example_row(config, 4096, 4096)).model
    rate = flops * found["steps"] / found["seconds"]
    metrics = {
        "gpu_tokens_per_s": found["tokens_per_s"],
        "gpu_tflops_per_s": rate / 1e12,
        "gpu_product_tflops_per_s": product_flops / 1e12,
        "gpu_share_of_product": rate / product_flops,
        "gpu_peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
    }
    return metrics, {"gpu": {**found, "flops_per_step": flops}}


def product_rate(size: int = 8192, rounds: int = 30) -> float:
    """FLOPs per second of a bfloat16 matrix product on the GPU."""
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    for _ in range(5):
        a @ a
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(rounds):
        a @ a
    end.record()
    torch.cuda.synchronize()
    return rounds * 2 * size**3 / (start.elapsed_time(end) / 1e3)
