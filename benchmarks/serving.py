"""Serving measured: `twofold serve` under loads that rise, against the engine alone and against transformers.

    python benchmarks/serving.py --out benchmarks/results/serving.json
    python benchmarks/serving.py --soak 20 --out benchmarks/results/serving.json
    python benchmarks/serving.py --quick

The first takes about 40 minutes on two cores, the second as long as it says. The last line printed is one JSON object
with flat `metrics`; `--out` is read first, and keeps what is not measured again.

Open loop: requests arrive at random (Poisson) at each `--rate`, whether or not earlier ones have been answered, as
users do; times count from when a request was due. They read 32 to 1024 tokens and write 8 to 128, log-uniform, greedy,
streamed, without end tokens; all systems get the same ones, take turns, and have the same model (T5Gemma, B-B shapes,
random weights), precision and threads. A system that cannot keep up with a rate is spared the higher ones. A rate is
sustained if every request is answered and 95 of 100 have their first token within `--first-token-limit`. Then a flood:
all requests at once, which says what a system does at most.

- `server`: `twofold serve`, in a process of its own; the client shares the processor with it.
- `engine`: the same engine, called from Python in the same rhythm. `overhead_over_engine` is how much longer the server
  takes for the flood, HTTP, JSON and the client included.
- `transformers`, `transformers_batched`: `generate` behind the same API (`serving_peer.py`), one request at a time and
  in static batches.

The soak (`serving_soak.py`): 80% of the sustained rate, or `--soak-rate`, for so many minutes, with clients that leave,
that read slowly or never, bodies that are too large and requests that are wrong in all sorts of ways. It ends with an
error if a request is stuck, a well-formed one is neither answered nor refused with a reason, the server's memory grows
by more than 5%, or anything is left open in the server.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import command, commit, publish, result
from inference_cases import MODELS, Arrival, Load, prepare
from serving_figures import is_sustained, metrics, summary
from serving_soak import soak, soak_metrics
from serving_systems import NAMES, System, open_system

QUICK_LENGTHS = {"sources": (8, 64), "news": (2, 16)}


def main() -> None:
    options = parse_options()
    details = _known(options.out)
    with tempfile.TemporaryDirectory() as temporary:
        folders = prepare(options.model, options.work or Path(temporary), for_ctranslate2=False)
        spec = {
            "pair": str(folders.pair),
            "vocab_size": MODELS[options.model].vocab_size,
            "precision": options.precision,
            "rows": options.rows,
            "threads": options.threads,
            "apart": not options.quick,
        }
        settings = {name: spec[name] for name in ("precision", "rows", "threads")} | {
            "model": options.model,
            "first_token_limit_s": options.first_token_limit,
            "command": command(sys.orig_argv[1:]),  # of this part; the report's is that of the last
            "commit": commit(),
        }
        failures: list[str] = []
        if options.soak is None or options.quick:
            details |= {"settings": settings} | Benchmark(options, spec).run()
        if options.soak is not None:
            rate = options.soak_rate or 0.8 * details.get("sustained_rate", {}).get("server", 0.0)
            if not rate:
                raise SystemExit("the soak needs a rate: give --soak-rate, or --out with a sustained rate")
            found, failures = soak(spec, minutes=options.soak, rate=rate, lengths=options.lengths)
            details["soak"] = found | {"settings": settings}
    figures = (metrics(details) if "loads" in details else {}) | soak_metrics(details.get("soak"))
    publish(result("serving", figures, details), options.out)
    if failures:
        raise SystemExit("the soak failed: " + "; ".join(failures))


class Benchmark:
    """All systems, started once, in turns."""

    def __init__(self, options: argparse.Namespace, spec: dict[str, Any]) -> None:
        self._options, self._spec = options, spec
        self._loads: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self._sustained: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """Loads, the rates that were sustained, the flood."""
        systems: dict[str, System] = {}
        try:
            for name in self._options.system:
                systems[name] = open_system(name, self._spec)
                systems[name].offer(self._flood(2 * self._options.rows, seed=99))  # compiles, touches memory
            climbing = dict(systems)
            for rate in self._options.rate:
                climbing = self._climb(rate, climbing)
            flood = self._take_turns(systems, lambda run: self._flood(self._options.flood, seed=run), "flood")
        finally:
            for system in systems.values():
                system.close()
        return {"loads": self._loads, "sustained_rate": self._sustained, "flood": flood}

    def _climb(self, rate: float, systems: dict[str, System]) -> dict[str, System]:
        """One rate; returns those that kept up with it."""
        if not systems:
            return {}
        n = max(self._options.at_least, round(rate * self._options.seconds))
        found = self._take_turns(
            systems, lambda run: Load(rate, n, **self._options.lengths).arrivals(run), f"{rate:g}/s"
        )
        self._loads[f"{rate:g}"] = found
        kept = [n for n in systems if is_sustained(found[n], self._options.first_token_limit)]
        self._sustained |= dict.fromkeys(kept, rate)
        return {name: systems[name] for name in kept}

    def _take_turns(
        self, systems: dict[str, System], arrivals: Any, what: str
    ) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
        for run in range(self._options.runs):
            for name, system in systems.items():
                found[name].append(summary(system.offer(arrivals(run))))
                _say(f"{what}, {name}: {json.dumps(found[name][-1])}")
        return found

    def _flood(self, n: int, seed: int) -> list[Arrival]:
        """All at once, with lengths as in the loads."""
        return [one._replace(at_s=0.0) for one in Load(1.0, n, **self._options.lengths).arrivals(seed)]


def _known(out: Path | None) -> dict[str, Any]:
    """What the file has already."""
    if out is None or not out.exists():
        return {}
    known: dict[str, Any] = json.loads(out.read_text())["details"]
    return known


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model in this process, about a minute")
    parser.add_argument("--model", choices=[name for name in MODELS if name != "smollm2"])
    parser.add_argument("--precision", help="of all systems; default bfloat16, quick: float32")
    parser.add_argument("--rows", type=int, default=8, help="that are decoded together")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every system")
    parser.add_argument("--system", choices=NAMES, action="append", help="may be repeated; default: all")
    parser.add_argument("--rate", type=float, action="append", help="requests a second; may be repeated")
    parser.add_argument("--seconds", type=float, help="of arrivals at each rate")
    parser.add_argument("--at-least", type=int, help="requests at each rate")
    parser.add_argument("--flood", type=int, help="requests at once; default 64")
    parser.add_argument("--runs", type=int, help="of each load; default 3, quick: 1")
    parser.add_argument("--first-token-limit", type=float, default=5.0, help="seconds, of what is sustained")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="only the soak, unless --quick")
    parser.add_argument(
        "--soak-rate", type=float, help="requests a second; default: 80%% of what is sustained"
    )
    parser.add_argument("--work", type=Path, help="folder for the model, kept; default: a temporary one")
    parser.add_argument("--out", type=Path, help="file to read what is known from, and to write to")
    options = parser.parse_args(arguments)
    quick = options.quick
    options.model = options.model or ("tiny" if quick else "b_b_49k")
    options.precision = options.precision or ("float32" if quick else "bfloat16")
    options.system = options.system or list(NAMES)
    options.rate = sorted(options.rate or ([5.0, 20.0] if quick else [0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]))
    options.seconds = options.seconds or (3.0 if quick else 60.0)
    options.at_least = options.at_least or (10 if quick else 30)
    options.flood = options.flood or (16 if quick else 64)
    options.runs = options.runs or (1 if quick else 3)
    options.lengths = QUICK_LENGTHS if quick else {}
    if quick and options.soak is None:
        options.soak = 0.1
    for name in ("rows", "threads", "at_least", "flood", "runs", "seconds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if min(options.rate) <= 0 or (options.soak is not None and options.soak <= 0):
        parser.error("--rate and --soak must be above 0")
    return options


if __name__ == "__main__":
    main()
