"""`twofold serve` in processes that are forked from one that has imported everything: ready in a second, not in ten."""

import multiprocessing
import sys
import time
import urllib.error
import urllib.request

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["twofold.cli", "twofold.serve.app", "transformers.models.auto.tokenization_auto", __name__]
)


def start(*arguments):
    """A process that runs `twofold serve`; see `wait_until_ready`."""
    process = _context.Process(target=_serve, args=([str(word) for word in arguments],), daemon=True)
    process.start()
    return process


def _serve(arguments):
    from twofold.cli import main

    sys.argv = ["twofold", "serve", *arguments]
    main()


def wait_until(is_true, *, timeout_s=60.0):
    """Poll; an error after so long."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.05)


def is_ready(port):
    """Whether /ready says 200."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
