import math

import pytest
import torch

from twofold.train import token_loss
from twofold.train.loss import SparseTeacher, TeacherHead, chunked_logprobs, chunked_loss

N, D, V, E, K = 7, 6, 11, 5, 4


def test_sum_over_scored_tokens_equals_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator) * 3
    labels = torch.tensor([[1, -100, 4], [-100, 0, 2]])
    expected = 0.0
    for row in range(2):
        for position in range(3):
            label = int(labels[row, position])
            if label != -100:
                weights = [math.exp(x) for x in logits[row, position].tolist()]
                expected -= math.log(weights[label] / sum(weights))
    total, count = token_loss(logits, labels)
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert total.dtype == torch.float32
    assert count.item() == 4


def test_nothing_scored_is_zero_and_not_nan():
    total, count = token_loss(torch.randn(1, 2, 3), torch.full((1, 2), -100))
    assert (total.item(), count.item()) == (0.0, 0)


def test_softmax_is_taken_in_float32():
    logits = torch.zeros(1, 1, 1000, dtype=torch.bfloat16)
    total, _ = token_loss(logits, torch.tensor([[3]]))
    assert total.item() == pytest.approx(math.log(1000), rel=1e-6)  # bfloat16 would give 6.90625


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = (torch.randn(N, D, generator=generator) * 2).requires_grad_()
    weight = torch.randn(V, D, generator=generator).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=generator)
    return states, weight, labels


def teachers():
    """Both kinds, with a position where they say nothing and (sparse) a token named twice; and their plain
    distribution [N, V]."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (N, K), generator=generator)
    ids[0, 1] = ids[0, 0]
    shares = torch.rand(N, K, generator=generator)
    shares /= shares.sum(dim=1, keepdim=True)
    shares[2] = 0.0
    plain_sparse = torch.zeros(N, V)
    for n in range(N):
        for k in range(K):
            plain_sparse[n, ids[n, k]] += shares[n, k]
    states, weight = torch.randn(N, E, generator=generator), torch.randn(V, E, generator=generator)
    speaks = torch.ones(N, dtype=torch.bool)
    speaks[4] = False
    plain_head = (5.0 * torch.tanh(states @ weight.T / 5.0)).softmax(dim=1) * speaks[:, None]
    return {
        "none": (None, torch.zeros(N, V)),
        "sparse": (SparseTeacher(ids, shares), plain_sparse),
        "head": (TeacherHead(states, weight, 5.0, speaks), plain_head),
    }


def naive_loss(states, weight, labels, softcap, teacher_NV, share):
    """The docstring's formula with the whole matrix of logits."""
    logits = states @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits, dim=1)
    one_hot = torch.zeros_like(log_p)
    one_hot[torch.arange(len(labels)), labels] = 1.0
    speaks = (teacher_NV.sum(dim=1, keepdim=True) > 0).float() * share
    q = speaks * teacher_NV + (1 - speaks) * one_hot
    return -(q * log_p).sum()


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("kind", ["none", "sparse", "head"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows", [1, 3, N])
def test_chunks_equal_the_whole_matrix_in_loss_and_gradients(rows, softcap, kind, share):
    states, weight, labels = inputs()
    teacher, plain = teachers()[kind]
    expected = naive_loss(states, weight, labels, softcap, plain, share)
    # A factor before the backward pass: the loss is rarely what is differentiated itself.
    expected_grads = torch.autograd.grad(expected * 0.25, (states, weight))
    loss = chunked_loss(
        states,
        labels,
        weight,
        softcap=softcap,
        teacher=teacher,
        teacher_share=share,
        chunk_bytes=rows * 4 * V,
    )
    grads = torch.autograd.grad(loss * 0.25, (states, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5)


def test_frozen_inputs_get_no_gradient_and_no_grad_mode_works():
    states, weight, labels = inputs()
    loss = chunked_loss(states.detach(), labels, weight)
    loss.backward()
    assert weight.grad is not None
    assert states.grad is None
    with torch.no_grad():
        assert chunked_loss(states, labels, weight).item() == pytest.approx(loss.item(), rel=1e-6)


def test_no_positions_is_zero_with_zero_gradients():
    states, weight, labels = inputs()
    loss = chunked_loss(states[:0], labels[:0], weight)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(weight.grad, torch.zeros(V, D))


def test_the_gradient_of_a_bfloat16_weight_is_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(512, D, generator=generator).bfloat16()
    labels = torch.randint(0, V, (512,), generator=generator)
    weight = torch.randn(V, D, generator=generator).bfloat16().requires_grad_()
    by_chunks = torch.autograd.grad(chunked_loss(states, labels, weight, chunk_bytes=4 * 4 * V), weight)[0]
    exact = weight.detach().float().requires_grad_()
    wanted = torch.autograd.grad(chunked_loss(states.float(), labels, exact), exact)[0]
    assert by_chunks.dtype == torch.bfloat16
    # A running sum of 128 chunks in bfloat16 is off by several percent of the largest value.
    assert (by_chunks.float() - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_autocast_takes_products_in_bfloat16_and_returns_float32():
    states, weight, labels = inputs()
    exact = chunked_loss(states, labels, weight)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_loss(states, labels, weight)
    assert loss.dtype == torch.float32
    assert loss.item() != exact.item()
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)
    loss.backward()
    assert weight.grad.dtype == states.grad.dtype == torch.float32


def test_logits_of_all_positions_never_exist():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    states = torch.randn(64, 2, requires_grad=True)
    weight = torch.randn(1000, 2, requires_grad=True)
    with Watch():
        chunked_loss(states, torch.zeros(64, dtype=torch.int64), weight, chunk_bytes=4 * 4000).backward()
    assert largest == 4000


def test_wrong_shapes_and_shares_are_refused():
    states, weight, labels = inputs()
    with pytest.raises(ValueError, match="do not fit"):
        chunked_loss(states, labels[:-1], weight)
    with pytest.raises(ValueError, match="do not fit"):
        chunked_loss(states, labels, weight[:, :-1])
    with pytest.raises(ValueError, match="teacher_share"):
        chunked_loss(states, labels, weight, teacher_share=1.5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows", [1, 3, N])
def test_log_probabilities_of_labels_and_their_gradients(rows, softcap):
    states, weight, labels = inputs()
    logits = states @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = logits.log_softmax(dim=1).gather(1, labels[:, None])[:, 0]
    found = chunked_logprobs(states, labels, weight, softcap=softcap, chunk_bytes=rows * 4 * V)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # Every label weighs something else, and not linearly.
    wanted = torch.autograd.grad((expected.exp() * torch.arange(1.0, N + 1)).sum(), (states, weight))
    grads = torch.autograd.grad((found.exp() * torch.arange(1.0, N + 1)).sum(), (states, weight))
    for grad, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-5, atol=1e-5)
    frozen = chunked_logprobs(states.detach(), labels, weight)
    frozen.sum().backward()
    assert weight.grad is not None
    assert states.grad is None
