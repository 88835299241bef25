"""`twofold adapt`: one or two decoder-only donors in, an encoder-decoder checkpoint out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.progress import track

from twofold.adapt import Choices, Plan, adapt_to_folder
from twofold.adapt.adaptation import Initialised
from twofold.adapt.profile import DEFAULT_BUDGET
from twofold.cli.console import err, note, print_json
from twofold.cli.profile import depth_chooser, profile_donor, profiler, read_domains, show

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def adapt_command(
    encoder: Annotated[str, typer.Argument(help="Donor of the encoder: folder, hub name or GGUF file.")],
    decoder: Annotated[
        str | None, typer.Argument(help="Donor of the decoder. Left out: the same donor, a balanced pair.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = ...,  # type: ignore[assignment]
    start: Annotated[str, typer.Option(help="lossless, published, scaled_copy or random.")] = "lossless",
    encoder_mask: Annotated[
        str | None,
        typer.Option(
            help="bidirectional, causal or sink; or one per layer, separated by commas; or auto (default of the "
            "lossless start): as open as a profile finds to cost next to nothing."
        ),
    ] = None,
    future_weight: Annotated[
        float, typer.Option(help="Factor on the attention weight of later tokens in an open encoder.")
    ] = 1.0,
    encoder_layers: Annotated[
        str | None, typer.Option(help="Donor layers the encoder keeps, such as 0,2,4 or 0-14.")
    ] = None,
    decoder_layers: Annotated[
        str | None, typer.Option(help="Donor layers the decoder keeps, such as 0,3,6 or 0-9.")
    ] = None,
    decoder_depth: Annotated[
        int | None,
        typer.Option(
            help="How many decoder layers stay; measured: those the pair misses most (lossless start)."
        ),
    ] = None,
    layout: Annotated[str | None, typer.Option(help="separate or merged attention to the source.")] = None,
    reads: Annotated[str | None, typer.Option(help="final or aligned.")] = None,
    cross_rope: Annotated[bool | None, typer.Option(help="Rotate encoder keys.")] = None,
    decoder_positions: Annotated[str | None, typer.Option(help="restart or continue.")] = None,
    decoder_start: Annotated[str | None, typer.Option(help="bos or last_source_token.")] = None,
    tie_stacks: Annotated[
        bool, typer.Option("--tie-stacks", help="Both sides share one donor's weights (lossless start).")
    ] = False,
    output_scale: Annotated[
        float, typer.Option(help="scaled_copy: factor on cross-attention's output.")
    ] = 0.1,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default the donor's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random parameters.")] = 0,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Write no checkpoint: measure what opening each encoder layer costs, into OUT/profile.json and .png.",
        ),
    ] = False,
    profile_text: Annotated[
        list[str] | None,
        typer.Option(
            help="A domain to profile on, NAME=PATH (text, JSON lines, .gz); may be repeated. Default: Python's own "
            "documentation."
        ),
    ] = None,
    budget: Annotated[
        float, typer.Option(help="Nats per token, on every domain, that open layers may cost together.")
    ] = DEFAULT_BUDGET,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Make an encoder-decoder out of one decoder-only model (balanced), or of two that share a tokenizer."""
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    domains = read_domains(profile_text or ())
    measure = profiler(domains, budget, each_layer=profile)
    if profile:
        if decoder is not None:
            raise ValueError("--profile measures one donor's balanced pair; leave the decoder's donor out")
        note(f"profiling {encoder}: one pass over the texts for each encoder layer")
        found = profile_donor(encoder, out, measure, overwrite=overwrite)
        if json:
            print_json(found.as_json())
        else:
            show(found)
            note(f"wrote {out / 'profile.json'}")
        return
    choices = Choices(
        start=cast(Any, start),
        encoder_mask=cast(Any, _mask(encoder_mask)),
        future_weight=future_weight,
        encoder_layers=_layers(encoder_layers, "--encoder-layers"),
        decoder_layers=_layers(decoder_layers, "--decoder-layers"),
        decoder_depth=decoder_depth,
        layout=cast(Any, layout),
        reads=cast(Any, reads),
        cross_rope=cross_rope,
        decoder_positions=cast(Any, decoder_positions),
        decoder_start=cast(Any, decoder_start),
        tie_stacks=tie_stacks,
        output_scale=output_scale,
    )
    note(
        f"adapting {encoder}"
        + (f" (encoder) and {decoder} (decoder)" if decoder else "")
        + f", start: {start}"
    )
    started = time.perf_counter()
    report = adapt_to_folder(
        encoder,
        decoder,
        out,
        choices,
        dtype=None if dtype is None else _DTYPES[dtype],
        seed=seed,
        overwrite=overwrite,
        watch=_with_progress,
        profile=measure,
        choose=depth_chooser(domains),
    )
    seconds = time.perf_counter() - started
    summary = {key: report[key] for key in ("start", "num_parameters", "dtype", "cross_attention", "donors")}
    summary |= {"out": str(out), "seconds": round(seconds, 2)}
    if json:
        print_json(summary)
        return
    note(f"{report['num_parameters'] / 1e6:,.1f}M parameters in {report['dtype']}, {seconds:.1f} s")
    note(f"cross-attention: {report['cross_attention']}")
    if "profile" in report:
        opened = report["profile"]["chosen"]
        note(
            f"encoder: {len(opened['layers'])} of {len(report['profile']['encoder_mask'])} layers open, later tokens "
            f"at weight {opened['future_weight']:g}"
        )
    if "depth" in report:
        note(
            f"decoder: layers {', '.join(map(str, report['depth']['layers']))} of the pair stay; train it again"
        )
    note(f"wrote {out} (adaptation.json says where each tensor comes from)")


def _with_progress(tensors: Iterator[Initialised], plan: Plan) -> Iterable[Initialised]:
    label = f"{plan.num_parameters / 1e6:,.0f}M parameters"
    return track(tensors, description=label, total=len(plan.tensors), console=err, transient=True)


def _mask(text: str | None) -> str | list[str] | None:
    return text.split(",") if text is not None and "," in text else text


def _layers(text: str | None, option: str) -> list[int] | None:
    """Layer indices from "0,3,6" or "0-9" or a mix of both."""
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{option} takes layer indices such as 0,3,6 or 0-9, got {text!r}")
        layers += range(int(first), int(last if dash else first) + 1)
    return layers
