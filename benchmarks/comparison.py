"""Is the pair better than the decoder-only model at the same cost? SmolLM2-135M-Instruct, before and after tuning.

    TWOFOLD_DATA=/path/to/data python benchmarks/comparison.py DONOR --work runs/comparison [--quick] [--out FOLDER]

Models: the donor itself, the pair that `twofold adapt` makes of it by default, one with 20 of its 30 decoder layers and
one with 15 of its 30 encoder layers. All are evaluated, tuned by one recipe (`recipes/smollm2-three-tasks.yaml`: the
same examples in the same order), and evaluated again, on held-out examples of three tasks: summaries (SciTLDR,
ROUGE-L), answers from a text (SQuAD, F1), sentiment (SST-2, accuracy). Training examples: SciTLDR's training part;
AdversarialQA, Quoref and DuoRC, Amazon's and Yelp's reviews from P3, brought into the wording that is evaluated.

Every step leaves its files in `--work`; one that was stopped goes on there. `--quick` trains two steps and evaluates a
few examples, to see that everything runs: minutes, since models are made and timed all the same. `--out` gets the
report: index.html, pictures, frontier.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import publish, result

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("scitldr", "squad", "sst2")

ADAPT: Mapping[str, Mapping[str, Any]] = {
    "donor": {"start": "lossless", "encoder_mask": "causal", "tie_stacks": True},
    "pair-30-30": {},
    "pair-30-20": {"decoder_depth": 20},
    "pair-15-30": {"encoder_layers": list(range(1, 30, 2))},
}
"""`twofold adapt`'s arguments. The first is the donor as it is: one causal stack."""

Pair = tuple[str, str]
"""Prompt and completion."""


def lines(file: Path) -> Iterator[Any]:
    """Records of a gzipped JSON lines file."""
    with gzip.open(file, "rt", encoding="utf-8") as text:
        for line in text:
            yield json.loads(line)


def summaries(data: Path) -> Iterator[Pair]:
    """SciTLDR: abstract, and its first summary."""
    for record in lines(data / "summarization/scitldr-a-train.jsonl.gz"):
        text = " ".join(record["source"])
        yield f"{text}\n\nSummarize the text in one sentence.\nSummary:", record["target"][0]


ANSWERS = {
    "adversarial_qa_": r'Question: "(?P<question>.*)"\n\nContext: "(?P<text>.*)"\n\nAnswer:',
    "quoref_": r"(?P<question>.*?)\n\nAnswer the above question based on the context below:\n\n(?P<text>.*)",
    "duorc_SelfRC_": r"Question: (?P<question>.*?)\nIf there is no answer.*?\nContext: (?P<text>.*)",
}
"""How names of P3's templates begin, and how the prompts of one of them hold question and text."""


def answers(data: Path) -> Iterator[Pair]:
    """Questions about a text, whose answers are a few of its words."""
    for record in lines(data / "instructions/p3.jsonl.gz"):
        for name, pattern in ANSWERS.items():
            if not record["template"].startswith(name):
                continue
            found = re.fullmatch(pattern, record["prompt"].strip(), re.DOTALL)
            if found and record["completion"] in found["text"]:
                question, text = found["question"].strip(), found["text"].strip()
                yield f"Background: {text}\nQuestion: {question}\nAnswer:", record["completion"]


def sentiment(data: Path) -> Iterator[Pair]:
    """Reviews and what they say of a thing; Yelp's of three stars are left out."""
    stars = {"5 stars": "positive", "4 stars": "positive", "2 stars": "negative", "1 star": "negative"}
    for record in lines(data / "instructions/p3.jsonl.gz"):
        prompt, completion = record["prompt"].strip(), record["completion"]
        if record["template"] == "amazon_polarity_Is_this_review":
            text = prompt.partition("\nReview: ")[2].removesuffix("\nIs the review positive or negative?")
            label: str | None = completion.lower()
        elif record["template"] == "yelp_review_full_format_rating":
            text = prompt.removeprefix("Review text:\n").removesuffix("\n\nReview rating:")
            label = stars.get(completion)
        else:
            continue
        if label is not None:
            yield f"{text}\nQuestion: Is this sentence positive or negative?\nAnswer:", label


def prepare(data: Path, folder: Path) -> dict[str, int]:
    """Write the training files, each example once, and count them."""
    counts = {}
    folder.mkdir(parents=True, exist_ok=True)
    for make in (summaries, answers, sentiment):
        pairs = dict.fromkeys(make(data))
        records = [json.dumps({"prompt": prompt, "completion": text}) for prompt, text in pairs]
        (folder / f"{make.__name__}.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
        counts[make.__name__] = len(records)
    return counts


def run(*arguments: str) -> None:
    """One command of `twofold`, whose output is seen; what it exits with ends this script."""
    print("$ twofold " + " ".join(arguments), flush=True)
    command = [sys.executable, "-m", "twofold.cli", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def adapt(donor: str, choices: Mapping[str, Any], out: Path) -> None:
    """A model before tuning, in a folder."""
    if not out.exists():
        import torch

        import twofold

        twofold.save(twofold.adapt(donor, dtype=torch.float32, **choices), out)


def tune(model: Path, files: Path, out: Path, steps: int | None) -> Path:
    """The model after tuning."""
    if not (out / "model").exists():
        overrides = [f"model={{path: {model}}}", f"output={out}"]
        for n, name in enumerate(("summaries", "answers", "sentiment")):
            overrides.append(f"data.sources.{n}.path={files / name}.jsonl")
        overrides += [] if steps is None else [f"steps={steps}", f"schedule.warmup_steps={min(4, steps - 1)}"]
        resume = ["--resume"] if out.exists() else []
        run("train", "recipes/smollm2-three-tasks.yaml", *overrides, *resume)
    return out / "model"


def compare(models: Mapping[str, Path], report: Path, data: Path, *, limit: int) -> None:
    """Evaluate and time all models; one report."""
    baseline = "donor-tuned" if "donor-tuned" in models else next(iter(models))
    named = [f"{name}={path}" for name, path in models.items()]
    asked = ["--tasks", ",".join(TASKS), "--data", str(data), "--limit", str(limit), "--chat"]
    run("frontier", *named, "--out", str(report), *asked, "--baseline", baseline)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("donor", help="SmolLM2-135M-Instruct: folder, hub name or GGUF file")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for models and whatever is in between"
    )
    parser.add_argument("--out", type=Path, help="folder of the report; default: WORK/report")
    parser.add_argument("--only", action="append", choices=ADAPT, help="model; may be repeated; default: all")
    parser.add_argument("--limit", type=int, default=100, help="examples of each task")
    parser.add_argument("--train-only", action="store_true", help="stop before anything is evaluated")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if "TWOFOLD_DATA" not in os.environ:
        parser.error("set TWOFOLD_DATA to the folder of the data sets")
    data, work = Path(os.environ["TWOFOLD_DATA"]), options.work.resolve()
    prepare(data, work / "data/three-tasks")
    models: dict[str, Path] = {}
    for name in options.only or ADAPT:
        models[name] = work / "models" / name
        adapt(options.donor, ADAPT[name], models[name])
    for name in list(models):
        models[f"{name}-tuned"] = tune(
            models[name], work / "data/three-tasks", work / "runs" / name, 2 if options.quick else None
        )
    if options.train_only:
        return
    report = options.out or work / "report"
    compare(models, report, data, limit=4 if options.quick else options.limit)
    found = json.loads((report / "frontier.json").read_text(encoding="utf-8"))
    scores = {f"{entry['name']}_score": entry["score"]["value"] for entry in found["entries"]}
    publish(result("comparison", scores, {"report": str(report / "index.html")}), None)


if __name__ == "__main__":
    main()
