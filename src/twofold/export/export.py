"""`export`: write a model for another program, run what was written, and keep it only if it agrees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twofold.checkpoint import new_folder
from twofold.export.agreement import (
    Written,
    expected_logprobs,
    in_float32,
    largest_difference,
    samples,
)
from twofold.export.ctranslate2 import write_ctranslate2
from twofold.export.openvino import write_openvino
from twofold.export.transformers import write_hf, write_t5gemma, write_t5gemma2
from twofold.models import EncoderDecoder

TOLERANCE = 1e-4
"""Largest difference of a token's log-probability, in nats, float32 against float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A program that a model can be written for."""

    description: str
    write: Callable[..., Written]
    """Takes the model, an empty folder, and options."""
    options: tuple[str, ...] = ()
    """Names of options."""


TARGETS: Mapping[str, Target] = {
    "t5gemma": Target(description="T5Gemma files, for transformers and others", write=write_t5gemma),
    "t5gemma2": Target(description="T5Gemma 2 files (text), for the same", write=write_t5gemma2),
    "hf": Target(description="any pair, for AutoModelForSeq2SeqLM once twofold is imported", write=write_hf),
    "ctranslate2": Target(
        description="a CTranslate2 model, where that is exact",
        write=write_ctranslate2,
        options=("quantization",),
    ),
    "openvino": Target(
        description="any pair, as two graphs that OpenVINO runs without twofold",
        write=write_openvino,
        options=("quantization",),
    ),
}
"""What `export` and `twofold export` know, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written, and how near it is."""

    path: Path
    target: str
    difference: float
    """Of a token's log-probability, in nats, at most, in float32."""
    difference_rounded: float | None
    """The same with the weights as written, where they were rounded."""
    tokens_compared: int


def export(model: EncoderDecoder, path: str | Path, *, to: str, **options: Any) -> Exported:
    """Write a model for another program, with its tokenizer.

    That program reads back what was written, and its log-probabilities of random tokens are compared with the
    model's, both in float32. The folder appears only if they agree.

    Args:
        model: of any dtype, on any device; it stays as it is.
        path: a folder that is not there yet, or empty.
        to: a name in `TARGETS`.
        options: of the target. `quantization` of ctranslate2: one of its names for weights, such as "int8"; of
            openvino: "int8" or "int4".

    Raises:
        ValueError: an unknown target or option, a model that the target cannot run exactly (says why), or a result
            that does not agree (says by how much).
        FileExistsError: something is at `path`.
        ImportError: the target needs a package that is missing; names the extra.
    """
    if to not in TARGETS:
        raise ValueError(f"export target must be one of {', '.join(TARGETS)}, got {to!r}")
    target = TARGETS[to]
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - set(target.options)):
        raise ValueError(
            f"export to {to} takes {', '.join(target.options) or 'no options'}, got {', '.join(unknown)}; leave it out"
        )
    with new_folder(path) as folder:
        written = target.write(model, folder, **given)
        compared = samples(model.config, written.max_source)
        expected = expected_logprobs(in_float32(model), compared)
        difference = largest_difference(written.run(compared), expected)
        if not difference <= TOLERANCE:  # also where it is NaN
            raise ValueError(
                f"the {to} export differs from the model by up to {difference:.3g} nats in a token's log-probability, "
                f"where {TOLERANCE:g} are allowed; nothing was written"
            )
        rounded = None
        if written.run_rounded is not None:
            rounded = largest_difference(written.run_rounded(compared), expected)
    return Exported(
        path=Path(path),
        target=to,
        difference=difference,
        difference_rounded=rounded,
        tokens_compared=sum(len(logprobs) for logprobs in expected),
    )
