"""Post-training measured: a small real pair tuned on preferences (DPO) and on a verifiable reward (GRPO, ROUGE-L).

    TWOFOLD_DATA=/path/to/data python benchmarks/posttraining.py DONOR --work runs/posttraining \
        --out benchmarks/results/posttraining.json

DONOR is SmolLM2-135M-Instruct, a folder, a hub name or a GGUF file. Each run is `twofold train` with a recipe of
`recipes/` and the overrides below, which make it fit two CPU cores. A run that was stopped goes on where it was; one
that has ended is read; `steps_done` says how far each is. `--out` is written after each, and keeps what is not measured
again (`--run`).

Held-out figures are given before the first step and at every evaluation. For GRPO, `reward_gain` is the difference to
the start over the same prompts, those whose answers a run keeps to be read, with a 95% interval from resampled prompts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import publish, result

ROOT = Path(__file__).resolve().parents[1]
RUNS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "dpo": (
        "recipes/smollm2-dpo.yaml",
        {
            "steps": "40",
            "data.held_out_fraction": "0.25",
            "data.source_length": "384",
            "data.target_length": "192",
            "evaluate_every": "20",
            "save_every": "20",
        },
    ),
    "grpo": (
        "recipes/smollm2-grpo-summarise.yaml",
        {
            "steps": "40",
            "data.prompts_per_batch": "2",
            "accumulate_batches": "2",
            "data.source_length": "256",
            "data.held_out.0.max_prompts": "60",
            "rollout.num_samples": "8",
            "rollout.max_new_tokens": "48",
            "rollout.temperature": "0.8",
            "optimizer.learning_rate": "1.0e-5",
            "evaluate_every": "10",
            "save_every": "20",
        },
    ),
}
"""Recipe and overrides."""

_HELD_OUT = "held_out_"
_PHASES = ("rollout_seconds", "reward_seconds", "scoring_seconds")


def main() -> None:
    options = parse_options()
    details: dict[str, Any] = {}
    if options.out is not None and options.out.is_file():
        details = json.loads(options.out.read_text())["details"]
    for name in options.run or RUNS:
        output = options.work / name
        if not options.as_they_are:
            train(options.donor, name, output, options.override)
        details[name] = figures(name, output) | {"recipe": RUNS[name][0], "overrides": RUNS[name][1]}
        if options.override:
            details[name]["further_overrides"] = options.override
        publish(result("posttraining", metrics(details), details), options.out)


def train(donor: str, name: str, output: Path, overrides: Sequence[str]) -> None:
    """Begin the run, or go on with it."""
    recipe, own = RUNS[name]
    given = [f"model.adapt.encoder={donor}", f"output={output}", "tensorboard=false"]
    command = [sys.executable, "-m", "twofold.cli", "train", str(ROOT / recipe), *given]
    command += [*(f"{key}={value}" for key, value in own.items()), *overrides]
    if (output / "metrics.jsonl").is_file():
        command.append("--resume")
    subprocess.run(command, check=True, cwd=ROOT)


def figures(name: str, output: Path) -> dict[str, Any]:
    """What a run's files say: held-out figures by step, the training's own, and where its time went."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "loss" in line}
    held_out = {
        line["step"]: {key.removeprefix(_HELD_OUT): value for key, value in line.items() if key != "step"}
        for line in lines
        if "held_out_loss" in line
    }
    curve = [{"step": step, **values} for step, values in sorted(held_out.items())]
    found: dict[str, Any] = {
        "steps_done": max(steps),
        "held_out": curve,
        "train": [steps[n] for n in sorted(steps)],
    }
    if name == "grpo":
        seconds = sum(line["seconds"] for line in steps.values())
        split = {phase: sum(line[phase] for line in steps.values()) / seconds for phase in _PHASES}
        found["time_split"] = {key.removesuffix("_seconds"): value for key, value in split.items()}
        found["time_split"]["update"] = 1 - sum(split.values())
        found["reward_gain"] = reward_gain(output / "held_out.jsonl")
    return found


def reward_gain(file: Path) -> dict[str, Any]:
    """Mean difference of ROUGE-L between the last evaluation and the first, over the same prompts, and its interval."""
    import numpy as np

    from twofold.evaluate.bootstrap import estimate, resampled_means

    by_step: dict[int, dict[str, list[float]]] = {}
    for line in file.read_text().splitlines():
        record = json.loads(line)
        by_step.setdefault(record["step"], {}).setdefault(record["where"], []).append(record["reward_rouge"])
    first, last = min(by_step), max(by_step)
    gains = [np.mean(by_step[last][where]) - np.mean(by_step[first][where]) for where in by_step[first]]
    drawn = resampled_means([gains], task="grpo")[:, 0]
    found = estimate(float(np.mean(gains)), drawn)
    return {
        "rouge_l": found.value,
        "low": found.low,
        "high": found.high,
        "prompts": len(gains),
        "last_step": last,
    }


def metrics(details: Mapping[str, Any]) -> dict[str, float]:
    """Flat: before and after."""
    found: dict[str, float] = {}
    for name, key in (("dpo", "accuracy"), ("dpo", "margin"), ("grpo", "reward_rouge"), ("grpo", "length")):
        if name in details:
            curve = details[name]["held_out"]
            found |= {f"{name}_{key}_before": curve[0][key], f"{name}_{key}_after": curve[-1][key]}
    return found


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("donor", metavar="DONOR")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs, kept")
    parser.add_argument("--run", choices=tuple(RUNS), action="append", help="may be repeated; default: all")
    parser.add_argument(
        "--as-they-are", action="store_true", help="only read what the runs in --work have written"
    )
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="of the recipes")
    parser.add_argument("--out", type=Path, help="file to read what is known from, and to write to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
