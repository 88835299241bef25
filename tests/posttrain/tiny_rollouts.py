"""Prompts, rewards and runs so small that a step takes a tenth of a second."""

import json
from pathlib import Path
from typing import Any

from tests.posttrain.tiny_pairs import written
from tests.train.tiny_run import tiny_model
from twofold.checkpoint.save import save
from twofold.config.grpo import PolicyRecipe

RECORDS = [
    {"prompt": f"{a}+{b}=", "answer": str(a + b), "where": n}
    for n, (a, b) in enumerate([(1, 2), (3, 4), (5, 1), (2, 2), (7, 1), (4, 4), (6, 3), (0, 5), (9, 9)])
]

VOWELS = """
def vowels(prompts, completions, records):
    return [sum(c in "aeiou" for c in text) / 4 for text in completions]


def low(prompts, completions, records):
    return [sum(ord(c) < 100 for c in text) / (1 + len(text)) for text in completions]
"""


def values_of_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run on `RECORDS` with a tiny model saved in `folder`; output is `folder / "run"`."""
    if not (folder / "start").exists():
        save(tiny_model(dropout=0.1), folder / "start")
    if not (folder / "prompts.jsonl").exists():
        written(folder / "prompts.jsonl", RECORDS)
        (folder / "rewards.py").write_text(VOWELS)
    data = {
        "sources": [{"path": str(folder / "prompts.jsonl")}],
        "held_out_fraction": 0.3,
        "source_length": 20,
        "prompts_per_batch": 2,
    }
    rollout = {"num_samples": 3, "max_new_tokens": 6, "batch_size": 8}
    values: dict[str, Any] = {
        "stage": "grpo",
        "model": {"path": str(folder / "start")},
        "data": data | changes.pop("data", {}),
        "rewards": [
            {"kind": "function", "name": "low", "path": f"{folder / 'rewards.py'}:low"},
            {"kind": "length", "target_words": 2, "weight": 0.5},
        ],
        "rollout": rollout | changes.pop("rollout", {}),
        "output": str(folder / "run"),
        "steps": 6,
        "accumulate_batches": 2,
        "optimizer": {"learning_rate": 3e-3},
        "evaluate_every": 3,
        "tensorboard": False,
        "device": "cpu",
    }
    return values | changes


def grpo_recipe(folder: Path, **changes: Any) -> PolicyRecipe:
    return PolicyRecipe(**values_of_recipe(folder, **changes))


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in lines]
