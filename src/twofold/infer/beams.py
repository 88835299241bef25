"""Beam search: the rows of a request are the most likely beginnings of an answer.

In each step every beam is extended by every token, and the best extensions go on. Those that end are ranked by
log-probability over length to the power of `length_penalty`. Order, ties to rank and the three ways to stop are
those of transformers' `_beam_search` (5.23), so that results can be compared.

Letters: R beams, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twofold.infer.prepare import Prepared
from twofold.infer.request import Completion, Constraint, Delta, FinishReason, TokenLogprob
from twofold.infer.samples import Advance, constrained, token_logprobs
from twofold.infer.sampling import check_choice
from twofold.infer.text_stream import TextStream


@dataclass(frozen=True, slots=True)
class Beam:
    """The beginning of an answer, or a whole one."""

    token_ids: tuple[int, ...] = ()
    total: float = 0.0
    """Log-probability of all tokens together."""
    logprobs: tuple[TokenLogprob, ...] = ()
    constraint: Constraint | None = None
    stream: TextStream | None = None
    finish_reason: FinishReason | None = None

    def score(self, length_penalty: float) -> float:
        """By which finished beams are ranked."""
        return self.total / float(max(1, len(self.token_ids)) ** length_penalty)


class Beams:
    """`Answers` by beam search. Nothing is certain before the end, so all deltas come then.

    Args:
        prepared: the request.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared, self._request = prepared, prepared.request
        self._open = [Beam(constraint=self._request.constraint, stream=prepared.text_stream())]
        self._finished: list[Beam] = []
        """The best so far, at most `num_beams`, best first."""

    def advance(self, logits_RV: Tensor) -> Advance:
        """See `Answers`."""
        candidates = self._candidates(logits_RV)
        n_beams = self._request.num_beams
        going: list[int] = []
        extended: list[Beam] = []
        for rank, (row, beam) in enumerate(candidates):
            if beam.finish_reason is None:
                going.append(row)
                extended.append(beam)
            elif rank < n_beams:  # one that ends counts only among the best
                self._finished.append(beam)
            if len(extended) == n_beams:
                break
        self._finished.sort(key=self._score, reverse=True)
        del self._finished[n_beams:]
        self._open = extended
        if not extended or self._is_done():
            self._open = []
            return Advance([], [], self._deltas())
        return Advance(going, [beam.token_ids[-1] for beam in extended], [])

    def cancel(self) -> list[Delta]:
        """See `Answers`."""
        n_missing = max(0, self._request.n - len(self._finished))
        best = sorted(self._open, key=self._score, reverse=True)[:n_missing]
        best += [Beam(stream=self._prepared.text_stream())] * (n_missing - len(best))
        self._finished += [replace(beam, finish_reason="cancelled") for beam in best]
        self._open = []
        return self._deltas()

    def completions(self) -> tuple[Completion, ...]:
        """See `Answers`."""
        return tuple(
            Completion(
                text="" if beam.stream is None else beam.stream.text,
                token_ids=beam.token_ids,
                finish_reason=beam.finish_reason,
                num_source_tokens=len(self._prepared.source_ids),
                logprobs=None if self._request.logprobs is None else beam.logprobs,
                score=self._score(beam),
            )
            for beam in self._finished[: self._request.n]
            if beam.finish_reason is not None
        )

    def _score(self, beam: Beam) -> float:
        return beam.score(self._request.length_penalty)

    def _candidates(self, logits_RV: Tensor) -> list[tuple[int, Beam]]:
        """The best extensions with the rows they come from: enough that `num_beams` of them can go on, whatever
        stop tokens there are."""
        n_vocab = logits_RV.shape[-1]
        logprobs_RV = logits_RV.float().log_softmax(dim=-1)
        logprobs_RV = constrained(logprobs_RV, [beam.constraint for beam in self._open])
        check_choice(logprobs_RV.amax())  # a beam may come to its end, but not all of them
        totals_R1 = torch.tensor([[beam.total] for beam in self._open], device=logits_RV.device)
        n_wanted = (1 + len(self._prepared.stop_token_ids)) * self._request.num_beams
        best = (totals_R1 + logprobs_RV).flatten().topk(min(n_wanted, logprobs_RV.numel()))
        places = [divmod(place, n_vocab) for place in best.indices.tolist()]
        rows, tokens = [row for row, _ in places], [token for _, token in places]
        reports: list[TokenLogprob] | list[None] = [None] * len(rows)
        if self._request.logprobs is not None:
            reports = token_logprobs(logits_RV[rows], tokens, self._request.logprobs)
        return [
            (row, self._extended(self._open[row], token, total, report))
            for row, token, total, report in zip(rows, tokens, best.values.tolist(), reports, strict=True)
            if total > -torch.inf
        ]

    def _extended(self, beam: Beam, token: int, total: float, report: TokenLogprob | None) -> Beam:
        """A beam with one token more."""
        token_ids = (*beam.token_ids, token)
        is_stop = token in self._prepared.stop_token_ids
        constraint, stream = beam.constraint, beam.stream
        if not is_stop:
            constraint = None if constraint is None else constraint.fork()
            stream = None if stream is None else stream.fork()
            if constraint is not None:
                constraint.advance(token)
            if stream is not None:
                stream.push(token)
        reason: FinishReason | None = None
        if is_stop or (stream is not None and stream.stopped):
            reason = "stop"
        elif len(token_ids) == self._request.max_new_tokens:
            reason = "length"
        logprobs = beam.logprobs if report is None else (*beam.logprobs, report)
        return Beam(token_ids, total, logprobs, constraint, stream, reason)

    def _is_done(self) -> bool:
        """No open beam is to replace a finished one."""
        request = self._request
        if len(self._finished) < request.num_beams:
            return False
        if request.early_stopping is True:
            return True
        best, n_tokens = self._open[0].total, len(self._open[0].token_ids)
        if request.early_stopping == "never" and request.length_penalty > 0.0:
            n_tokens = request.max_new_tokens
        attainable = best / float(n_tokens**request.length_penalty)
        return attainable <= self._score(self._finished[-1])

    def _deltas(self) -> list[Delta]:
        deltas = []
        for index, beam in enumerate(self._finished[: self._request.n]):
            if beam.stream is not None:
                beam.stream.finish()
            deltas.append(
                Delta(
                    index=index,
                    text="" if beam.stream is None else beam.stream.text,
                    token_ids=beam.token_ids,
                    logprobs=None if self._request.logprobs is None else beam.logprobs,
                    finish_reason=beam.finish_reason,
                )
            )
        return deltas
