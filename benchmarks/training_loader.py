"""Part e of the training benchmark: the loader alone, on one thread; see `training.py`."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from training_cases import Shape, data_file, smollm2_tokenizer, t5gemma_config
from training_ours import pool_loader, pretraining_data, supervised_data

from twofold.models import EncoderDecoder

SECONDS, SECONDS_QUICK = 20.0, 1.5
DOCUMENTS_QUICK = {"prefix_lm": 30, "supervised": 600}
"""Less to tokenise before the clock starts."""

ROWS_PER_BATCH = 8


def loader_speed(*, quick: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and details: real tokens of finished batches per second of one process with one thread."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "quick" if quick else "full"],
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
    is_quick = sys.argv[1] == "quick"
    seconds = SECONDS_QUICK if is_quick else SECONDS
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, original in (("prefix_lm", peps), ("supervised", p3)):
            files[name] = Path(folder) / f"{name}.jsonl"
            with gzip.open(original, "rt", encoding="utf-8") as lines:
                kept = islice(lines, DOCUMENTS_QUICK[name] if is_quick else None)
                files[name].write_text("".join(kept), encoding="utf-8")
        truncate = {"max_length_action": "truncate", "max_bad_share": 0.1}
        cases = {
            "prefix_lm": pretraining_data(files["prefix_lm"], 512, 512, ROWS_PER_BATCH),
            "supervised": supervised_data(files["supervised"], 1024, 256, ROWS_PER_BATCH, **truncate),
        }
        print(json.dumps({name: measure(data, model, seconds) for name, data in cases.items()}))


if __name__ == "__main__":
    main()
