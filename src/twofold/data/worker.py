"""A process that tokenises shards for `twofold.data.build`: pickles on standard input, answers on standard output."""

import os
import pickle
import signal
import sys


def main() -> None:
    """Write shards until the input ends; the answer to each is None, or the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the process that asked ends this one
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    requests = sys.stdin.buffer
    job = pickle.load(requests)
    while True:
        try:
            records, file = pickle.load(requests)
        except EOFError:
            return
        error: Exception | None = None
        try:
            job.write_shard(records, file)
        except Exception as raised:  # goes to the process that asked
            error = raised
        pickle.dump(error, answers)
        answers.flush()


if __name__ == "__main__":
    main()
