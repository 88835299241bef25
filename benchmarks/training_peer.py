"""The other side of the training benchmark: transformers' Seq2SeqTrainer on the same files."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training_cases import read_features
from training_ours import synchronise
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

Features = list[dict[str, list[int]]]


class Watched(Seq2SeqTrainer):
    """Counts what it trains on; the counts stay on the device until they are asked for."""

    def reset(self) -> None:
        self.counts: list[Tensor] = []
        self.positions = 0

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        real = inputs["attention_mask"].sum() + (inputs["labels"] != -100).sum()
        self.counts.append(real)
        self.positions += inputs["input_ids"].numel() + inputs["labels"].numel()
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss


class Clock(TrainerCallback):
    """From the begin of an epoch, before its first batch is made, to the end of its last step."""

    started = ended = 0.0
    steps = 0

    def on_epoch_begin(self, *_arguments: Any, **_options: Any) -> None:
        synchronise()
        self.started, self.steps = time.perf_counter(), 0

    def on_step_end(self, *_arguments: Any, **_options: Any) -> None:
        self.steps += 1

    def on_epoch_end(self, *_arguments: Any, **_options: Any) -> None:
        synchronise()
        self.ended = time.perf_counter()


def measure(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Train one epoch over the pool after some steps of warm-up.

    Args:
        spec: see `training_contend.py`. `tuned`: length grouping and fused AdamW beside the precision, attention,
            batch size and compilation it names; without it, everything is the trainer's default.

    Returns:
        Figures as those of `training_ours.measure`, and what the trainer chose by itself.
    """
    tuned = {"attn_implementation": spec["attention"]} if spec["attention"] else {}
    model = AutoModelForSeq2SeqLM.from_pretrained(spec["model"], **tuned)
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    features = read_features(Path(spec["pool"]), tokenizer)
    report: dict[str, Any] = {}
    if spec["check"]:
        report["check"] = pool_loss(model, read_features(Path(spec["check"]), tokenizer), collator)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Watched(
            model=model,
            args=Seq2SeqTrainingArguments(output_dir=folder, **arguments(spec)),
            train_dataset=features,
            data_collator=collator,
            callbacks=[clock],
        )
        # First with a limit, so that moments, memory and compiled code are there, then the whole pool.
        # A compiled model meets most of its shapes in a whole epoch only.
        trainer.args.max_steps = -1 if spec["compile"] else spec["warmup_steps"]
        trainer.reset()
        trainer.train()
        trainer.args.max_steps = -1
        trainer.reset()
        trainer.train()
    real_tokens = int(torch.stack(trainer.counts).sum())
    seconds = clock.ended - clock.started
    return report | {
        "tokens_per_s": real_tokens / seconds,
        "real_tokens": real_tokens,
        "positions": trainer.positions,
        "seconds": seconds,
        "steps": clock.steps,
        "last_loss": trainer.state.log_history[-1]["train_loss"],
        "chosen": {
            "attention": model.config.decoder._attn_implementation,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "optimizer": str(trainer.args.optim),
            "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
            "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        },
    }


def arguments(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the trainer: nothing is saved or reported, and for a tuned one what is asked for."""
    chosen: dict[str, Any] = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": spec["batch_size"],
        "gradient_accumulation_steps": spec["accumulate"],
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": spec["device"] == "cpu",
    }
    if not spec["tuned"]:
        return chosen
    known = {field.name for field in fields(Seq2SeqTrainingArguments)}
    grouping = (
        {"train_sampling_strategy": "group_by_length"}
        if "train_sampling_strategy" in known
        else {"group_by_length": True}
    )
    chosen |= {"optim": "adamw_torch_fused", "bf16": spec["precision"] == "bfloat16", **grouping}
    if spec["compile"]:
        chosen["torch_compile"] = True
    return chosen


@torch.no_grad()
def pool_loss(model: Any, features: Features, collator: Any) -> dict[str, float]:
    """Mean loss per scored token over all pairs, padded in batches of four, in the model's own dtype."""
    model.eval()
    total, n_scored, n_real = 0.0, 0, 0
    for start in range(0, len(features), 4):
        batch = collator([dict(feature) for feature in features[start : start + 4]])
        scored = int((batch["labels"] != -100).sum())
        total += float(model(**batch).loss) * scored
        n_scored += scored
        n_real += scored + int(batch["attention_mask"].sum())
    return {"loss": total / n_scored, "scored_tokens": n_scored, "real_tokens": n_real}


def candidates(device: str, *, with_compile: bool) -> list[dict[str, Any]]:
    """Settings worth trying for the tuned trainer; 8 pairs a step in all of them.

    SDPA is not among them: it has no soft-cap, so it computes another model. Smaller batches pad less.
    """
    attentions = ["eager"]
    if device == "cuda":
        from transformers.utils import is_flash_attn_2_available

        attentions += ["flex_attention"] + (["flash_attention_2"] if is_flash_attn_2_available() else [])
    tried: Sequence[tuple[int, int]] = [(8, 1), (2, 4)] if device == "cpu" else [(8, 1)]
    found = [
        {"precision": precision, "attention": attention, "batch_size": size, "accumulate": accumulate}
        for precision in ("float32", "bfloat16")
        for attention in attentions
        for size, accumulate in tried
        # FlashAttention computes in 16 bits only.
        if not (attention == "flash_attention_2" and precision == "float32")
    ]
    compiled = [{**one, "compile": True} for one in found] if with_compile else []
    return [{**one, "compile": False} for one in found] + compiled
