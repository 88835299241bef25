"""`twofold generate`: texts in, continuations out; from the command line or from a file."""

from __future__ import annotations

import json as json_module
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from twofold.checkpoint.load import load
from twofold.cli.console import err, note, out, print_json
from twofold.infer import Completion, Engine


def generate_command(
    model: Annotated[str, typer.Argument(help="An encoder-decoder: folder or hub name.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to continue or answer.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help='JSON lines with "text" or "messages".')
    ] = None,
    out_file: Annotated[Path | None, typer.Option("--out", "-o", help="JSON lines to write.")] = None,
    chat: Annotated[
        bool, typer.Option(help="Wrap each text in the chat template, as a user's turn.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens for each text.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the most likely tokens up to p.")] = None,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Texts that run together.")] = 8,
    skip_vision: Annotated[bool, typer.Option(help="T5Gemma 2: load without its vision tower.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per text.")] = False,
) -> None:
    """Answer texts with an encoder-decoder. Greedy, unless a temperature is given."""
    prompts = _prompts(texts, file, chat)
    if out_file is not None and out_file.exists():
        raise FileExistsError(f"{out_file} exists; choose another name or remove it")
    started = time.perf_counter()
    engine = Engine(load(model, skip_vision=skip_vision), batch_size=batch_size)
    note(f"{model} loaded on {engine.device} in {time.perf_counter() - started:.1f} s; {len(prompts)} texts")

    started = time.perf_counter()
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    completions: list[Completion] = []
    for first in track(
        range(0, len(prompts), batch_size), description="generating", console=err, transient=True
    ):
        some = prompts[first : first + batch_size]
        completions += engine.generate(some, max_new_tokens=max_new_tokens, seed=seed + first, **options)
    seconds = time.perf_counter() - started
    n_tokens = sum(len(c.token_ids) for c in completions)

    if out_file is not None:
        lines = [json_module.dumps(c.to_json(), ensure_ascii=False) for c in completions]
        out_file.write_text("\n".join(lines) + "\n")
        note(f"wrote {out_file}")
    elif json:
        for completion in completions:
            print_json(completion.to_json())
    else:
        for completion in completions:
            out.print(completion.text, markup=False)
    note(f"{n_tokens} tokens in {seconds:.1f} s, {n_tokens / seconds:.1f} tokens/s")


def _prompts(texts: list[str] | None, file: Path | None, chat: bool) -> list[Any]:
    if bool(texts) == (file is not None):
        raise ValueError("give texts on the command line, or a file with --file: exactly one of them")
    prompts: list[Any] = list(texts or ())
    if file is not None:
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            if not line.strip():
                continue
            try:
                record = json_module.loads(line)
                prompts.append(record["messages"] if "messages" in record else record["text"])
            except (json_module.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{file}, line {number}: need a JSON object with "text" or "messages" ({error})'
                ) from error
    if chat:
        prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    return prompts
