"""Runs a function on several ranks: processes that are made as `torchrun` makes them, only faster."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

MODULES = [
    "torch",
    "torch.distributed.fsdp",
    "twofold.train",
    "tests.train.tiny_run",
    "torch.distributed.checkpoint.hf_storage",
]


def on_ranks(function: Callable[..., Any], size: int, *arguments: Any, timeout: float = 60.0) -> list[Any]:
    """What the function returns or raises, on every rank; "killed" where a process died.

    The processes come from a server that has imported everything once and has no threads, so that they start at once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, ends = [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        environment = {
            "WORLD_SIZE": size,
            "RANK": rank,
            "LOCAL_RANK": rank,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        process = context.Process(target=_work, args=(theirs, environment, function, arguments), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        ends.append(ours)
    results: list[Any] = []
    for end in ends:
        try:
            results.append(end.recv() if end.poll(timeout) else "no answer")
        except EOFError:
            results.append("killed")
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
    return results


def _work(end: Any, environment: dict[str, Any], function: Callable[..., Any], arguments: Any) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    import torch

    torch.set_num_threads(1)
    try:
        result = function(*arguments)
    except Exception as error:
        if os.environ.get("SHOW"):
            traceback.print_exc(file=sys.stderr)
        result = error
    end.send(result)
