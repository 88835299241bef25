"""Learning from preferences without a reward model: DPO, IPO, ORPO.

P: pairs. R = 2 P: replies, the chosen one of each pair first. N: scored labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from twofold.config.preferences import PreferenceConfig
from twofold.data import Batch
from twofold.models import EncoderDecoder
from twofold.posttrain.answers import AnswersBatch, answer_tensors, label_logprobs, per_answer
from twofold.posttrain.pairs import Collate, Pair
from twofold.train.step import Objective, Precision

_SMALLEST_LOGPROB = -1e-7
"""Of a token on average, in ORPO: nearer to 0 the odds are more than float32 can tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairBatch(AnswersBatch):
    """Two answers to every source: the chosen one, then the rejected one."""

    reference_logprobs: Tensor | None = None
    """float32 [R]: of each reply under the reference; None where that is asked in the loop, or none is needed."""


Reference = Callable[[PairBatch, Tensor], Tensor]
"""Log-probabilities of the replies, float32 [R], of a batch on the device with its scored positions, int64 [N]."""


class PreferenceObjective(Objective):
    """What a pair of replies to a prompt x says: y_c was chosen, y_r rejected.

    With log p and log p_ref the log-probability of a whole reply, its stop token included, under the model and under
    the reference, and

        h = (log p(y_c | x) - log p_ref(y_c | x)) - (log p(y_r | x) - log p_ref(y_r | x))

    the loss of a pair is

    - `dpo` (Rafailov et al. 2023, arXiv 2305.18290, equation 7): -log sigmoid(beta h). With `label_smoothing` e, the
      chance that a preference is the wrong way round, -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)
      (Mitchell 2023, "A note on DPO with noisy
      preferences").
    - `ipo` (Azar et al. 2023, arXiv 2310.12036, equation 17, whose tau is beta): (h - 1 / (2 beta))^2. Bounded where
      preferences are deterministic; log-probabilities are of whole replies, as there.
    - `orpo` (Hong et al. 2024, arXiv 2403.07691, equations 6 and 7, whose lambda is beta): without a reference, with
      l the mean log-probability of a reply's tokens and odds(l) = e^l / (1 - e^l),
      -l_c - beta log sigmoid(log odds(l_c) - log odds(l_r)).

    Metrics, means over pairs: `reward_chosen` and `reward_rejected`, which are beta (log p - log p_ref), of `orpo`
    beta l; `margin`, their difference; `accuracy`, how often it is above 0 (a tie counts half, so that the reference
    itself is at 0.5).
    """

    metric_names = ("accuracy", "margin", "reward_chosen", "reward_rejected")

    def __init__(
        self,
        model: EncoderDecoder,
        precision: Precision = "float32",
        *,
        config: PreferenceConfig,
        reference: Reference | None = None,
    ) -> None:
        """
        Args:
            reference: asked in the loop. None: batches hold what it would say.
        """
        super().__init__(model, precision)
        self.config = config
        self.reference = reference

    def forward(self, batch: Batch, scored: Tensor) -> Tensor:
        """See `Objective.forward`; the batch is a `PairBatch`."""
        assert isinstance(batch, PairBatch)
        logprobs_P2 = reply_logprobs(self.model, batch, scored, self.precision).view(-1, 2)
        if self.config.kind == "orpo":
            losses_P, rewards_P2 = self._odds_ratio(logprobs_P2, batch)
        else:
            losses_P, rewards_P2 = self._against_reference(logprobs_P2, self._reference(batch, scored))
        margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
        self.note(share_above_zero(margins_P), margins_P.sum(), *rewards_P2.sum(dim=0))
        return losses_P.sum()

    def count(self, batch: Batch) -> int:
        """Pairs."""
        assert isinstance(batch, PairBatch)
        return batch.num_answers // 2

    def _reference(self, batch: PairBatch, scored: Tensor) -> Tensor:
        known_R = batch.reference_logprobs if self.reference is None else self.reference(batch, scored)
        assert known_R is not None
        return known_R.view(-1, 2)

    def _against_reference(self, logprobs_P2: Tensor, reference_P2: Tensor) -> tuple[Tensor, Tensor]:
        beta, smoothing = self.config.beta, self.config.label_smoothing
        ratios_P2 = logprobs_P2 - reference_P2
        h_P = ratios_P2[:, 0] - ratios_P2[:, 1]
        if self.config.kind == "ipo":
            losses_P = (h_P - 1 / (2 * beta)).square()
        else:
            losses_P = -(1 - smoothing) * F.logsigmoid(beta * h_P) - smoothing * F.logsigmoid(-beta * h_P)
        return losses_P, beta * ratios_P2

    def _odds_ratio(self, logprobs_P2: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
        beta = self.config.beta
        lengths_P2 = (batch.labels >= 0).sum(dim=1).view(-1, 2)
        means_P2 = (logprobs_P2 / lengths_P2).clamp(max=_SMALLEST_LOGPROB)
        # log(1 - e^l) = log(-expm1(l)), which keeps its digits where e^l is near 1.
        log_odds_P2 = means_P2 - torch.log(-torch.expm1(means_P2))
        losses_P = -means_P2[:, 0] - beta * F.logsigmoid(log_odds_P2[:, 0] - log_odds_P2[:, 1])
        return losses_P, beta * means_P2


def reply_logprobs(
    model: EncoderDecoder, batch: AnswersBatch, scored: Tensor, precision: Precision
) -> Tensor:
    """Log-probability of every reply, float32 [R], with gradients.

    Args:
        batch: on the model's device.
        scored: int64 [N], see `scored_positions`.
    """
    with torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logprobs_N = label_logprobs(model, batch, scored)
    return per_answer(logprobs_N, batch, scored)


def share_above_zero(margins_P: Tensor) -> Tensor:
    """How many are above 0, ties as halves; float32 []."""
    return (margins_P.sign().sum() + len(margins_P)) / 2


def collate_pairs(pad_token_id: int, reference_P2: Tensor | None = None) -> Collate:
    """What makes a `PairBatch` of pairs.

    Args:
        reference_P2: float32, log-probabilities of chosen and rejected of all pairs, by their numbers.
    """

    def collate(pairs: Sequence[Pair], numbers: Sequence[int]) -> PairBatch:
        tensors = answer_tensors([(pair.chosen, pair.rejected) for pair in pairs], pad_token_id)
        reference = None if reference_P2 is None else reference_P2[list(numbers)].flatten()
        documents = tuple(pair.where for pair in pairs)
        return PairBatch(**tensors, documents=documents, reference_logprobs=reference)

    return collate
