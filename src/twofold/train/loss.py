"""The loss of one batch, as a sum, so that a step can divide by the tokens of all its batches.

The head, its soft-cap, the softmax and their gradients are computed for a few positions at a time: logits of
all positions never exist, in either direction. Since the loss is a sum, its gradient with respect to the logits
is known as soon as they are, so the backward pass only scales what the forward pass left.

N: scored positions. D: width of the decoder. V: vocabulary. K: tokens a sparse teacher names. E: width of a teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from twofold.data import IGNORE_INDEX

CHUNK_BYTES = 2**27
"""Of float32 logits that exist at a time (and as much again for the teacher's). 128 MiB: 128 positions at a
vocabulary of 256k. Larger chunks are not faster from here on for what they cost in memory."""


@dataclass(frozen=True, slots=True)
class SparseTeacher:
    """A teacher's next-token distribution, over the tokens it names."""

    ids_NK: Tensor
    """int64. A token may be named several times; its shares add up."""

    shares_NK: Tensor
    """float32; each row sums to 1, or to 0 where the teacher says nothing and the label alone counts."""


@dataclass(frozen=True, slots=True)
class TeacherHead:
    """A teacher in the loop: its whole distribution, from its states and its head."""

    states_NE: Tensor
    weight_VE: Tensor
    """Of the first tokens of the student's vocabulary, or of all."""
    softcap: float | None
    speaks_N: Tensor
    """bool. False: the teacher says nothing here, and the label alone counts."""
    hidden_NE: tuple[Tensor, ...] = ()
    """What the layers that are to be matched read, see `Matching`; one tensor for each."""


Teacher = SparseTeacher | TeacherHead


@dataclass(frozen=True, slots=True)
class Matching:
    """Layers of a student's decoder whose states are drawn to a teacher's."""

    layers: tuple[int, ...]
    """What layer i reads, i from 0; the number of layers stands for the normed output."""
    weight: float
    """See `hidden_loss`."""


def hidden_loss(student_ND: Sequence[Tensor], teacher: TeacherHead) -> Tensor:
    """How far hidden states point away from a teacher's: 1 - cosine similarity, mean over layers, summed over the
    positions where the teacher speaks; float32 [].

    Their directions only: every sub-layer reads the stream through an RMSNorm, which takes out its length.

    Args:
        student_ND: what the student's matched layers read, any float dtype; as wide as the teacher's.
    """
    total = torch.zeros((), device=teacher.speaks_N.device)
    for own, theirs in zip(student_ND, teacher.hidden_NE, strict=True):
        own = own.float()
        similarity_N = (own * F.normalize(theirs.float(), dim=-1)).sum(dim=-1) / own.norm(dim=-1)
        total = total + ((1.0 - similarity_N) * teacher.speaks_N).sum()
    return total / len(teacher.hidden_NE)


def token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over scored tokens, from logits: the plain form of `chunked_loss`.

    Args:
        logits_BTV: [B, T, V], any float dtype; the softmax is taken in float32.
        labels_BT: int64 [B, T]: the right token at each position, IGNORE_INDEX where nothing is scored.

    Returns:
        The sum in nats, float32 [], and the number of scored tokens, int64 []; 0 and 0 where there are none.
    """
    logits = logits_BTV.float().flatten(0, 1)
    total = F.cross_entropy(logits, labels_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total, (labels_BT != IGNORE_INDEX).sum()


def chunked_loss(
    states_ND: Tensor,
    labels_N: Tensor,
    weight_VD: Tensor,
    *,
    softcap: float | None = None,
    teacher: Teacher | None = None,
    teacher_share: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Cross-entropy of the head's distribution against labels or a teacher, summed over positions, in nats.

    With z = softcap(states weight^T), the loss of a position is

        - sum_x q(x) log softmax(z)(x),   q = teacher_share * teacher + (1 - teacher_share) * one-hot(label)

    and q is the one-hot label alone without a teacher, or where it says nothing. With `teacher_share` 1 this is
    the distillation loss of Gemma 2 (arXiv 2408.00118, section 3.2).

    Args:
        states_ND: normed decoder states of the scored positions, float32 or bfloat16.
        labels_N: int64, each a token (no IGNORE_INDEX).
        weight_VD: of the head.
        softcap: of the final logits.
        chunk_bytes: of float32 logits at a time; at least one position is taken.

    Returns:
        float32 []. 0 for no positions. Products are taken in bfloat16 under autocast, else in the dtype of the
        states; everything from the logits on is float32, as are the sums of the weight's gradient.

    Raises:
        ValueError: shapes that do not fit, or a share outside [0, 1].
    """
    _check_shapes(states_ND, labels_N, weight_VD)
    if not 0.0 <= teacher_share <= 1.0:
        raise ValueError(f"teacher_share must lie between 0 and 1, got {teacher_share}")
    dtype, device = product_dtype(states_ND), states_ND.device.type
    n_rows = max(chunk_bytes // (4 * weight_VD.shape[0]), 1)
    with torch.autocast(device, enabled=False):
        loss: Tensor = _ChunkedLoss.apply(
            states_ND, weight_VD, labels_N, softcap, teacher, teacher_share, n_rows, dtype
        )  # type: ignore[no-untyped-call]
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """Loss and, where they are wanted, the gradients of both inputs in one pass over the positions."""

    @staticmethod
    def forward(
        ctx: Any,
        states_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        softcap: float | None,
        teacher: Teacher | None,
        teacher_share: float,
        n_rows: int,
        dtype: torch.dtype,
    ) -> Tensor:
        weight = weight_VD.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=states_ND.device)
        grads = HeadGradients(ctx.needs_input_grad, states_ND, weight_VD)
        for start in range(0, len(labels_N), n_rows):
            rows = slice(start, start + n_rows)
            states = states_ND[rows].to(dtype)
            loss, slope = _loss_and_slope(
                states, weight, labels_N[rows], softcap, rows_of(teacher, rows), teacher_share
            )
            total += loss
            grads.add(rows, slope, states, weight)
        ctx.save_for_backward(*grads.both())
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*scaled_in_place(ctx.saved_tensors, grad), None, None, None, None, None, None)


def chunked_logprobs(
    states_ND: Tensor,
    labels_N: Tensor,
    weight_VD: Tensor,
    *,
    softcap: float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Log-probability of each label, with gradients, for objectives that weigh tokens or answers of their own.

    Logits of a chunk are computed once in the forward and once more in the backward pass, which is when it is known
    what each label counts. Arguments, dtypes and errors as for `chunked_loss`.

    Returns:
        float32 [N].
    """
    _check_shapes(states_ND, labels_N, weight_VD)
    dtype, device = product_dtype(states_ND), states_ND.device.type
    n_rows = max(chunk_bytes // (4 * weight_VD.shape[0]), 1)
    with torch.autocast(device, enabled=False):
        logprobs: Tensor = _ChunkedLogprobs.apply(states_ND, weight_VD, labels_N, softcap, n_rows, dtype)  # type: ignore[no-untyped-call]
    return logprobs


class _ChunkedLogprobs(torch.autograd.Function):
    """See `chunked_logprobs`."""

    @staticmethod
    def forward(
        ctx: Any,
        states_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        softcap: float | None,
        n_rows: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(states_ND, weight_VD, labels_N)
        ctx.softcap, ctx.n_rows, ctx.dtype = softcap, n_rows, dtype
        weight = weight_VD.to(dtype)
        found = torch.empty(len(labels_N), dtype=torch.float32, device=states_ND.device)
        for start in range(0, len(labels_N), n_rows):
            rows = slice(start, start + n_rows)
            logits = capped_logits(states_ND[rows].to(dtype), weight, softcap)
            of_label = logits.gather(1, labels_N[rows, None])[:, 0]
            found[rows] = of_label - logits.logsumexp(dim=1)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        states_ND, weight_VD, labels_N = ctx.saved_tensors
        weight = weight_VD.to(ctx.dtype)
        grads = HeadGradients(ctx.needs_input_grad, states_ND, weight_VD)
        for start in range(0, len(labels_N), ctx.n_rows):
            rows = slice(start, start + ctx.n_rows)
            states = states_ND[rows].to(ctx.dtype)
            logits = capped_logits(states, weight, ctx.softcap)
            # d log-probability / d capped logit = one-hot(label) - softmax
            slope = logits.softmax(dim=1).neg_()
            slope.scatter_add_(1, labels_N[rows, None], torch.ones_like(slope[:, :1]))
            slope.mul_(grad_N[rows, None])
            grads.add(rows, through_cap_(slope, logits, ctx.softcap), states, weight)
        return (*grads.both(), None, None, None, None)


def _check_shapes(states_ND: Tensor, labels_N: Tensor, weight_VD: Tensor) -> None:
    if labels_N.shape != states_ND.shape[:1] or states_ND.shape[1:] != weight_VD.shape[1:]:
        raise ValueError(
            f"states [N, D], labels [N] and weight [V, D] do not fit: got {list(states_ND.shape)}, "
            f"{list(labels_N.shape)} and {list(weight_VD.shape)}"
        )


def product_dtype(states_ND: Tensor) -> torch.dtype:
    """Of matrix products: autocast's where it is on."""
    device = states_ND.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states_ND.dtype


def capped_logits(states: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """float32 logits of a chunk, after the soft-cap."""
    logits = (states @ weight.t()).float()
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _loss_and_slope(
    states: Tensor,
    weight: Tensor,
    labels: Tensor,
    softcap: float | None,
    teacher: Teacher | None,
    teacher_share: float,
) -> tuple[Tensor, Tensor]:
    """The summed loss of a chunk, and its derivative with respect to the logits before the soft-cap."""
    logits = capped_logits(states, weight, softcap)
    label_share: Tensor | float = 1.0
    expected = torch.zeros((), device=logits.device)  # sum over positions and tokens of q * logit
    if isinstance(teacher, SparseTeacher):
        shares = teacher.shares_NK * teacher_share
        label_share = 1.0 - shares.sum(dim=1)
        expected = (logits.gather(1, teacher.ids_NK) * shares).sum()
    elif teacher is not None:
        shares_NV = teacher_logits(teacher).softmax(dim=1) * teacher_share
        shares_NV *= teacher.speaks_N[:, None]
        label_share = 1.0 - teacher_share * teacher.speaks_N
        # A teacher's vocabulary may end before the student's, to which sentinels were added.
        expected = torch.linalg.vecdot(logits[:, : shares_NV.shape[1]], shares_NV).sum()
    of_label = logits.gather(1, labels[:, None])[:, 0]
    log_z = logits.logsumexp(dim=1)
    loss = (log_z - of_label * label_share).sum() - expected

    # d loss / d capped logit = softmax - q
    slope = (logits - log_z[:, None]).exp_()
    if isinstance(teacher, SparseTeacher):
        slope.scatter_add_(1, teacher.ids_NK, -shares)
    elif teacher is not None:
        slope[:, : shares_NV.shape[1]] -= shares_NV
    share_column = torch.full_like(of_label, 1.0) * label_share
    slope.scatter_add_(1, labels[:, None], -share_column[:, None])
    return loss, through_cap_(slope, logits, softcap)


def teacher_logits(teacher: TeacherHead) -> Tensor:
    """float32 [N, V], after the soft-cap."""
    return capped_logits(teacher.states_NE, teacher.weight_VE.to(teacher.states_NE.dtype), teacher.softcap)


def rows_of(teacher: Teacher | None, rows: slice) -> Teacher | None:
    """What it says at some of the positions."""
    if isinstance(teacher, SparseTeacher):
        return SparseTeacher(teacher.ids_NK[rows], teacher.shares_NK[rows])
    if teacher is not None:
        return TeacherHead(
            teacher.states_NE[rows], teacher.weight_VE, teacher.softcap, teacher.speaks_N[rows]
        )
    return None


class HeadGradients:
    """The gradients of states and of the head's weight, added up chunk by chunk.

    Args:
        wanted: for the states and for the weight whether it is asked for, and more that is not looked at.
        states_ND, weight_VD: what they are of.
    """

    def __init__(self, wanted: Sequence[bool], states_ND: Tensor, weight_VD: Tensor) -> None:
        self._states_ND = torch.empty_like(states_ND) if wanted[0] else None
        self._weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted[1] else None
        self._dtype = weight_VD.dtype

    def add(self, rows: slice, slope: Tensor, states: Tensor, weight: Tensor) -> None:
        """Those of one chunk.

        Args:
            rows: its positions; each comes in one chunk.
            slope: float32, the derivative with respect to the logits before the soft-cap; for the first tokens alone
                where `weight` holds no others.
            states, weight: as they were multiplied.
        """
        slope = slope.to(weight.dtype)
        if self._states_ND is not None:
            self._states_ND[rows] = slope @ weight
        if self._weight_VD is not None:
            _add_product(self._weight_VD[: len(weight)], slope.t(), states)

    def both(self) -> tuple[Tensor | None, Tensor | None]:
        """In the dtypes of states and weight; None where it is not wanted."""
        return self._states_ND, None if self._weight_VD is None else self._weight_VD.to(self._dtype)


def scaled_in_place(kept: Sequence[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """What a forward pass kept as gradients of its sum, times the gradient of that sum. In place: they are that
    function's own, and the weight's is as large as the weight."""
    return [None if one is None else one.mul_(grad.to(one.dtype)) for one in kept]


def through_cap_(slope: Tensor, logits: Tensor, softcap: float | None) -> Tensor:
    """A derivative with respect to capped logits to that before the cap, which passes on 1 - (capped / cap)^2 of it.
    Uses up both arguments."""
    if softcap is not None:
        slope.mul_(logits.div_(softcap).square_().neg_().add_(1.0))
    return slope


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with the sum over chunks in float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
