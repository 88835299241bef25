"""What an answer costs to decode: weights read for each token and seconds, against the layers of the decoder.

    python -m benchmarks.study.decoding DONOR --keep 30 --keep 15 --keep 10 --keep 7 --out FILE

One prompt, greedy, the plain generator with its cache, float32. Layers are taken at equal distances and nothing is
trained: what such a decoder writes is another matter (`--part tune`), what it costs is not.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import twofold
from benchmarks.common import publish, result
from benchmarks.study.arms import evenly
from benchmarks.study.results import rounded
from twofold.adapt.depth import cut_decoder
from twofold.infer.generate import generate
from twofold.models import EncoderDecoder


def bytes_per_token(model: EncoderDecoder) -> int:
    """Weights that one decoding step reads: the decoder's layers and norm, and the head. Of the embedding table it
    reads a row only, but a tied head is the table."""
    decoder = model.decoder
    read = [*decoder.layers.parameters(), *decoder.norm.parameters(), *model.lm_head.parameters()]
    return sum(p.numel() * p.element_size() for p in read)


def seconds(model: EncoderDecoder, source: list[int], prefix: list[int], new_tokens: int) -> float:
    """To read the source and write so many tokens; no stop token ends it before."""
    start = time.perf_counter()
    generate(model, [source], [prefix], max_new_tokens=new_tokens, stop_token_ids=())
    return time.perf_counter() - start


def measure(model: EncoderDecoder, source_length: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds to the first token and for each further one; all repeats."""
    ids = torch.randint(
        100, 10_000, (source_length + 1,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    source, prefix = ids[:-1], ids[-1:]
    seconds(model, source, prefix, 2)
    first = [seconds(model, source, prefix, 1) for _ in range(repeats)]
    whole = [seconds(model, source, prefix, new_tokens) for _ in range(repeats)]
    each = [(w - min(first)) / (new_tokens - 1) for w in whole]
    return {"first_token": first, "each_token": each, "bytes_per_token": bytes_per_token(model)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("donor")
    parser.add_argument("--keep", action="append", type=int, required=True, help="decoder layers")
    parser.add_argument("--source-length", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=33)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    pair = twofold.adapt(options.donor, start="lossless", encoder_mask="sink", dtype=torch.float32)
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {"threads": torch.get_num_threads(), "source_length": options.source_length}
    for keep in options.keep:
        cut = cut_decoder(pair, evenly(keep, pair.config.decoder.num_hidden_layers))
        found = measure(cut, options.source_length, options.new_tokens, options.repeats)
        details[f"decoder {keep}"] = found
        metrics[f"decoder_{keep}_mb_per_token"] = found["bytes_per_token"] / 1e6
        # The least disturbed of the repeats: other work only ever adds to them.
        metrics[f"decoder_{keep}_first_token_ms"] = 1e3 * min(found["first_token"])
        metrics[f"decoder_{keep}_each_token_ms"] = 1e3 * min(found["each_token"])
    publish(result("study, cost of decoding", rounded(metrics), details), options.out)


if __name__ == "__main__":
    main()
