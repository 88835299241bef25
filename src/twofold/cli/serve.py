"""`twofold serve`: models behind OpenAI's API, until SIGTERM."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from twofold.checkpoint.load import load
from twofold.cli.console import note
from twofold.cli.options import PrecisionOption, SkipVisionOption, ThreadsOption
from twofold.infer import Engine
from twofold.infer.backends import BACKENDS, BackendName, Precision


def serve_command(
    models: Annotated[list[str], typer.Argument(help="Encoder-decoders: folders or hub names.")],
    name: Annotated[
        list[str] | None,
        typer.Option(help="By which clients call a model; once for each. Default: its folder's."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Default 127.0.0.1: only this machine. 0.0.0.0: every machine.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Default 8000; 0: any that is free.")] = None,
    backend: Annotated[str, typer.Option(help=f"What runs the models: {', '.join(BACKENDS)}.")] = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    batch_size: Annotated[int, typer.Option(help="Answers that a model writes together.")] = 8,
    cache_gb: Annotated[
        float | None, typer.Option(help="Of keys and values for each model; default a quarter of the memory.")
    ] = None,
    skip_vision: SkipVisionOption = False,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="One key a line, or sha256: and its hash. Also TWOFOLD_API_KEYS. Default: no keys."
        ),
    ] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Of one request.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of one answer.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Of one prompt.")] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Answers that may wait; beyond: 429.")] = None,
    timeout_s: Annotated[float | None, typer.Option(help="For one request, waiting included.")] = None,
    drain_s: Annotated[float | None, typer.Option(help="After SIGTERM, for requests that run.")] = None,
    playground: Annotated[bool, typer.Option(help="A page at / to try the models with.")] = True,
    log_level: Annotated[
        str, typer.Option(help="debug, info, warning or error; JSON lines on stderr.")
    ] = "info",
) -> None:
    """Serve models over HTTP: OpenAI's API, Vertex AI's, metrics. Every limit can be set by TWOFOLD_SERVE_* too."""
    from twofold.serve import ServeSettings, create_app
    from twofold.serve.auth import read_keys
    from twofold.serve.logs import configure
    from twofold.serve.playground import add_playground
    from twofold.serve.run import is_loopback, make_server, open_socket

    if log_level not in ("debug", "info", "warning", "error"):
        raise ValueError(f"unknown log level {log_level!r}; use debug, info, warning or error")
    names = _names(models, name)
    on_vertex = os.environ.get("AIP_HTTP_PORT")
    host = host or ("0.0.0.0" if on_vertex else "127.0.0.1")
    port = int(on_vertex or 8000) if port is None else port
    limits: dict[str, Any] = {
        "max_body_bytes": max_body_bytes,
        "max_new_tokens": max_new_tokens,
        "max_prompt_tokens": max_prompt_tokens,
        "max_waiting": max_waiting,
        "timeout_s": timeout_s,
        "drain_s": drain_s,
    }
    if api_key_file is not None:
        limits["key_hashes"] = read_keys(api_key_file.read_text(encoding="utf-8"), str(api_key_file))
    settings = ServeSettings.from_environment(os.environ, **limits)
    if not (settings.key_hashes or on_vertex or is_loopback(host)):
        note(
            f"warning: {host} can be reached by others and there are no API keys; give some with --api-key-file"
        )
    # Before the models: a port that is taken should not take minutes to find out.
    listener = open_socket(host, port, stall_timeout_s=settings.stall_timeout_s)
    with listener:
        engines = {}
        for path, chosen in zip(models, names, strict=True):
            started = time.perf_counter()
            engines[chosen] = Engine(
                load(path, skip_vision=skip_vision),
                backend=cast(BackendName, backend),
                precision=cast(Precision | None, precision),
                threads=threads,
                batch_size=batch_size,
                cache_bytes=None if cache_gb is None else int(cache_gb * 1e9),
            )
            seconds = time.perf_counter() - started
            note(f"{path} loaded on {engines[chosen].device} as {chosen!r} in {seconds:.1f} s")
        app = create_app(engines, settings, extensions=(add_playground,) if playground else ())
        configure(log_level)
        shown = f"[{host}]" if ":" in host else host
        note(f"serving on http://{shown}:{listener.getsockname()[1]}; reference under /docs; Ctrl-C ends it")
        make_server(app).run(sockets=[listener])


def _names(models: list[str], given: list[str] | None) -> list[str]:
    """One for each model."""
    if given is not None and len(given) != len(models):
        raise ValueError(
            f"got {len(given)} names for {len(models)} models; give --name once for each, or never"
        )
    names = given or [Path(model).name or model for model in models]
    if len(set(names)) < len(names):
        raise ValueError(f"models need different names, got {', '.join(names)}; give --name for each")
    return names
