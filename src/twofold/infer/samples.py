"""One request's answers, token by token: greedy or sampled, `n` of them from one source.

Letters: R rows still written, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from twofold.infer.prepare import Prepared
from twofold.infer.request import Completion, Constraint, Delta, FinishReason, TokenLogprob
from twofold.infer.sampling import Sampler
from twofold.infer.text_stream import TextStream


@dataclass(frozen=True, slots=True)
class Advance:
    """What a step came to."""

    rows: list[int]
    """Of the R rows before, those that go on, in their new order; a beam that branches stands there twice."""
    tokens: list[int]
    """The newest token of each."""
    deltas: list[Delta]


class Answers(Protocol):
    """How the answers of one request grow: samples, or beams."""

    def advance(self, logits_RV: Tensor) -> Advance:
        """Choose from float32 logits; the first call has one row, whatever the number of answers.

        Raises:
            ValueError: there is nothing to choose from.
        """
        ...

    def cancel(self) -> list[Delta]:
        """End what is still open."""
        ...

    def completions(self) -> tuple[Completion, ...]:
        """The answers, all of which have ended."""
        ...


class Sample:
    """One answer as it grows."""

    def __init__(self, prepared: Prepared, index: int) -> None:
        request = prepared.request
        self.prepared, self.index = prepared, index
        self.constraint: Constraint | None = request.constraint.fork() if request.constraint else None
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] | None = [] if request.logprobs is not None else None
        self.stream: TextStream | None = prepared.text_stream()
        self.text = ""
        self.finish_reason: FinishReason | None = None

    def take(self, token: int, logprob: TokenLogprob | None) -> Delta:
        """Add a token, and end where it is the last."""
        self.token_ids.append(token)
        if self.logprobs is not None and logprob is not None:
            self.logprobs.append(logprob)
        is_stop = token in self.prepared.stop_token_ids
        if self.constraint is not None and not is_stop:
            self.constraint.advance(token)
        text = ""
        if self.stream is not None and not is_stop:
            text = self.stream.push(token)
        if is_stop or (self.stream is not None and self.stream.stopped):
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.prepared.request.max_new_tokens:
            self.finish_reason = "length"
        return self._delta(text, (token,), None if logprob is None else (logprob,))

    def cancel(self) -> Delta:
        """End before the end."""
        self.finish_reason = "cancelled"
        return self._delta("", (), None)

    def completion(self) -> Completion:
        """The whole answer."""
        assert self.finish_reason is not None
        return Completion(
            text=self.text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            num_source_tokens=len(self.prepared.source_ids),
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
        )

    def _delta(self, text: str, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...] | None) -> Delta:
        if self.finish_reason is not None and self.stream is not None:
            text += self.stream.finish()
        self.text += text
        return Delta(
            index=self.index,
            text=text,
            token_ids=tokens,
            logprobs=logprobs,
            finish_reason=self.finish_reason,
        )


class Samples:
    """`Answers` that are drawn each for itself.

    Args:
        prepared: the request.
        device: where logits lie.
    """

    def __init__(self, prepared: Prepared, device: torch.device) -> None:
        request = prepared.request
        self._all = [Sample(prepared, index) for index in range(request.n)]
        self._open = list(self._all)
        self._sampler = Sampler(request.sampling, request.n, device)
        self._n_logprobs = request.logprobs

    def advance(self, logits_RV: Tensor) -> Advance:
        """See `Answers`."""
        logits_RV = logits_RV.expand(len(self._open), -1)
        allowed_RV = constrained(logits_RV, [sample.constraint for sample in self._open])
        tokens = self._sampler.choose(allowed_RV).tolist()
        logprobs: Sequence[TokenLogprob | None] = [None] * len(tokens)
        if self._n_logprobs is not None:
            logprobs = token_logprobs(logits_RV, tokens, self._n_logprobs)
        taken = zip(self._open, tokens, logprobs, strict=True)
        deltas = [sample.take(token, logprob) for sample, token, logprob in taken]
        going = [row for row, sample in enumerate(self._open) if sample.finish_reason is None]
        self._open = [self._open[row] for row in going]
        self._sampler.keep(going)
        return Advance(going, [tokens[row] for row in going], deltas)

    def cancel(self) -> list[Delta]:
        """See `Answers`."""
        deltas = [sample.cancel() for sample in self._open]
        self._open = []
        return deltas

    def completions(self) -> tuple[Completion, ...]:
        """See `Answers`."""
        return tuple(sample.completion() for sample in self._all)


def constrained(logits_RV: Tensor, constraints: Sequence[Constraint | None]) -> Tensor:
    """Each row after its constraint."""
    if all(constraint is None for constraint in constraints):
        return logits_RV
    rows = zip(logits_RV, constraints, strict=True)
    return torch.stack(
        [logits_V if constraint is None else constraint.apply(logits_V) for logits_V, constraint in rows]
    )


def token_logprobs(logits_RV: Tensor, tokens: Sequence[int], n_top: int) -> list[TokenLogprob]:
    """Of the chosen token in each row, and of the `n_top` most likely ones."""
    logprobs_RV = logits_RV.float().log_softmax(dim=-1)
    top = logprobs_RV.topk(n_top, dim=-1)
    chosen = logprobs_RV.gather(1, torch.tensor(tokens, device=logits_RV.device)[:, None])[:, 0]
    return [
        TokenLogprob(logprob, tuple(zip(ids, values, strict=True)))
        for logprob, ids, values in zip(
            chosen.tolist(), top.indices.tolist(), top.values.tolist(), strict=True
        )
    ]
