"""`twofold inspect`: what is in a checkpoint, read from its config and the headers of its files."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from twofold.checkpoint import Checkpoint, resolve
from twofold.checkpoint.load import match_tensors, read_config
from twofold.cli.console import out, print_json
from twofold.config import EncoderDecoderConfig, StackConfig
from twofold.models import EncoderDecoder
from twofold.models.counts import parameter_counts
from twofold.models.families import DONORS, DonorFamily


def inspect_command(
    model: Annotated[
        str, typer.Argument(help="An encoder-decoder or a donor: folder, hub name or GGUF file.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Show what a checkpoint is: its stacks, how they meet, its parameters, and whether its tensors fit."""
    checkpoint = resolve(model)
    family = DONORS.get(str(checkpoint.config.get("model_type")))
    report = _inspect_donor(checkpoint, family) if family is not None else _inspect_pair(checkpoint)
    if json:
        print_json(report)
    else:
        _show(report)


def _inspect_donor(checkpoint: Checkpoint, family: DonorFamily) -> dict[str, Any]:
    donor = family.read_config(checkpoint.config)
    with checkpoint.tensors() as source:
        sizes = {name: torch.Size(source.shape(name)).numel() for name in source.names()}
        dtypes = sorted({str(source.dtype(name)).removeprefix("torch.") for name in source.names()})
    unknown = [name for name in sizes if not _is_known(name, family)]
    return {
        "name": checkpoint.name,
        "kind": f"decoder-only donor ({checkpoint.config['model_type']}); adapt it to get an encoder-decoder",
        "tie_word_embeddings": donor.tie_word_embeddings,
        "parameters": {"total": sum(sizes.values())},
        "dtypes": dtypes,
        "problems": [f"unknown tensor {name}" for name in unknown],
        "stacks": {"decoder-only": _stack(donor.stack)},
    }


def _is_known(name: str, family: DonorFamily) -> bool:
    try:
        family.tensor_map.to_own(name)
    except KeyError:
        return False
    return True


def _inspect_pair(checkpoint: Checkpoint) -> dict[str, Any]:
    config, family = read_config(checkpoint)
    with torch.device("meta"):
        model = EncoderDecoder(config)
    problems: list[str] = []
    with checkpoint.tensors() as source:
        dtypes = sorted({str(source.dtype(name)).removeprefix("torch.") for name in source.names()})
        vision = [name for name in source.names() if family is not None and family.is_skippable(name)]
        try:
            match_tensors(model, source, family, skip_vision=True)
        except ValueError as error:
            problems = str(error).splitlines()
    report: dict[str, Any] = {
        "name": checkpoint.name,
        "kind": f"encoder-decoder ({checkpoint.config['model_type']})",
        **_meeting(config),
        "parameters": parameter_counts(config),
        "dtypes": dtypes,
        "vision_tensors": len(vision),
        "problems": problems,
        "stacks": {"encoder": _stack(config.encoder), "decoder": _stack(config.decoder)},
    }
    adaptation = checkpoint.folder / "adaptation.json"
    if adaptation.is_file():
        made = json_module.loads(adaptation.read_text())
        report["adapted_from"] = {key: made[key] for key in ("donors", "start", "cross_attention")}
    return report


def _meeting(config: EncoderDecoderConfig) -> dict[str, Any]:
    masks = [f"{config.encoder_mask.count(m)} {m}" for m in dict.fromkeys(config.encoder_mask)]
    return {
        "layout": config.layout,
        "reads": config.reads,
        "cross_rope": config.cross_rope,
        "decoder_positions": config.decoder_positions,
        "decoder_start": config.decoder_start,
        "encoder_mask": ", ".join(masks),
        "encoder_future_weight": config.encoder_future_weight,
        "tie_word_embeddings": config.tie_word_embeddings,
        "tie_stacks": config.tie_stacks,
        "source_projections": config.source_projections,
    }


def _stack(config: StackConfig) -> dict[str, Any]:
    n_sliding = config.layer_types.count("sliding_attention")
    return {
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": f"{config.num_attention_heads} x {config.head_dim}, {config.num_key_value_heads} key-value",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "sliding": f"{n_sliding} layers, window {config.sliding_window}" if n_sliding else "none",
        "soft_caps": f"{config.attn_logit_softcapping} scores, {config.final_logit_softcapping} logits",
        "q/k norm": config.qk_norm,
    }


def _show(report: dict[str, Any]) -> None:
    stacks = report.pop("stacks")
    facts = Table(show_header=False, box=None, pad_edge=False)
    for key, value in report.items():
        if key == "parameters":
            value = ", ".join(f"{part} {count:,}" for part, count in value.items())
        elif isinstance(value, dict):
            value = ", ".join(f"{k}: {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = "\n".join(value) if value else "none"
        facts.add_row(key, str(value))
    out.print(facts)
    table = Table("", *stacks)
    for key in next(iter(stacks.values())):
        table.add_row(key, *(str(stack[key]) for stack in stacks.values()))
    out.print(table)
