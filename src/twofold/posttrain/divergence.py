"""How far a student's next-token distribution is from its teacher's, summed over positions, in chunks.

As in `train.loss`: logits of all positions never exist, neither the student's nor the teacher's, in either direction.

N: positions. D: width of the student's decoder. V: vocabulary; V' of it the teacher has.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from twofold.train.loss import (
    CHUNK_BYTES,
    HeadGradients,
    TeacherHead,
    capped_logits,
    product_dtype,
    rows_of,
    scaled_in_place,
    teacher_logits,
    through_cap_,
)

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


def chunked_divergence(
    states_ND: Tensor,
    weight_VD: Tensor,
    teacher: TeacherHead,
    *,
    kind: Divergence,
    beta: float = 0.5,
    softcap: float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """The divergence of teacher p and student q, summed over the positions where the teacher speaks, in nats.

    - `forward_kl`: KL(p || q). The student covers all the teacher may say.
    - `reverse_kl`: KL(q || p). The student keeps to what the teacher would say.
    - `jsd`, the generalised Jensen-Shannon divergence (Agarwal et al. 2023, arXiv 2306.13649, equation 1):
      beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. It is at most ln 2; over beta it goes to
      the forward KL for beta -> 0, over 1 - beta to the reverse KL for beta -> 1.

    Both distributions are over the tokens that the teacher has: sentinels that were added behind them would make the
    reverse KL infinite.

    Args:
        states_ND: normed decoder states, float32 or bfloat16.
        weight_VD: of the head, V at least V'.
        teacher: its states, at the same positions, and head.
        beta: of `jsd`, above 0 and below 1.
        softcap: of the student's final logits.
        chunk_bytes: of one model's float32 logits at a time; at least one position is taken.

    Returns:
        float32 []. Dtypes as for `train.loss.chunked_loss`.

    Raises:
        ValueError: an unknown kind, a beta out of range, or shapes that do not fit.
    """
    if kind not in get_args(Divergence):
        raise ValueError(f"divergence must be one of {', '.join(get_args(Divergence))}, got {kind!r}")
    if kind == "jsd" and not 0.0 < beta < 1.0:
        raise ValueError(
            f"beta of jsd must lie between 0 and 1, got {beta}; for its ends use 'forward_kl' or 'reverse_kl'"
        )
    n_shared = len(teacher.weight_VE)
    if len(teacher.states_NE) != len(states_ND) or n_shared > len(weight_VD):
        raise ValueError(
            f"states of student and teacher must be of the same positions, got {len(states_ND)} and "
            f"{len(teacher.states_NE)}, and the teacher's vocabulary a part of the student's, got {n_shared} and "
            f"{len(weight_VD)}"
        )
    dtype, device = product_dtype(states_ND), states_ND.device.type
    n_rows = max(chunk_bytes // (4 * weight_VD.shape[0]), 1)
    with torch.autocast(device, enabled=False):
        total: Tensor = _ChunkedDivergence.apply(
            states_ND, weight_VD, teacher, kind, beta, softcap, n_rows, dtype
        )  # type: ignore[no-untyped-call]
    return total


class _ChunkedDivergence(torch.autograd.Function):
    """The sum and, where they are wanted, the gradients of both inputs in one pass over the positions."""

    @staticmethod
    def forward(
        ctx: Any,
        states_ND: Tensor,
        weight_VD: Tensor,
        teacher: TeacherHead,
        kind: Divergence,
        beta: float,
        softcap: float | None,
        n_rows: int,
        dtype: torch.dtype,
    ) -> Tensor:
        weight = weight_VD[: len(teacher.weight_VE)].to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=states_ND.device)
        grads = HeadGradients(ctx.needs_input_grad, states_ND, weight_VD)
        for start in range(0, len(states_ND), n_rows):
            rows = slice(start, start + n_rows)
            states = states_ND[rows].to(dtype)
            said = cast(TeacherHead, rows_of(teacher, rows))
            logits = capped_logits(states, weight, softcap)
            values_N, slope = _value_and_slope(logits, teacher_logits(said), kind, beta)
            total += (values_N * said.speaks_N).sum()
            slope.mul_(said.speaks_N[:, None])
            grads.add(rows, through_cap_(slope, logits, softcap), states, weight)
        ctx.save_for_backward(*grads.both())
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*scaled_in_place(ctx.saved_tensors, grad), None, None, None, None, None, None)


def _value_and_slope(
    student_NV: Tensor, teacher_NV: Tensor, kind: Divergence, beta: float
) -> tuple[Tensor, Tensor]:
    """The divergence at each position, [N], and its derivative with respect to the student's logits, [N, V'].

    Where the divergence is a function of q alone, with g its derivative dL/dq up to a constant, that is q (g - E_q g).
    """
    log_q, log_p = student_NV.log_softmax(dim=1), teacher_NV.log_softmax(dim=1)
    q = log_q.exp()
    if kind == "forward_kl":
        p = log_p.exp()
        return torch.linalg.vecdot(p, log_p - log_q), q.sub_(p)
    if kind == "reverse_kl":
        g = log_q - log_p
        values_N = torch.linalg.vecdot(q, g)
        return values_N, g.sub_(values_N[:, None]).mul_(q)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    g = log_q.sub_(log_m)
    from_m_N = torch.linalg.vecdot(q, g)
    values_N = beta * torch.linalg.vecdot(log_p.exp(), log_p - log_m) + (1 - beta) * from_m_N
    return values_N, g.sub_(from_m_N[:, None]).mul_(q).mul_(1 - beta)
