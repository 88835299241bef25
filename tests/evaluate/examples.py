"""Made-up evaluations and costs that look like real ones, for the tests of a report."""

import numpy as np

from tests.models.test_flops import t5gemma
from tests.models.tiny import pair_config
from twofold.config import EncoderDecoderConfig
from twofold.evaluate import Evaluation, TaskResult
from twofold.evaluate.cost import Cost
from twofold.evaluate.latency import Latency, LatencySettings, Lengths, Timing

ONE_STACK = {
    "layout": "merged", "reads": "aligned", "cross_rope": True, "decoder_positions": "continue",
    "decoder_start": "last_source_token", "tie_word_embeddings": "all", "tie_stacks": True,
}  # fmt: skip
MACHINE = {"processor": "a processor", "cores": 2, "threads": 1, "device": "cpu"}


def one_stack(config: EncoderDecoderConfig) -> EncoderDecoderConfig:
    """The decoder of a pair as a model of its own."""
    side = config.decoder
    return pair_config(side, **ONE_STACK, encoder_mask=("causal",) * side.num_hidden_layers)


def result(task: str, scores: np.ndarray, **changes) -> TaskResult:
    """A task's result from the scores of its examples."""
    values = np.asarray(scores, dtype=float)
    settings = {
        "task": task, "metric": "acc", "value": float(values.mean()), "error": None, "n": len(values),
        "values": tuple(values.tolist()), "source_tokens": 120.0, "target_tokens": 8.0,
    }  # fmt: skip
    return TaskResult(**(settings | changes))


def evaluation(name: str, tasks: list[TaskResult], **changes) -> Evaluation:
    """Of one model."""
    settings = {
        "model": name, "path": f"models/{name}", "kind": "encoder-decoder", "parameters": 134_500_000,
        "tasks": {task.task: task for task in tasks},
        "settings": {"limit": 200, "num_fewshot": None, "shots": {task.task: 0 for task in tasks}, "chat": True},
        "versions": {"python": "3.12.1", "torch": "2.13.0"}, "hardware": MACHINE,
        "command": f"twofold eval models/{name} --tasks gsm8k,boolq,scitldr", "date": "2026-01-02T03:04:05+00:00",
        "seconds": 61.0,
    }  # fmt: skip
    return Evaluation(**(settings | changes))


def cost(
    config: EncoderDecoderConfig, timings: list[tuple[Lengths, int]] = (), *, speed: float = 1.0
) -> Cost:
    """With latencies of a machine that reads 400 tokens a second and writes 50."""
    made = []
    for lengths, batch_size in timings:
        first, token = batch_size * lengths.source / 400 / speed, (1 + batch_size / 8) / 50 / speed
        total = first + (lengths.target - 1) * token
        rate = {"median": batch_size / token, "min": batch_size / token, "max": batch_size / token}
        made.append(
            Timing(
                lengths=lengths, batch_size=batch_size,
                first_token_s={"median": first, "min": 0.96 * first, "max": 1.07 * first},
                total_s={"median": total, "min": 0.95 * total, "max": 1.08 * total},
                decode_tokens_per_s=rate if lengths.target > 1 else None,
            )
        )  # fmt: skip
    latency = Latency(settings=LatencySettings(batch_size=8), hardware=MACHINE, timings=tuple(made))
    return Cost(path="models", config=config, latency=latency if made else None)


SIX = {
    "gemma-2-2b": (one_stack(t5gemma("2B", "2B")), 0.58, 1.0),
    "gemma-2-9b": (one_stack(t5gemma("9B", "9B")), 0.72, 0.27),
    "t5gemma-2b-2b": (t5gemma("2B", "2B"), 0.62, 0.97),
    "t5gemma-9b-2b": (t5gemma("9B", "2B"), 0.70, 0.86),
    "t5gemma-9b-9b-prefixlm-it": (t5gemma("9B", "9B"), 0.76, 0.26),
    "t5gemma-2b-2b-before-training": (t5gemma("2B", "2B"), 0.57, 0.96),
}
"""Model: what it is, how often it is right, how fast it is."""
TASKS = {"gsm8k": (500, 812.4, 131.0), "boolq": (800, 164.2, 1.4), "scitldr": (300, 421.0, 38.3)}
"""Task: examples, tokens read and written."""


def six_models(only: list[str] | None = None) -> list[Evaluation]:
    """Three tasks: exact match, accuracy, ROUGE."""
    random = np.random.default_rng(7)
    hard = {task: random.normal(size=n) for task, (n, _, _) in TASKS.items()}
    made = []
    for name, (_, skill, _) in SIX.items():
        results = []
        for task, (n, source, target) in TASKS.items():
            shift = {"gsm8k": -0.25, "boolq": 0.12, "scitldr": 0.0}[task]
            right = (hard[task] * 0.35 + random.normal(size=n) * 0.2 < (skill + shift - 0.5) * 2).astype(
                float
            )
            changes = {
                "source_tokens": source,
                "target_tokens": target * (1.1 if "training" in name else 1.0),
            }
            if task == "scitldr":
                right = np.clip(38 * skill + 9 * (0.6 * hard[task] + random.normal(size=n)), 0, 100)
                changes |= {"metric": "rougeL", "scale": 100.0}
            elif task == "gsm8k":
                changes |= {"metric": "exact_match", "n_truncated": 3 if "9b-2b" in name else 0}
            results.append(result(task, right, **changes))
        is_stack = name.startswith("gemma")
        kind = "decoder-only" if is_stack else "encoder-decoder"
        millions = {"gemma-2-2b": 2614, "gemma-2-9b": 9242, "t5gemma-9b-2b": 12292}
        billions = millions.get(name, 20333 if "9b-9b" in name else 5597)
        made.append(evaluation(name, results, kind=kind, parameters=billions * 10**6))
    return made if only is None else [each for each in made if each.model in only]
