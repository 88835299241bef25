"""Divergences in chunks against plain ones with autograd, in float32."""

import math

import pytest
import torch

from tests.models.tiny import assert_same
from twofold.posttrain.divergence import chunked_divergence
from twofold.train.loss import TeacherHead

N, D, E, V = 7, 5, 6, 11
KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)]


def inputs(n_shared=V, scale=1.0, seed=0):
    """Distributions that are far from uniform and from each other."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return scale * torch.randn(shape, generator=generator)

    states, weight = draw(N, D).requires_grad_(), draw(V, D).requires_grad_()
    speaks = torch.tensor([True, True, False, True, True, True, False])
    teacher = TeacherHead(draw(N, E), draw(n_shared, E), 4.0, speaks)
    return states, weight, teacher


def plain(states, weight, teacher, kind, beta, softcap=None):
    """Textbook: softmax, logarithm, sum."""

    def capped(logits, cap):
        return logits if cap is None else cap * torch.tanh(logits / cap)

    n_shared = len(teacher.weight_VE)
    q = capped(states @ weight.T, softcap)[:, :n_shared].softmax(-1)
    p = capped(teacher.states_NE @ teacher.weight_VE.T, teacher.softcap).softmax(-1)

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    m = beta * p + (1 - beta) * q
    value = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m)}[
        kind
    ]
    return value[teacher.speaks_N].sum()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize(
    ("n_shared", "chunk_bytes"), [(V, 2**20), (V - 3, 4 * V * 2)], ids=["whole", "chunks"]
)
def test_value_and_gradients(kind, beta, softcap, n_shared, chunk_bytes):
    states, weight, teacher = inputs(n_shared)
    expected = plain(states, weight, teacher, kind, beta, softcap)
    wanted = torch.autograd.grad(expected, (states, weight))
    options = {"kind": kind, "beta": beta, "softcap": softcap, "chunk_bytes": chunk_bytes}
    value = chunked_divergence(states, weight, teacher, **options)
    found = torch.autograd.grad(3.0 * value, (states, weight))
    assert expected > 0.1
    assert_same(value, expected)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_same(ours / 3.0, theirs)
    frozen = chunked_divergence(states, weight.detach(), teacher, **options)
    assert_same(torch.autograd.grad(frozen, states)[0], wanted[0])


@pytest.mark.parametrize(("beta", "kind"), [(1e-3, "forward_kl"), (1 - 1e-3, "reverse_kl")])
def test_the_ends_of_jsd_are_the_two_kl(beta, kind):
    """Divided by what goes to 0; values and gradients differ by about a thousandth of them."""
    states, weight, teacher = inputs(scale=0.5)
    end = chunked_divergence(states, weight, teacher, kind=kind)
    near = chunked_divergence(states, weight, teacher, kind="jsd", beta=beta) / min(beta, 1 - beta)
    assert near.item() == pytest.approx(end.item(), rel=0.01)
    (slope,), (near_slope,) = torch.autograd.grad(end, states), torch.autograd.grad(near, states)
    assert (near_slope - slope).norm() < 0.01 * slope.norm()
    assert chunked_divergence(*inputs(), kind="jsd").item() <= 5 * math.log(2)


def test_distributions_that_hardly_overlap_stay_finite():
    for kind, beta in KINDS:
        states, weight, teacher = inputs(scale=30.0)
        value = chunked_divergence(states, weight, teacher, kind=kind, beta=beta)
        assert value.isfinite()
        assert all(g.isfinite().all() for g in torch.autograd.grad(value, (states, weight)))


def test_equal_distributions_have_no_divergence_and_no_gradient():
    states, weight, _ = inputs()
    same = TeacherHead(states.detach(), weight.detach(), None, torch.ones(N, dtype=torch.bool))
    for kind, beta in KINDS:
        value = chunked_divergence(states, weight, same, kind=kind, beta=beta)
        assert value.item() == pytest.approx(0.0, abs=1e-5)
        assert all(g.abs().max() < 1e-5 for g in torch.autograd.grad(value, (states, weight)))


def test_what_cannot_be_computed_is_refused():
    states, weight, teacher = inputs()
    with pytest.raises(ValueError, match="one of forward_kl, reverse_kl, jsd, got 'kl'"):
        chunked_divergence(states, weight, teacher, kind="kl")
    with pytest.raises(ValueError, match="for its ends use 'forward_kl'"):
        chunked_divergence(states, weight, teacher, kind="jsd", beta=0.0)
    with pytest.raises(ValueError, match="got 6 and 7"):
        chunked_divergence(states[1:], weight, teacher, kind="jsd")
    with pytest.raises(ValueError, match="got 11 and 10"):
        chunked_divergence(states, weight[1:], teacher, kind="jsd")
