"""What is asked of the engine, and what comes back.

Letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

from torch import Tensor

from twofold.data.chat import Messages
from twofold.infer.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled"]
"""A stop token or stop string came; `max_new_tokens` were reached; the caller gave it up."""


class Constraint(Protocol):
    """Steers one sample or beam: a grammar, a schema, or any other change of its logits."""

    def apply(self, logits_V: Tensor) -> Tensor:
        """Float32 [V] before penalties and filters to the same with -inf where a token is forbidden. Stop tokens
        are tokens as others: forbid them until the text may end."""
        ...

    def advance(self, token_id: int) -> None:
        """This token was chosen."""
        ...

    def fork(self) -> Self:
        """An independent copy, for another sample or a beam that branches."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One source, and how it is answered. Give `prompt`, or `source_ids` and `prefix_ids`.

    Raises:
        ValueError: settings that contradict each other or lie outside what is allowed.
    """

    prompt: str | Messages | None = None
    """A text, taken as it is; or a conversation, for which the tokenizer's chat template is used."""
    source_ids: Sequence[int] | None = None
    """Encoder input, instead of a prompt; nothing is added to it."""
    prefix_ids: Sequence[int] | None = None
    """Decoder input to continue, with `source_ids`; at least one token."""
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    """Default greedy."""
    n: int = 1
    """Answers to return: samples, of which number i draws with `seed + i`; or the best of the beams."""
    num_beams: int = 1
    """Above 1: beam search, which takes no sampling settings."""
    length_penalty: float = 1.0
    """A finished beam's score is its log-probability divided by its number of tokens to this power."""
    early_stopping: bool | Literal["never"] = False
    """When beam search ends, as in transformers. False: once no running beam would be better if it ended now. True:
    once `num_beams` have finished. "never": once no running beam can become better."""
    stop: str | Sequence[str] = ()
    """The text ends before the first of these strings."""
    stop_token_ids: Sequence[int] | None = None
    """A row ends with one of these. None: the model's end tokens."""
    logprobs: int | None = None
    """How many of the most likely tokens are reported at each place, beside the chosen one's log-probability. Those
    of the model itself, before constraint, penalties and temperature. None: nothing is reported."""
    priority: int = 0
    """Higher goes first."""
    constraint: Constraint | None = None
    """Forked for every sample or beam; itself it stays as it is."""
    lookup: int = 0
    """At most so many tokens are guessed at a time from what stands in the source or earlier in the answer, and
    checked in one step (see `infer.lookup`). It changes no answer, greedy or drawn, beyond the rounding that every
    batch brings, and pays where an answer repeats its source. While other requests run nothing is guessed. 0:
    never."""

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.source_ids is None):
            raise ValueError("give a request a prompt or source_ids: exactly one of them")
        if (self.source_ids is None) != (self.prefix_ids is None):
            raise ValueError(
                "source_ids and prefix_ids go together: what the encoder reads and what the decoder continues"
            )
        for name in ("max_new_tokens", "n", "num_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_beams > 1:
            self._check_beams()
        elif self.n > 1 and self.sampling.temperature == 0.0:
            raise ValueError(
                f"n={self.n} greedy answers would all be equal; set a temperature, or use num_beams"
            )
        if self.lookup < 0:
            raise ValueError(
                f"lookup must be 0 (no guesses) or the most tokens guessed at a time, got {self.lookup}"
            )
        if self.lookup and self.n_rows > 1:
            raise ValueError(
                f"lookup={self.lookup} guesses for a single answer, the request has {self.n_rows} rows (samples or "
                "beams); leave it out, or set n=1 and num_beams=1"
            )
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs must be 0 (the chosen token's) or more, got {self.logprobs}")
        if "" in self.stop_strings:
            raise ValueError("a stop string is empty, so that every text would end at once; leave it out")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop`, always as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) and self.stop else tuple(self.stop)

    @property
    def n_rows(self) -> int:
        """Rows that are decoded together."""
        return max(self.n, self.num_beams)

    def _check_beams(self) -> None:
        if self.n > self.num_beams:
            raise ValueError(
                f"n={self.n} answers from {self.num_beams} beams are not to be had; raise num_beams"
            )
        if self.sampling != Sampling(seed=self.sampling.seed):
            raise ValueError(
                "beam search follows the model's own probabilities and takes no temperature, filters or "
                "penalties; leave them out, or set num_beams=1"
            )
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping must be True, False or 'never', got {self.early_stopping!r}")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was, as the model sees it."""

    logprob: float
    """Of the token that was chosen."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens and their log-probabilities, best first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """What is new of one answer. All deltas of an answer in a row are its completion."""

    index: int
    """Which of the `n` answers."""
    text: str
    """May be empty: half a character, or what may become a stop string, is held back."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One per token, where they were asked for."""
    finish_reason: FinishReason | None = None
    """Set in the answer's last delta."""


@dataclass(frozen=True)
class Completion:
    """One answer."""

    text: str
    """Decoded, without special tokens, the end token, or a stop string. Empty without a tokenizer."""
    token_ids: tuple[int, ...]
    """As generated, the end token or the tokens of the stop string included where one came."""
    finish_reason: FinishReason
    num_source_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One per token, where they were asked for."""
    score: float | None = None
    """Of a beam: its log-probability over its number of tokens to the power of `length_penalty`."""

    def to_json(self) -> dict[str, Any]:
        """Without what was not asked for."""
        found: dict[str, Any] = {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "num_source_tokens": self.num_source_tokens,
        }
        if self.logprobs is not None:
            found["logprobs"] = [
                {"logprob": x.logprob, "top": [list(t) for t in x.top]} for x in self.logprobs
            ]
        if self.score is not None:
            found["score"] = self.score
        return found
