"""Learning from rewards of whole answers, without a model of values: GRPO and its relatives, RLOO.

G: groups, the answers to one prompt each. K: answers of a group. R = G K: answers. T: decoder positions. N: their
tokens, stop tokens included.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twofold.config.grpo import PolicyConfig, RolloutConfig
from twofold.data import Batch
from twofold.models import EncoderDecoder
from twofold.posttrain.answers import AnswersBatch, label_logprobs
from twofold.train.step import Objective, Precision, scored_positions

_EPSILON = 1e-4
"""Added to standard deviations."""

PHASES = ("rollout", "reward", "scoring")
"""What comes before an update: answers, their rewards, log-probabilities."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutBatch(AnswersBatch):
    """Sampled answers, as many to every prompt, and what is known of them when they were written."""

    advantages: Tensor
    """float32 [R]."""

    rewards: Tensor
    """float64 [R, 1 + rewards]: the weighted sum, then each by itself."""

    is_truncated: Tensor
    """bool [R]: cut at max_new_tokens, so without a stop token."""

    old_logprobs: Tensor | None = None
    """float32 [R, T]: of the labels, under the policy that sampled. None: the policy has not moved since."""

    reference_logprobs: Tensor | None = None
    """float32 [R, T]: under the reference. None: there is none."""

    seconds: Tensor
    """float64 [3]: what `PHASES` took, of the rollout that this batch is part of; 0 where it is used again."""


def advantages(
    rewards_GK: npt.NDArray[np.float64], config: PolicyConfig, batch_std: float | None = None
) -> npt.NDArray[np.float64]:
    """How much better each answer is than others to its prompt, [G, K].

    Args:
        rewards_GK: K is at least 2.
        config: see its `baseline` and `scale`. With the mean of the group and its standard deviation this is equation
            (in section 4.1.2) of DeepSeekMath (arXiv 2402.03300); without the deviation Dr. GRPO's (arXiv 2503.20783);
            leaving the answer itself out of the mean, RLOO's (arXiv 2402.14740, section 2.3.1).
        batch_std: of all rewards of the step, for scale 'batch'.

    Returns:
        Exactly 0 in groups whose rewards are all equal. Standard deviations have the divisor K - 1.
    """
    n_answers = rewards_GK.shape[1]
    found: npt.NDArray[np.float64] = rewards_GK - rewards_GK.mean(axis=1, keepdims=True)
    if config.baseline == "leave_one_out":
        found *= n_answers / (n_answers - 1)
    if config.scale == "std":
        found /= rewards_GK.std(axis=1, ddof=1, keepdims=True) + _EPSILON
    elif config.scale == "batch":
        assert batch_std is not None
        found /= batch_std + _EPSILON
    # A mean of equal numbers may be off by a rounding, which the division would make visible.
    found[np.ptp(rewards_GK, axis=1) == 0] = 0.0
    return found


class PolicyObjective(Objective):
    """The clipped surrogate of PPO with advantages of groups, and a penalty for leaving the reference.

    With p the probability of a token under the policy, p_old under the one that sampled it, p_ref under the reference,
    A the advantage of its answer, and ratio r = p / p_old, the loss of a token is (DeepSeekMath, arXiv 2402.03300,
    equations 3 and 4)

        - min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coefficient (p_ref / p - log(p_ref / p) - 1)

    and a step's loss is a weighted sum over tokens, see `PolicyConfig.aggregation`:

    - `token` (DAPO, arXiv 2503.14476, equation 8): the mean over all tokens of the step;
    - `sequence` (DeepSeekMath): the mean over answers of the mean over their tokens;
    - `constant` (Dr. GRPO, arXiv 2503.20783): the mean over answers of the sum over their tokens / max_new_tokens.

    Probabilities are those at the temperature of the rollout. Stop tokens are actions like others.

    In eval mode the loss is minus the reward, the mean over answers, and nothing of the model is computed.

    Metrics. Of answers: `reward` and `reward_NAME` (without weights); `reward_std`, the mean over prompts of the
    standard deviation of their rewards; `no_variance`, the share of prompts whose answers all have the same reward,
    from which nothing is learned; `length`, in tokens; `truncated`, a share. Of tokens: `entropy`, as minus the
    log-probability of what was sampled, which is its estimate; `kl` to the reference, as above; `clipped`, the share
    for which the clipped term is the smaller one. `rollout_seconds`, `reward_seconds`, `scoring_seconds`: see `PHASES`;
    what is left of a step's `seconds` is the update.
    """

    def __init__(
        self,
        model: EncoderDecoder,
        precision: Precision = "float32",
        *,
        config: PolicyConfig,
        rollout: RolloutConfig,
        reward_names: tuple[str, ...],
    ) -> None:
        super().__init__(model, precision)
        self.config = config
        self.rollout = rollout
        self._of_answers = ("reward", *(f"reward_{name}" for name in reward_names), "length", "truncated")
        self._of_groups = ("reward_std", "no_variance")
        self._of_tokens = ("entropy", "kl", "clipped")
        self._of_batches = tuple(f"{phase}_seconds" for phase in PHASES)
        counted = ("answers", "groups", "tokens", "batches")
        self.metric_names = (
            *counted,
            *self._of_answers,
            *self._of_groups,
            *self._of_tokens,
            *self._of_batches,
        )

    def forward(self, batch: Batch, scored: Tensor) -> Tensor:
        """See `Objective.forward`; the batch is a `RolloutBatch`."""
        assert isinstance(batch, RolloutBatch)
        if not self.training:
            zero = torch.zeros((), device=batch.rewards.device)
            self._note(batch, zero, (zero, zero, zero))
            return -batch.rewards[:, 0].sum().float()
        logprobs_N = policy_logprobs(self.model, batch, scored, self.precision, self.rollout.temperature)
        row_N = scored // batch.labels.shape[1]
        advantages_N = batch.advantages[row_N]
        old_N = logprobs_N.detach()
        if batch.old_logprobs is not None:
            old_N = batch.old_logprobs.flatten()[scored]
        ratio_N = torch.exp(logprobs_N - old_N)
        clipped_N = ratio_N.clamp(1 - self.config.clip_low, 1 + self.config.clip_high)
        gains_N, clipped_gains_N = ratio_N * advantages_N, clipped_N * advantages_N
        losses_N = -torch.minimum(gains_N, clipped_gains_N)
        kl_N = torch.zeros_like(losses_N)
        if batch.reference_logprobs is not None:
            # k3 of Schulman 2020, "Approximating KL divergence": never negative, and unbiased.
            log_ratio_N = batch.reference_logprobs.flatten()[scored] - logprobs_N
            kl_N = torch.expm1(log_ratio_N) - log_ratio_N
            losses_N = losses_N + self.config.kl_coefficient * kl_N
        n_tokens = torch.tensor(len(scored), device=row_N.device)
        self._note(
            batch, n_tokens, (-logprobs_N.sum(), kl_N.sum(), (clipped_gains_N < gains_N).float().sum())
        )
        return (losses_N * self._weights(batch)[row_N]).sum()

    def count(self, batch: Batch) -> int:
        """Answers, or tokens where those weigh the same."""
        assert isinstance(batch, RolloutBatch)
        if self.training and self.config.aggregation == "token":
            return batch.num_scored_tokens
        return batch.num_answers

    def reported(self, means: dict[str, float]) -> dict[str, float]:
        """See `Objective.reported`: each metric as the mean over what it is of."""
        kinds = [
            ("answers", self._of_answers),
            ("groups", self._of_groups),
            ("tokens", self._of_tokens),
            ("batches", self._of_batches),
        ]
        told = {
            name: means[name] / means[counted] for counted, names in kinds if means[counted] for name in names
        }
        if self.config.kl_coefficient == 0:
            told.pop("kl", None)
        if self.config.num_iterations == 1:
            told.pop("clipped", None)
        return told

    def _weights(self, batch: RolloutBatch) -> Tensor:
        """What the loss of a token of each answer counts, float32 [R]."""
        weights_R = torch.ones(batch.num_answers, device=batch.labels.device)
        if self.config.aggregation == "sequence":
            weights_R = 1.0 / answer_lengths(batch)
        elif self.config.aggregation == "constant":
            weights_R = weights_R / self.rollout.max_new_tokens
        if self.config.mask_truncated:
            weights_R = weights_R.masked_fill(batch.is_truncated, 0.0)
        return weights_R

    def _note(self, batch: RolloutBatch, n_tokens: Tensor, of_tokens: tuple[Tensor, Tensor, Tensor]) -> None:
        rewards_GK = batch.rewards[:, 0].view(len(batch.input_ids), -1)
        n_groups, n_answers = rewards_GK.shape
        spread_G = rewards_GK.std(dim=1, correction=min(1, n_answers - 1))
        same_G = rewards_GK.amax(dim=1) == rewards_GK.amin(dim=1)
        one = torch.ones((), device=batch.rewards.device)
        self.note(
            one * batch.num_answers,
            one * (n_groups if n_answers > 1 else 0),  # of one answer there is no spread
            n_tokens,
            one,
            *batch.rewards.sum(dim=0),
            answer_lengths(batch).sum(),
            batch.is_truncated.sum(),
            spread_G.sum(),
            same_G.sum(),
            *of_tokens,
            *batch.seconds,
        )


def answer_lengths(batch: AnswersBatch) -> Tensor:
    """Scored tokens of each answer, int64 [R]."""
    return (batch.labels >= 0).sum(dim=1)


def policy_logprobs(
    model: EncoderDecoder, batch: AnswersBatch, scored: Tensor, precision: Precision, temperature: float
) -> Tensor:
    """Log-probability of every token of the answers at a temperature, float32 [N], with gradients.

    Args:
        batch: on the model's device.
        scored: int64 [N], see `scored_positions`.
    """
    with torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return label_logprobs(model, batch, scored, temperature=temperature)


@torch.no_grad()
def placed_logprobs(
    model: EncoderDecoder, batch: AnswersBatch, precision: Precision, temperature: float
) -> Tensor:
    """The same without gradients, where the labels stand, float32 [R, T] on the CPU; 0 where nothing is scored.

    Args:
        model: in eval mode, on its device.
        batch: on the CPU.
    """
    device = model.lm_head.out_proj.weight.device
    scored = scored_positions(batch).to(device)
    found_N = policy_logprobs(model, batch.to(device), scored, precision, temperature)
    placed = torch.zeros(batch.labels.numel(), device=device)
    placed[scored] = found_N
    return placed.view(batch.labels.shape).cpu()
