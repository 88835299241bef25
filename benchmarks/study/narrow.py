"""A narrower donor out of a Llama-like one: its residual stream cut to its main directions, then a little distillation.

    export TWOFOLD_DATA=/path/to/data
    python -m benchmarks.study.narrow DONOR --width 468 --steps 100 --to OUT --out benchmarks/results/study/narrow.json

It stands in for the smaller model of a family where none is at hand that shares the donor's tokenizer. The cut (after
SliceGPT, arXiv 2401.15024): every norm's gain goes into the matrices that read it, which leaves norms that commute
with rotations; the stream is rotated into the principal axes of what all norms hand on, over a little text; and the
first `width` axes stay. Heads and MLP keep their sizes. As a Llama checkpoint has no matrix between layers, one
rotation serves all of them. Then the whole model learns from the donor's own distributions.

Letters: D the donor's width, d the width that is left, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import twofold
from benchmarks.common import publish, result
from benchmarks.study.study import SOURCE_LENGTH, TARGET_LENGTH, Meter, mean, rounded, show
from benchmarks.study.text import Texts
from twofold.checkpoint.writer import SafetensorsWriter
from twofold.config import StackConfig
from twofold.config.distillation import DistillationConfig
from twofold.config.recipe import OptimizerConfig, ScheduleConfig, TrainSettings
from twofold.data import Convention, longest_text
from twofold.models import EncoderDecoder
from twofold.models.families.llama import LLAMA
from twofold.models.layers import RMSNorm
from twofold.train import Callback, fit
from twofold.train.run import build_loaders
from twofold.train.step import StepResult
from twofold.train.teacher import open_distillation

READ = {
    "pre_self_attn_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "pre_feedforward_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Each norm of a layer, and what reads it."""

WRITTEN = ("self_attn.o_proj", "mlp.down_proj")
"""What adds to the stream."""


@torch.no_grad()
def principal_axes(model: EncoderDecoder, texts: Sequence[str], length: int = 256) -> Tensor:
    """Axes of the stream as the norms hand it on, without their gains: float64 [D, D], columns, the main one first.

    Every token counts the same, whatever the size of its activations.

    Args:
        model: a donor on both sides; its encoder reads the texts.
        length: tokens read of each text.
    """
    size = model.config.encoder.hidden_size
    moment_DD = torch.zeros(size, size, dtype=torch.float64)

    def add(norm: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        x = inputs[0].float().flatten(0, -2)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True))
        moment_DD.add_((x.T @ x).double())

    with ExitStack() as stack:
        for module in model.encoder.modules():
            if isinstance(module, RMSNorm):
                stack.callback(module.register_forward_hook(add).remove)
        for text in texts:
            model.encode(torch.tensor([model.tokenizer(text)["input_ids"][:length]]))
    return torch.linalg.eigh(moment_DD).eigenvectors.flip(1)


def narrowed(
    weights: Mapping[str, Tensor], stack: StackConfig, axes_DD: Tensor, width: int
) -> tuple[dict[str, Tensor], StackConfig]:
    """The donor with its stream cut to the first `width` axes; with all of them it computes what it did.

    Args:
        weights: by our names of a single stack, and `lm_head.out_proj.weight`.
        stack: the donor's, with norms that multiply by their weight, and without post-norms and biases.
        axes_DD: orthogonal, see `principal_axes`.

    Returns:
        Float32 weights under the same names, and their stack. The head is a table of its own.

    Raises:
        ValueError: a stack of another kind, a width beyond the donor's, or one that transformers would not read.
    """
    size = stack.hidden_size
    if stack.norm_adds_one or stack.post_norms or stack.qkv_bias or stack.output_bias or stack.mlp_bias:
        raise ValueError("only Llama-like stacks can be cut: pre-norms alone, no biases")
    if not 1 <= width <= size:
        raise ValueError(f"width must lie between 1 and the donor's {size}, got {width}")
    if width % stack.num_attention_heads:
        raise ValueError(
            f"transformers wants a multiple of the {stack.num_attention_heads} heads as width, got {width}"
        )
    kept_Dd = axes_DD[:, :width]
    # The mean square is over D axes, as before, though the sum is over d.
    gain = (size / width) ** 0.5

    def reading(name: str, norm: str) -> Tensor:
        return (weights[name].double() * weights[norm].double()) @ kept_Dd

    found = {
        "embed_tokens.weight": weights["embed_tokens.weight"].double() @ kept_Dd,
        "norm.weight": torch.full((width,), gain),
        "lm_head.out_proj.weight": reading("lm_head.out_proj.weight", "norm.weight"),
    }
    for i in range(stack.num_hidden_layers):
        layer = f"layers.{i}."
        for norm, readers in READ.items():
            found[f"{layer}{norm}.weight"] = torch.full((width,), gain)
            for reader in readers:
                found[f"{layer}{reader}.weight"] = reading(f"{layer}{reader}.weight", f"{layer}{norm}.weight")
        for writer in WRITTEN:
            found[f"{layer}{writer}.weight"] = kept_Dd.T @ weights[f"{layer}{writer}.weight"].double()
    eps = stack.rms_norm_eps * size / width
    cut = stack.model_copy(update={"hidden_size": width, "rms_norm_eps": eps})
    return {name: tensor.float() for name, tensor in found.items()}, cut


def single_stack(model: EncoderDecoder) -> dict[str, Tensor]:
    """Weights of one stack and the head, by our names, of a pair with tied stacks."""
    named = dict(model.encoder.named_parameters()) | {
        "lm_head.out_proj.weight": model.lm_head.out_proj.weight
    }
    return {name: parameter.detach() for name, parameter in named.items()}


def write_llama(
    folder: Path, weights: Mapping[str, Tensor], stack: StackConfig, tokenizer: Any, like: EncoderDecoder
) -> None:
    """A Llama checkpoint with an untied head, float32.

    Args:
        weights, stack: see `narrowed`.
        tokenizer: of transformers.
        like: a pair with the special tokens.

    Raises:
        FileExistsError: the folder has weights already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "model.safetensors").exists():
        raise FileExistsError(f"{folder} has a model already; give another folder")
    rope = next(iter(stack.rope.values()))
    content = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
        "hidden_act": stack.hidden_activation,
        "rope_theta": rope.theta,
        "pad_token_id": like.config.pad_token_id,
        "bos_token_id": like.config.bos_token_id,
        "eos_token_id": list(like.config.eos_token_ids),
    }
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "initializer_range",
    )  # fmt: skip
    content |= {name: getattr(stack, name) for name in same}
    (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n")
    theirs = {LLAMA.tensor_map.from_own(name): tensor for name, tensor in weights.items()}
    planned = [(name, tuple(tensor.shape), torch.float32) for name, tensor in theirs.items()]
    with SafetensorsWriter(folder, planned, max_shard_bytes=10**10) as writer:
        for name, tensor in theirs.items():
            writer.write(name, tensor)
    tokenizer.save_pretrained(folder)


class Progress(Callback):
    """A line now and then."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0

    def on_step(self, step: int, result: StepResult) -> None:
        self.tokens += result.real_tokens
        self.seconds += result.seconds
        if step % 10 == 0:
            show(f"step {step}, {self.tokens:,} tokens, {self.seconds:.0f} s: loss {result.loss:.3f}")


def distil(student: EncoderDecoder, donor: str, texts: Texts, options: argparse.Namespace) -> Progress:
    """Train a tied pair on the donor's distributions; see `study` for the text and the lengths."""
    settings = TrainSettings(
        steps=options.steps,
        optimizer=OptimizerConfig(learning_rate=options.learning_rate),
        schedule=ScheduleConfig(warmup_steps=max(1, options.steps // 20), decay="linear"),
        precision=options.precision,
        tensorboard=False,
    )
    progress = Progress()
    with tempfile.TemporaryDirectory() as folder:
        data = texts.training_data(
            Path(folder),
            rows=options.rows,
            source_length=SOURCE_LENGTH,
            target_length=TARGET_LENGTH,
            seed=1,  # another order than the study's arms read
        )
        distillation = open_distillation(
            DistillationConfig(teacher=donor),
            student,
            pad_multiple=data.pad_multiple,
            max_raw_length=longest_text(student.tokenizer, data, Convention.of(student.config)),
            precision=options.precision,
            device=torch.device("cpu"),
        )
        loader, _ = build_loaders(data, student, teaching=distillation.teaching)
        run = Path(folder) / "run"
        fit(student, loader, None, settings, run, [progress], objective=distillation.objective)
    return progress


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("donor", help="folder, hub name or GGUF file of a Llama-like model")
    parser.add_argument("--to", type=Path, required=True, help="folder for the narrower checkpoint")
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=4, help="examples of 128 + 128 tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--pieces", type=int, default=12, help="measured, of each domain")
    parser.add_argument("--axes-pieces", type=int, default=24, help="of each domain, for the axes")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--out", type=Path, help="file for the figures")
    options = parser.parse_args()
    texts = Texts(Path(os.environ["TWOFOLD_DATA"]))
    meter = Meter(texts, options.pieces)
    started = time.perf_counter()

    donor = twofold.adapt(
        options.donor, start="lossless", encoder_mask="causal", tie_stacks=True, dtype=torch.float32
    )
    read = [piece for pieces in texts.pieces("train", options.axes_pieces).values() for piece in pieces]
    axes_DD = principal_axes(donor, read)
    weights, stack = narrowed(single_stack(donor), donor.config.encoder, axes_DD, options.width)
    tokenizer = donor.tokenizer
    metrics, details = {}, {"says": "held-out loss, nats per target token; see narrow.py"}
    for domain, losses in meter.by_piece(donor).items():
        metrics[f"{domain}_donor"] = mean(losses)
    show(f"donor: {rounded(metrics)}")
    with tempfile.TemporaryDirectory() as cut:
        write_llama(Path(cut), weights, stack, tokenizer, donor)
        student = twofold.adapt(cut, start="lossless", encoder_mask="causal", tie_stacks=True)
    del donor, weights
    for domain, losses in meter.by_piece(student).items():
        metrics[f"{domain}_cut"] = mean(losses)
    show(f"cut: {rounded(metrics)}")
    if options.steps:
        progress = distil(student, options.donor, texts, options)
        for domain, losses in meter.by_piece(student).items():
            metrics[f"{domain}_distilled"] = mean(losses)
        details |= {"tokens": progress.tokens, "seconds": round(progress.seconds)}
    write_llama(options.to, single_stack(student), stack, tokenizer, student)
    details |= {"width": options.width, "parameters": sum(p.numel() for p in student.parameters())}
    details["total_seconds"] = round(time.perf_counter() - started)
    publish(result("study, a narrower donor", rounded(metrics), details), options.out)


if __name__ == "__main__":
    main()
