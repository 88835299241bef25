"""How much a model takes on at a time, and what those that come too much are told."""

from __future__ import annotations

import math

from twofold.serve.errors import ApiError, bad_request

_LONGEST_RETRY_S = 60.0
_WEIGHT_OF_NEW = 0.1


class Gate:
    """Counts the answers that a model is writing or has waiting. Used from the event loop only.

    Args:
        n_together: answers that are worked on at the same time.
        max_waiting: beside them; also the most that one request may ask for.
    """

    def __init__(self, n_together: int, max_waiting: int) -> None:
        self.n_together, self.max_waiting = n_together, max_waiting
        self.n_open = 0
        self._mean_s = 1.0

    def enter(self, n_answers: int) -> None:
        """Take places.

        Raises:
            ApiError: 400 where there are never so many, 429 where there are not now.
        """
        if n_answers > self.max_waiting:
            raise bad_request(
                f"the request asks for {n_answers} answers (prompts times n or beams), this server takes at most "
                f"{self.max_waiting} at a time; send several requests",
                code="too_many_answers",
            )
        most = self.n_together + self.max_waiting
        if self.n_open + n_answers > most:
            raise ApiError(
                429,
                f"the server is busy: {self.n_open} answers are being written or wait, {most} are allowed; try "
                "again later",
                code="queue_full",
                retry_after_s=self.retry_after_s,
            )
        self.n_open += n_answers

    def leave(self, n_answers: int, seconds: float) -> None:
        """Give places back after so long."""
        self.n_open -= n_answers
        self._mean_s += _WEIGHT_OF_NEW * (seconds - self._mean_s)

    @property
    def retry_after_s(self) -> float:
        """About how long what is open will take: a whole number of seconds from 1 to 60."""
        rounds = max(1.0, self.n_open / self.n_together)
        return float(min(_LONGEST_RETRY_S, max(1, math.ceil(self._mean_s * rounds / 2))))
