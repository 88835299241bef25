"""What prompt lookup saves: SmolLM2-135M, adapted, answering one request at a time with and without guesses.

    TWOFOLD_DATA=/path/to/data python benchmarks/lookup.py [--quick] [--out benchmarks/results/lookup.json]

Three tasks on abstracts of SciTLDR: `summarise`, `extract` (copy sentences) and `edit` (correct what was misspelt on
purpose); and `question`, self-instruct seed tasks without an input, whose answers have nothing to repeat. Every prompt
is answered greedily, by turns with and without `lookup`; `equal_share` is the share of prompts whose answers are the
same, token for token. Times are those of the backend: encoding, and steps. `--quick` takes one prompt a task and short
answers.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from adapt import require_smollm2
from common import publish, result
from torch import Tensor
from training_cases import data_file

import twofold
from twofold.infer import Engine, Request
from twofold.infer.backends import Held, Start, TorchBackend
from twofold.models import EncoderDecoder

PROMPTS, PROMPTS_QUICK = 4, 1
NEW_TOKENS, NEW_TOKENS_QUICK = 96, 24


@dataclass(slots=True)
class Counts:
    """What the backend did for some requests."""

    tokens: int = 0
    """New tokens, without the first of each request, which comes with the encoding."""
    steps: int = 0
    """Verifications among them."""
    verifications: int = 0
    guessed: int = 0
    encode_s: float = 0.0
    decode_s: float = 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return self.tokens / self.decode_s

    @property
    def total_tokens_per_s(self) -> float:
        """Encoding included."""
        return self.tokens / (self.encode_s + self.decode_s)

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class TimedBackend(TorchBackend):
    """Counts and times what it is asked for, on devices where calls return when they are done."""

    def __init__(self, model: EncoderDecoder) -> None:
        super().__init__(model)
        self.counts = Counts()

    def start(self, starts: Sequence[Start]) -> list[tuple[Held, Tensor]]:
        started = time.perf_counter()
        found = super().start(starts)
        self.counts.encode_s += time.perf_counter() - started
        return found

    def step(self, held: Sequence[Held], tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        started = time.perf_counter()
        found = super().step(held, tokens)
        self.counts += Counts(steps=1, decode_s=time.perf_counter() - started)
        return found

    def verify(self, held: Held, tokens: Sequence[int]) -> Tensor:
        started = time.perf_counter()
        found = super().verify(held, tokens)
        seconds = time.perf_counter() - started
        self.counts += Counts(steps=1, verifications=1, guessed=len(tokens) - 1, decode_s=seconds)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one prompt a task: about a minute")
    parser.add_argument("--lookup", type=int, default=10, help="tokens guessed at a time, at most")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own choice")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    donor = require_smollm2()

    n_prompts = PROMPTS_QUICK if options.quick else PROMPTS
    n_new = NEW_TOKENS_QUICK if options.quick else NEW_TOKENS
    engine = Engine(twofold.adapt(donor), device="cpu")
    backend = TimedBackend(engine.model)
    engine.loop.backend = backend
    answer(engine, backend, "Hello", n_new=4, lookup=0)  # the first call pays for what is made once

    metrics: dict[str, float] = {}
    details: dict[str, Any] = {"lookup": options.lookup, "threads": torch.get_num_threads(), "tasks": {}}
    for task, prompts in tasks(n_prompts).items():
        plain, guessing, n_equal = Counts(), Counts(), 0
        for prompt in prompts:
            expected, counts = answer(engine, backend, prompt, n_new=n_new, lookup=0)
            plain += counts
            found, counts = answer(engine, backend, prompt, n_new=n_new, lookup=options.lookup)
            guessing += counts
            n_equal += found == expected
        metrics |= {f"{task}_{name}": round(value, 3) for name, value in compared(plain, guessing).items()}
        metrics[f"{task}_equal_share"] = round(n_equal / len(prompts), 3)
        details["tasks"][task] = {"prompts": len(prompts)} | {
            name: {f.name: round(getattr(counts, f.name), 2) for f in fields(counts)}
            for name, counts in (("plain", plain), ("guessing", guessing))
        }
    publish(result("lookup", metrics, details), options.out)


def tasks(n_prompts: int) -> dict[str, list[str]]:
    """Prompts by task; the texts of no two tasks are the same."""
    with gzip.open(data_file("summarization/scitldr-a-dev.jsonl.gz"), "rt", encoding="utf-8") as lines:
        abstracts = [" ".join(json.loads(next(lines))["source"]) for _ in range(3 * n_prompts)]
    with gzip.open(
        data_file("instructions/self_instruct_seed_tasks.jsonl.gz"), "rt", encoding="utf-8"
    ) as lines:
        seeds = [json.loads(line) for line in lines]
    questions = [seed["instruction"] for seed in seeds if not seed["instances"][0]["input"]]
    instructions = {
        "summarise": "Summarise the following text in three sentences.",
        "extract": "Copy the first three sentences of the following text, word for word.",
        "edit": "Correct the spelling of the following text. Change nothing else.",
    }
    found = {}
    for i, (task, instruction) in enumerate(instructions.items()):
        texts = abstracts[i * n_prompts : (i + 1) * n_prompts]
        if task == "edit":
            texts = [text.replace(" the ", " teh ").replace("tion ", "toin ") for text in texts]
        found[task] = [f"{instruction}\n\n{text}" for text in texts]
    return found | {"question": questions[:n_prompts]}


def answer(
    engine: Engine, backend: TimedBackend, prompt: str, *, n_new: int, lookup: int
) -> tuple[tuple[int, ...], Counts]:
    """The tokens of one answer, and what it took."""
    backend.counts = Counts()
    request = Request(prompt=[{"role": "user", "content": prompt}], max_new_tokens=n_new, lookup=lookup)
    (completion,) = engine.submit(request).result()
    return completion.token_ids, backend.counts + Counts(tokens=len(completion.token_ids) - 1)


def compared(plain: Counts, guessing: Counts) -> dict[str, float]:
    """Tokens per second with guesses over those without, and where the difference comes from."""
    right = guessing.tokens - guessing.steps
    return {
        "decode_speedup": guessing.decode_tokens_per_s / plain.decode_tokens_per_s,
        "total_speedup": guessing.total_tokens_per_s / plain.total_tokens_per_s,
        "tokens_per_step": guessing.tokens / guessing.steps,
        "right_per_verification": right / max(1, guessing.verifications),
        "right_share_of_guessed": right / max(1, guessing.guessed),
        "plain_decode_tokens_per_s": plain.decode_tokens_per_s,
        "decode_tokens_per_s": guessing.decode_tokens_per_s,
    }


if __name__ == "__main__":
    main()
