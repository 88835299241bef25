"""How a pair should start: losses before training, and against tokens, of many starts from one donor.

    export TWOFOLD_DATA=/path/to/data
    python -m benchmarks.study.study DONOR --part start --out benchmarks/results/study/smollm2-135m
    python -m benchmarks.study.study DONOR --part tasks --arm sink --arm "share 0.1" --out ...
    python -m benchmarks.study.study DONOR --part train --arm control --arm sink --steps 100 --out ...
    python -m benchmarks.study.study DONOR --part tune --arm sink --steps 40 --examples 100 --out ...
    python -m benchmarks.study.study DONOR --decoder NARROW --part train --arm 'stitched 24k' --out ...
    python -m benchmarks.study.study --part figures --out benchmarks/results/study/smollm2-135m

`start` measures every arm without training, in loss, and `tasks` in answers to multiple choice; `train` trains some and
measures on the way; `tune` fine-tunes some on prompts and answers. Each arm and seed is one file, written when it is
done and at every measurement before; what is there is not done again, so a study that was stopped goes on with the same
command. `figures` draws what is there. The last line printed is one JSON object.

All losses are nats per target token of PrefixLM, 128 tokens read and 128 written, over held-out documents of three
domains, computed in float32. Differences between arms are paired: every arm is measured on the same pieces, and the
noise given is the standard error over pieces of the difference to the donor's loss (`start`).

The control is the donor itself, trained on the same tokens with the same loss: one stack of weights under a causal
mask. Without it a drop in loss could be nothing but adaptation to the domain. For pairs of two donors, which differ in
width (`narrow` makes one), it is the decoder's donor.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import publish, result
from benchmarks.study.arms import Arm, arms, make
from benchmarks.study.depth import kept_layers
from benchmarks.study.likelihood import TASKS, log_likelihoods, pick, questions
from benchmarks.study.results import details_of, differences, mean, noise, rounded, show, slug, write
from benchmarks.study.text import Texts, batches
from benchmarks.study.tune import GROUPS, held_out, measure, tune
from twofold.checkpoint import resolve
from twofold.config.data import DataConfig
from twofold.config.distillation import DistillationConfig
from twofold.config.recipe import OptimizerConfig, ScheduleConfig, TrainSettings
from twofold.data import Convention
from twofold.models import EncoderDecoder
from twofold.models.families import donor_family
from twofold.train import Callback, fit
from twofold.train.run import build_loaders
from twofold.train.step import LossModule, StepResult, batch_loss
from twofold.train.teacher import Distillation, open_distillation

SOURCE_LENGTH = TARGET_LENGTH = 128


class Meter:
    """Losses of a model on the measured pieces."""

    def __init__(self, texts: Texts, count: int) -> None:
        self._pieces = texts.pieces("measure", count)

    @torch.no_grad()
    def by_piece(self, model: EncoderDecoder) -> dict[str, list[float]]:
        """Mean loss of each piece, by domain, float32; the model's mode is left as it was."""
        was_training = model.training
        module = LossModule(model.eval())
        convention, device = Convention.of(model.config), next(model.parameters()).device
        found: dict[str, list[float]] = {}
        for domain, pieces in self._pieces.items():
            found[domain] = [
                batch_loss(module, batch, device).item() / batch.num_scored_tokens
                for batch in batches(pieces, model.tokenizer, convention, SOURCE_LENGTH, TARGET_LENGTH)
            ]
        model.train(was_training)
        return found


class Study:
    """One donor's arms, and the folder their results lie in."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out
        donor = resolve(options.donor)
        n_layers = donor_family(donor.config).read_config(donor.config).stack.num_hidden_layers
        self.arms = arms(n_layers, kept_layers(self.out), options.decoder)
        unknown = [name for name in options.arm if name not in self.arms]
        if unknown:
            raise ValueError(f"unknown arms {unknown}; known are {', '.join(self.arms)}")
        self.chosen = {name: self.arms[name] for name in options.arm or self.arms}
        self.texts = Texts(Path(os.environ["TWOFOLD_DATA"]))
        self.meter = Meter(self.texts, options.pieces)

    def start(self) -> dict[str, float]:
        """Every arm's loss before training, and its distance to the donor's."""
        metrics = {}
        donor = self._start_of("causal", self.arms["causal"])
        for name, arm in self._untrained():
            found = self._start_of(name, arm)
            for domain, losses in found["losses"].items():
                above = differences(losses, donor["losses"][domain], self._file("start", name))
                metrics[f"{slug(name)}_{domain}_above_donor"] = mean(above)
                metrics[f"{slug(name)}_{domain}_noise"] = noise(above)
        return metrics

    def _untrained(self) -> Iterator[tuple[str, Arm]]:
        """The chosen arms but those that start as one before them."""
        seen: list[tuple[Mapping[str, Any], bool]] = []
        for name, arm in self.chosen.items():
            if (arm.adapt, arm.is_random) not in seen:
                seen.append((arm.adapt, arm.is_random))
                yield name, arm

    def _file(self, part: str, name: str) -> Path:
        return self.out / f"{part}-{slug(name)}.json"

    def _start_of(self, name: str, arm: Arm) -> dict[str, Any]:
        file = self._file("start", name)
        known = details_of(file)
        if known is not None:
            return known
        model = make(self.options.donor, arm, self.texts, seed=0)
        losses = self.meter.by_piece(model)
        details = {
            "arm": name,
            "says": arm.says,
            "losses": losses,
            "parameters": sum(p.numel() for p in model.parameters()),
            "encoder_mask": model.config.encoder_mask,
            "profile": (model.adaptation or {}).get("profile"),
            "stitch": (model.adaptation or {}).get("stitch"),
            "refit": (model.adaptation or {}).get("refit"),
        }
        metrics = {f"{domain}_loss": mean(values) for domain, values in losses.items()}
        write(file, result(f"study, start of {name}", rounded(metrics), details))
        show(f"{name}: {rounded(metrics)}")
        return details

    def tasks(self) -> dict[str, float]:
        """Accuracy of every arm before training, by likelihood, and its distance to the donor's."""
        metrics = {}
        donor = self._tasks_of("causal", self.arms["causal"])
        for name, arm in self._untrained():
            answers = self._tasks_of(name, arm)["correct"]
            for task in self.options.task:
                correct = answers[task]
                above = differences(correct, donor["correct"][task], self._file("tasks", name))
                found = {"accuracy": mean(correct), "accuracy_noise": noise(correct)}
                found |= {"above_donor": mean(above), "above_donor_noise": noise(above)}
                metrics |= {f"{slug(name)}_{task}_{what}": value for what, value in found.items()}
        return metrics

    def _tasks_of(self, name: str, arm: Arm) -> dict[str, Any]:
        file = self._file("tasks", name)
        details = details_of(file) or {"arm": name, "says": arm.says, "correct": {}, "log_likelihoods": {}}
        count = self.options.examples
        left = [task for task in self.options.task if len(details["correct"].get(task, [])) < count]
        if not left:
            return details
        model = make(self.options.donor, arm, self.texts, seed=0)
        for task_name in left:
            task = TASKS[task_name]
            correct: list[float] = details["correct"].setdefault(task_name, [])
            scores: list[list[float]] = details["log_likelihoods"].setdefault(task_name, [])
            for question in questions(task, self.texts.folder, count)[len(correct) :]:
                found = log_likelihoods(model, question)
                correct.append(float(pick(task, question, found) == question.answer))
                scores.append([round(x, 3) for x in found.tolist()])
            metrics = {f"{task}_accuracy": mean(values) for task, values in details["correct"].items()}
            write(file, result(f"study, tasks of {name}", rounded(metrics), details))
            show(f"{name}: {rounded(metrics)}")
        return details

    def train(self) -> dict[str, float]:
        """Train the chosen arms, one after another."""
        metrics: dict[str, float] = {}
        for name, arm in self.chosen.items():
            for seed in self.options.seed:
                curve = self._train(name, arm, seed)
                for domain, loss in curve[-1]["loss"].items():
                    metrics[f"{slug(name)}_seed{seed}_{domain}_loss"] = loss
        return metrics

    def _train(self, name: str, arm: Arm, seed: int) -> list[dict[str, Any]]:
        options = self.options
        file = self.out / f"train-{slug(name)}-{options.steps}x{options.rows}-seed{seed}.json"
        known = details_of(file)
        if known is not None and known["is_finished"]:
            done: list[dict[str, Any]] = known["curve"]
            return done
        model, settings = make(options.donor, arm, self.texts, seed), self._settings(arm, seed)
        with tempfile.TemporaryDirectory() as folder:
            data = self.texts.training_data(
                Path(folder),
                rows=options.rows,
                source_length=SOURCE_LENGTH,
                target_length=TARGET_LENGTH,
                seed=seed,
                **arm.data,
            )
            teacher = self._teacher(arm, model)
            loader, _ = build_loaders(data, model, teaching=None if teacher is None else teacher.teaching)
            curve = Curve(model, self.meter, file, name, arm, options)
            taught = {} if teacher is None else {"teacher": teacher.teacher, "matching": teacher.matching}
            fit(model, loader, None, settings, Path(folder) / "run", [curve], **taught)
        return curve.points

    def _teacher(self, arm: Arm, student: EncoderDecoder) -> Distillation | None:
        if arm.distillation is None:
            return None
        return open_distillation(
            DistillationConfig(teacher=self.options.donor, **arm.distillation),
            student,
            pad_multiple=DataConfig.model_fields["pad_multiple"].default,
            max_raw_length=SOURCE_LENGTH + TARGET_LENGTH,
            precision=self.options.precision,
            device=next(student.parameters()).device,
        )

    def _settings(self, arm: Arm, seed: int) -> TrainSettings:
        options, opening = self.options, arm.opening
        if opening is not None:
            opening = {**opening, "steps": max(1, round(opening["steps"] * options.steps))}
        return TrainSettings(
            steps=options.steps,
            optimizer=OptimizerConfig(learning_rate=arm.learning_rate),
            schedule=ScheduleConfig(warmup_steps=max(1, options.steps // 20), decay="constant"),
            precision=options.precision,
            opening=opening,
            cross_attention_warmup_steps=round(arm.cross_warmup * options.steps),
            seed=seed,
            tensorboard=False,
            device=options.device,
        )

    def tune(self) -> dict[str, float]:
        """Fine-tune the chosen arms on each group; held-out loss and, paired, its distance to the control's."""
        metrics: dict[str, float] = {}
        for name in self.options.group:
            for seed in self.options.seed:
                control = self._tune("control", name, seed)
                for arm in self.chosen:
                    found = self._tune(arm, name, seed)
                    file = self._tune_file(arm, name, seed)
                    start = f"{slug(arm)}_{name}_seed{seed}"
                    for what in sorted({"loss", "correct"} & set(found["after"])):
                        above = differences(found["after"][what], control["after"][what], file)
                        metrics[f"{start}_{what}"] = mean(found["after"][what])
                        metrics[f"{start}_{what}_above_control"] = mean(above)
                        metrics[f"{start}_{what}_noise"] = noise(above)
        return metrics

    def _tune_file(self, arm: str, group: str, seed: int) -> Path:
        return self.out / f"tune-{group}-{slug(arm)}-{self.options.steps}-seed{seed}.json"

    def _tune(self, name: str, group_name: str, seed: int) -> dict[str, Any]:
        file = self._tune_file(name, group_name, seed)
        known = details_of(file)
        if known is not None:
            return known
        arm, group, data = self.arms[name], GROUPS[group_name], self.texts.folder
        records = held_out(group, data, self.options.examples)
        model = make(self.options.donor, arm, self.texts, seed)
        before = measure(model, group, records)
        watch = tune(model, group, data, self._settings(arm, seed))
        after = measure(model, group, records)
        details = {
            "arm": name,
            "says": arm.says,
            "group": group_name,
            "learning_rate": arm.learning_rate,
            "precision": self.options.precision,
            "tokens": watch.tokens,
            "seconds": round(watch.seconds, 1),
            "before": before,
            "after": after,
        }
        metrics = {f"{what}_before": mean(values) for what, values in before.items()}
        metrics |= {f"{what}_after": mean(values) for what, values in after.items()}
        write(file, result(f"study, fine-tuning of {name}", rounded(metrics), details))
        show(f"{name}, {group_name}, {watch.tokens:,} tokens, {watch.seconds:.0f} s: {rounded(metrics)}")
        return details


class Curve(Callback):
    """Measures at the beginning, now and then, and at the end; the file is written anew each time."""

    def __init__(
        self,
        model: EncoderDecoder,
        meter: Meter,
        file: Path,
        name: str,
        arm: Arm,
        options: argparse.Namespace,
    ) -> None:
        self._model, self._meter, self._file, self._name, self._arm = model, meter, file, name, arm
        self._options = options
        self.points: list[dict[str, Any]] = []
        self._tokens, self._seconds = 0, 0.0
        self._measure(0)

    def on_step(self, step: int, result: StepResult) -> None:
        self._tokens += result.real_tokens
        self._seconds += result.seconds
        if step % self._options.measure_every == 0 or step == self._options.steps:
            self._measure(step)

    def _measure(self, step: int) -> None:
        losses = self._meter.by_piece(self._model)
        point = {
            "step": step,
            "tokens": self._tokens,
            "seconds": round(self._seconds, 1),
            "loss": {domain: mean(values) for domain, values in losses.items()},
        }
        self.points.append(point)
        details = {
            "arm": self._name,
            "says": self._arm.says,
            "learning_rate": self._arm.learning_rate,
            "donor": Path(self._options.donor).name,
            "precision": self._options.precision,
            "is_finished": step == self._options.steps,
            "stitch": (self._model.adaptation or {}).get("stitch"),
            "curve": self.points,
        }
        metrics = {f"{domain}_loss": value for domain, value in point["loss"].items()}
        write(self._file, result(f"study, training of {self._name}", rounded(metrics), details))
        show(f"{self._name}, step {step}, {self._tokens:,} tokens, {self._seconds:.0f} s: {rounded(metrics)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("donor", nargs="?", help="folder, hub name or GGUF file of a decoder-only model")
    parser.add_argument("--decoder", help="a donor of the decoder, of another width; adds arms of pairs")
    parser.add_argument("--part", choices=["start", "tasks", "train", "tune", "figures"], required=True)
    parser.add_argument("--arm", action="append", default=[], help="only this one; may be repeated")
    parser.add_argument("--seed", action="append", type=int, default=[], help="may be repeated; default 0")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=4, help="examples of 128 + 128 tokens in a step")
    parser.add_argument("--measure-every", type=int, default=25)
    parser.add_argument("--pieces", type=int, default=24, help="measured, of each domain")
    parser.add_argument("--task", action="append", choices=TASKS, default=[], help="may be repeated")
    parser.add_argument("--group", action="append", choices=GROUPS, default=[], help="may be repeated")
    parser.add_argument("--examples", type=int, default=200, help="of each task or group")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="folder of the donor's results")
    options = parser.parse_args()
    options.seed, options.task = options.seed or [0], options.task or list(TASKS)
    options.group = options.group or list(GROUPS)
    if options.part == "figures":
        from benchmarks.study.figures import draw

        metrics, details = draw(options.out)
        publish(result("study, figures", rounded(metrics), details), None)
        return
    if options.donor is None:
        parser.error(f"--part {options.part} needs a donor")
    if "TWOFOLD_DATA" not in os.environ:
        parser.error("set TWOFOLD_DATA to the folder that holds corpora/")
    warnings.filterwarnings("ignore", message=".*held-out.*")
    study = Study(options)
    metrics = {"start": study.start, "tasks": study.tasks, "train": study.train, "tune": study.tune}[
        options.part
    ]()
    publish(result(f"study, {options.part}", rounded(metrics), {"arms": list(study.chosen)}), None)


if __name__ == "__main__":
    main()
