"""Preferences so small that a run takes a second: replies in capitals are preferred."""

import json
from pathlib import Path
from typing import Any

from tests.train.tiny_run import tiny_model
from twofold.checkpoint.save import save
from twofold.config.preferences import PairData, PreferenceRecipe, RewardRecipe
from twofold.data import Convention
from twofold.posttrain.pairs import Pair, open_pairs

RECORDS = [
    {"prompt": f"say {word}{n}", "chosen": word.upper()[: 2 + n % 4], "rejected": word[: 2 + (n + 1) % 5]}
    for n, word in enumerate(["tree", "house", "river", "cloud", "stone", "light", "grass", "bread"] * 2)
]


def written(path: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def data_config(path: Path | str, source: dict[str, Any] | None = None, **changes: Any) -> PairData:
    values: dict[str, Any] = {
        "sources": [{"path": str(path), **(source or {})}],
        "source_length": 60,
        "target_length": 60,
        "pairs_per_batch": 3,
    }
    return PairData(**(values | changes))


def pairs_of(model: Any, folder: Path) -> list[Pair]:
    """All of `RECORDS`."""
    data = data_config(written(folder / "all.jsonl"))
    return open_pairs(data, model.tokenizer, Convention.of(model.config)).train


def values_of_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run on `RECORDS` with a tiny model saved in `folder`; output is `folder / "run"`."""
    if not (folder / "start").exists():
        save(tiny_model(dropout=0.1), folder / "start")
        written(folder / "pairs.jsonl")
    data = {
        "sources": [{"path": str(folder / "pairs.jsonl")}],
        "held_out_fraction": 0.3,
        "source_length": 60,
        "target_length": 60,
        "pairs_per_batch": 2,
    }
    values: dict[str, Any] = {
        "model": {"path": str(folder / "start")},
        "data": data | changes.pop("data", {}),
        "output": str(folder / "run"),
        "steps": 6,
        "accumulate_batches": 2,
        "optimizer": {"learning_rate": 3e-3},
        "evaluate_every": 3,
        "tensorboard": False,
        "device": "cpu",
    }
    return values | changes


def dpo_recipe(folder: Path, **changes: Any) -> PreferenceRecipe:
    return PreferenceRecipe(**values_of_recipe(folder, stage="dpo", **changes))


def reward_recipe(folder: Path, **changes: Any) -> RewardRecipe:
    return RewardRecipe(**values_of_recipe(folder, stage="reward", **changes))
