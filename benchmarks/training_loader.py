"""Part e of the training benchmark: the loader alone, on one thread; see `training.py`."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from training_cases import Shape, data_file, smollm2_tokenizer, t5gemma_config
from training_ours import pool_loader, pretraining_data, supervised_data

from twofold.models import EncoderDecoder

SECONDS, SECONDS_QUICK = 20.0, 3.0
ROWS_PER_BATCH = 8


def loader_speed(*, quick: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and details: real tokens of finished batches per second of one process with one thread."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(SECONDS_QUICK if quick else SECONDS)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the loader's benchmark failed:\n{done.stderr[-2000:]}")
    cases: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    rates = {f"loader_{name}_tokens_per_s": case["tokens_per_s"] for name, case in cases.items()}
    return rates | {"loader_tokens_per_s_per_core": min(rates.values())}, {"loader": cases}


def measure(data: Any, model: EncoderDecoder, seconds: float) -> dict[str, float]:
    """Take batches for some seconds, after as many as fill the open rows; tokenising comes before, once."""
    loader = pool_loader(model, data)
    for _ in range(10):
        next(loader)
    real_tokens = positions = batches = 0
    cpu, started = time.process_time(), time.perf_counter()
    while time.perf_counter() - started < seconds:
        batch = next(loader)
        real_tokens += batch.num_real_tokens
        positions += batch.input_ids.numel() + batch.labels.numel()
        batches += 1
    took, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {
        "tokens_per_s": real_tokens / took,
        "tokens_per_cpu_s": real_tokens / cpu,
        "padding_share": 1 - real_tokens / positions,
        "batches": batches,
    }


def main() -> None:
    torch.set_num_threads(1)
    peps, p3 = data_file("corpora/peps.jsonl.gz"), data_file("instructions/p3.jsonl.gz")
    # The loader wants a model for its special tokens, limits and tokenizer only.
    model = EncoderDecoder(t5gemma_config(Shape(1, 16, 16, 1, 1, 16), 49_152))
    model.tokenizer = smollm2_tokenizer()
    seconds = float(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.jsonl"
        with gzip.open(p3, "rt", encoding="utf-8") as lines:  # some have no answer, which is refused
            pairs.write_text("".join(line for line in lines if json.loads(line)["completion"].strip()))
        cases = {
            "prefix_lm": pretraining_data(peps, 512, 512, ROWS_PER_BATCH),
            "supervised": supervised_data(pairs, 1024, 256, ROWS_PER_BATCH, max_length_action="truncate"),
        }
        print(json.dumps({name: measure(data, model, seconds) for name, data in cases.items()}))


if __name__ == "__main__":
    main()
