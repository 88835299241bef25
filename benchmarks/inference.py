"""Inference measured: ours against transformers and CTranslate2, on the same weights and token ids.

    python benchmarks/inference.py --core --runs 3 --work WORK --out benchmarks/results/inference.json
    python benchmarks/inference.py --work WORK --out benchmarks/results/inference.json
    python benchmarks/inference.py --quick

The first is the core set: 49,152 words, 512 tokens read and 64 written, batches of 1 and 8, speed alone, all systems
but transformers' compiled float32. Going by its FLOPs and bytes that is 10 to 15 minutes on two idle cores, or 20 with
5 runs, the default. The second goes on from there to everything, which takes hours: results are written as they come,
and what is in the file is not run again (`--again` does). `--model`, `--part`, `--case`, `--batch` and `--system`
choose. The last line printed is one JSON object with flat `metrics`; what could not be measured is null there, and
`details.not_available` says why.

Fair, because:
- All load the same T5Gemma file (B-B shapes, random weights scaled so that both soft-caps bend what they cap) and read
  the same random token ids; end tokens are disabled, so that all write exactly the tokens asked for, greedily.
- Before anything is timed, greedy tokens and log-probabilities of ours in float32 must be those of transformers in
  float32 (eager attention), or the benchmark stops. `details.checks` says how far each other system agrees.
- CTranslate2's converter for T5Gemma leaves out both soft-caps, so it does less work and computes another function.
- Each system lives in a process of its own with the same number of threads, and waits idle while another works: run i
  of all systems comes before run i + 1 of any. Where memory is too short for that, one is run without the others.
- Figures are medians; details have every run, min and max. The clock starts at token ids and ends at token ids.
  `first_token` is the time until every row has its first token, `decode` the later tokens over the time after that.
- Memory is the largest resident set of the process during the run, weights included.

Ratios pair equal precisions: int8 with CTranslate2's int8, bfloat16 with the fastest of transformers' bfloat16 settings
(as it comes; static cache with torch.compile). `decode_b1_share_of_bandwidth` is ours in int8: bytes of decoder, head,
keys and values, over what a plain sum reads per second on as many threads; others have their name behind it.

Parts: `speed` is the above. `modes`: beam search with 4 beams and sampling at 8 rows, in steps per second over
greedy's; where no precision is named, the lowest of ours. `load`: requests that arrive at random (Poisson, `--rate`),
32 to 1024 tokens read and 8 to 128 written, log-uniform, at most 8 decoded together. Ours lets them join and leave at
every step; transformers gets what has arrived in batches of up to 8, which end with their longest answer; CTranslate2
gets all that has arrived and makes its own batches of up to 8, whose rows end at their lengths.

Models: `b_b_49k` and `b_b_256k` (words in the vocabulary), and `smollm2`: SmolLM2-135M adapted losslessly with a causal
encoder, so that it writes what its decoder-only donor writes in transformers. That is for information: nothing else
runs the pair.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import commit, publish, result
from inference_cases import MODELS, Folders, Lengths, Load, donor_file, prepare, read_bandwidth
from inference_contenders import LOAD_ROWS, MODES, OPTIONAL, SYSTEMS
from inference_figures import agreement, compare_exact, load_summary, metrics
from inference_worker import Apart, Failed, Local, Workers

PARTS = ("speed", "modes", "load")
CASES = ("512/64", "2048/128")
BATCHES = (1, 8, 32)
CHECKED_SOURCES, CHECKED_NEW = (37, 120, 300), 16
MODES_LENGTHS, MODES_ROWS = Lengths(128, 64), 8
PAUSE_S = 0.3
"""Between systems: threads of the last one spin for a while before they sleep."""


class Case(NamedTuple):
    """What all systems do in turns."""

    model: str
    part: str
    rows: int
    lengths: Lengths

    @property
    def name(self) -> str:
        if self.part == "load":
            return f"{self.model} load"
        return f"{self.model} {self.part} {self.lengths.source}/{self.lengths.new} batch {self.rows}"

    def command(self, what: str, mode: str, **more: Any) -> dict[str, Any]:
        """For a worker."""
        return {"do": what, "rows": self.rows, **self.lengths._asdict(), "mode": mode, **more}


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        Benchmark(options, work).run()


class Benchmark:
    """Models one after another, systems of a model in turns."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self._options, self._work = options, work
        known = json.loads(options.out.read_text())["details"] if options.out and options.out.exists() else {}
        self.details: dict[str, Any] = {"checks": {}, "facts": {}, "cases": {}} | known
        self.details["threads"] = options.threads
        self.details["ctranslate2"] = (
            "its converter for T5Gemma leaves out both soft-caps: not the same function"
        )
        self.details["read_bytes_per_s"] = read_bandwidth(options.threads, options.bandwidth_bytes)

    def run(self) -> None:
        """Measure, write, print."""
        for model in self._options.model:
            self._model(model)
        publish(self._report(), self._options.out)

    def _model(self, model: str) -> None:
        systems = [name for name in self._options.system if fits(name, model)]
        reference = "donor_float32" if MODELS[model].shape is None else "transformers_float32"
        needed = list(dict.fromkeys(["ours_float32", reference, *systems]))
        folders = prepare(
            model, self._work, for_ctranslate2=any(SYSTEMS[name].kind == "ctranslate2" for name in needed)
        )
        self.details["facts"][model] = json.loads(folders.facts.read_text())
        specs = {name: self._spec(name, model, folders) for name in needed}
        workers = Workers(specs, Local if self._options.quick else Apart, self._options.timeout)
        try:
            self._check(model, needed, reference, workers)
            for case in cases(self._options, model):
                self._case(case, systems, workers)
        finally:
            workers.close()

    def _spec(self, name: str, model: str, folders: Folders) -> dict[str, Any]:
        is_donor = SYSTEMS[name].kind == "donor"
        return {
            "system": name,
            "vocab_size": MODELS[model].vocab_size,
            "pair": str(folders.pair),
            "ctranslate2": str(folders.ctranslate2),
            "donor": str(donor_file()) if is_donor else None,
            "threads": self._options.threads,
            "batch_size": max(*self._options.batch, LOAD_ROWS, MODES_ROWS),
        }

    def _check(self, model: str, systems: Sequence[str], reference: str, workers: Workers) -> None:
        """Compare what systems write, before anything is timed."""
        command = {"do": "check", "sources": CHECKED_SOURCES, "new": CHECKED_NEW}
        found: dict[str, Any] = {}
        # Compiling takes minutes for every new length, and changes nothing that a check could see.
        for name in (name for name in systems if not SYSTEMS[name].compiles):
            try:
                found[name] = workers.ask(name, command)
            except Failed as error:
                found[name] = {"failed": str(error)}
            self._say(f"{model}, check of {name}: {found[name].get('failed', 'done')}")
        for name in (reference, "ours_float32"):
            if "failed" in found[name]:
                raise RuntimeError(
                    f"{name} cannot be checked, so nothing can be compared: {found[name]['failed']}"
                )
        wanted = found[reference]
        self.details["checks"][model] = {
            "reference": reference,
            "ours_float32": compare_exact(found["ours_float32"], wanted),
            "tokens_before_first_difference": {
                name: one.get("failed") or agreement(one["tokens"], wanted["tokens"])
                for name, one in found.items()
            },
            "commit": commit(),
        }

    def _case(self, case: Case, systems: Sequence[str], workers: Workers) -> None:
        about = {"model": case.model, "part": case.part, "rows": case.rows, **case.lengths._asdict()}
        entries = self.details["cases"].setdefault(case.name, about | {"entries": {}})["entries"]
        contestants = [(name, "greedy", name) for name in systems]
        if case.part == "modes":
            ours = [name for name in systems if SYSTEMS[name].kind == "ours"]
            contestants = [(name, mode, f"{name} {mode}") for name in ours for mode in MODES]
        for _, _, label in contestants:
            if self._options.again or "failed" in entries.get(label, {}):
                entries.pop(label, None)
        for run in range(1 if case.part == "load" else self._options.runs):
            for name, mode, label in contestants:
                entry = entries.setdefault(label, {"runs": []})
                if "failed" in entry or len(entry["runs"]) > run:
                    continue
                try:
                    entry["runs"].append(self._run(case, name, mode, entry, workers, run))
                    entry["commit"] = commit()
                except Failed as error:
                    entries[label] = {"failed": str(error)}
                self._say(f"{case.name}, {label}, run {run}: {describe(entries[label])}")
                self._save()

    def _run(
        self, case: Case, name: str, mode: str, entry: dict[str, Any], workers: Workers, run: int
    ) -> dict[str, Any]:
        if not self._options.quick:
            time.sleep(PAUSE_S)
        if case.part == "load":
            load = self._options.load
            workers.warm(name, Case(case.model, "speed", 1, Lengths(64, 8)).command("warm", mode))
            answer = workers.ask(name, {"do": "serve", **load._asdict()})
            arrivals = load.arrivals()
            return {**answer, **load._asdict(), "summary": load_summary(arrivals, answer["done_s"])}
        entry |= workers.warm(name, case.command("warm", mode))
        return workers.ask(name, case.command("run", mode, seed=run))

    def _report(self) -> dict[str, Any]:
        figures, reasons = metrics(self.details)
        rounded = {
            name: None if value is None else float(f"{value:.4g}") for name, value in figures.items()
        } | {"read_gb_per_s": round(self.details["read_bytes_per_s"] / 1e9, 2)}
        self.details["not_available"] = reasons
        return result("inference", rounded, self.details)  # type: ignore[arg-type]

    def _save(self) -> None:
        out = self._options.out
        if out is None:
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(self._report(), indent=1) + "\n")
        partial.replace(out)

    def _say(self, message: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def describe(entry: dict[str, Any]) -> str:
    """One line."""
    if "failed" in entry:
        return f"not available: {entry['failed']}"
    last = entry["runs"][-1]
    if "summary" in last:
        return ", ".join(f"{key} {value:.3g}" for key, value in last["summary"].items())
    return f"first {last['first_s']:.3f} s, all {last['total_s']:.3f} s"


def cases(options: argparse.Namespace, model: str) -> list[Case]:
    """In the order they are run."""
    found = []
    if "speed" in options.part:
        found += [Case(model, "speed", rows, lengths) for lengths in options.case for rows in options.batch]
    if "modes" in options.part:
        found.append(Case(model, "modes", MODES_ROWS, Lengths(64, 8) if options.quick else MODES_LENGTHS))
    if "load" in options.part:
        found.append(Case(model, "load", LOAD_ROWS, Lengths(options.load.sources[1], options.load.news[1])))
    return found


def fits(system: str, model: str) -> bool:
    """Whether a system can run a model: only ours runs an adapted pair, only transformers its donor."""
    kind = SYSTEMS[system].kind
    return kind == "ours" or (kind == "donor") == (MODELS[model].shape is None)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several: dict[str, Any] = {"action": "append"}
    parser.add_argument("--quick", action="store_true", help="a tiny model in this process, under a minute")
    parser.add_argument(
        "--core", action="store_true", help="b_b_49k, 512/64, batches 1 and 8; parts speed, modes"
    )
    parser.add_argument("--model", choices=list(MODELS), help="may be repeated", **several)
    parser.add_argument("--part", choices=PARTS, help="may be repeated", **several)
    parser.add_argument(
        "--case", type=lengths_of, help="READ/WRITTEN tokens, such as 512/64; may be repeated", **several
    )
    parser.add_argument("--batch", type=int, help="rows; may be repeated", **several)
    parser.add_argument("--system", choices=list(SYSTEMS), help="may be repeated", **several)
    parser.add_argument("--runs", type=int, help="of each system and case; default 5, quick: 2")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every system")
    parser.add_argument("--rate", type=float, default=1.0, help="of the load: requests a second")
    parser.add_argument("--requests", type=int, default=40, help="of the load")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds, of one command to one system")
    parser.add_argument("--work", type=Path, help="folder for models (9 GB), kept; default: a temporary one")
    parser.add_argument("--out", type=Path, help="file to read what is done from, and to write to")
    parser.add_argument("--again", action="store_true", help="measure again what is in the file")
    options = parser.parse_args(arguments)
    quick, core = options.quick, options.core
    options.model = options.model or (
        ["tiny"] if quick else ["b_b_49k"] if core else [m for m in MODELS if m != "tiny"]
    )
    options.part = options.part or (["speed"] if core else list(PARTS))
    options.case = options.case or [
        lengths_of(t) for t in (["64/8"] if quick else CASES[:1] if core else CASES)
    ]
    options.batch = options.batch or ([1, 2] if quick else [1, 8] if core else list(BATCHES))
    compiled = [name for name in SYSTEMS if SYSTEMS[name].compiles]
    slow = compiled if quick else ["transformers_float32_compiled"] if core else []
    options.system = options.system or [name for name in SYSTEMS if name not in (*OPTIONAL, *slow)]
    options.runs = options.runs or (2 if quick else 5)
    options.load = (
        Load(20.0, 6, sources=(8, 64), news=(2, 8)) if quick else Load(options.rate, options.requests)
    )
    options.bandwidth_bytes = 1 << (26 if quick else 30)
    for name in ("runs", "threads", "requests"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if min(options.batch) < 1 or options.rate <= 0:
        parser.error("--batch must be at least 1 and --rate above 0")
    return options


def lengths_of(text: str) -> Lengths:
    """512/64."""
    source, _, new = text.partition("/")
    if not (source.isdigit() and new.isdigit() and int(source) > 1 and int(new) > 1):
        raise argparse.ArgumentTypeError(
            f"need READ/WRITTEN tokens of 2 or more each, such as 512/64, got {text!r}"
        )
    return Lengths(int(source), int(new))


if __name__ == "__main__":
    main()
