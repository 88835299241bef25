import pytest
import torch

from twofold.train.loss import SparseTeacher, TeacherHead, chunked_loss
from twofold.train.sparse import sampled_entries, top_k_entries


def test_top_k_of_a_literal_distribution():
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    entries = top_k_entries(probabilities.log() + 5.0, 2)
    assert entries.ids_NK.tolist() == [[1, 3]]
    torch.testing.assert_close(entries.shares_NK, torch.tensor([[4 / 7, 3 / 7]]))
    torch.testing.assert_close(entries.kept_N, torch.tensor([0.7]))


def test_top_k_of_all_is_the_distribution():
    torch.manual_seed(0)
    logits = torch.randn(5, 7)
    entries = top_k_entries(logits, 100)
    dense = torch.zeros(5, 7).scatter(1, entries.ids_NK, entries.shares_NK)
    torch.testing.assert_close(dense, logits.softmax(1))
    torch.testing.assert_close(entries.kept_N, torch.ones(5))


def test_draws_are_counted():
    logits = torch.tensor([[0.0, -torch.inf, -torch.inf], [0.0, 0.0, -torch.inf]])
    entries = sampled_entries(logits, 64, torch.Generator().manual_seed(0))
    dense = torch.zeros(2, 3).scatter_add(1, entries.ids_NK, entries.shares_NK)
    assert dense[0].tolist() == [1.0, 0.0, 0.0]
    assert 0.3 < float(dense[1, 0]) < 0.7
    assert dense.sum(1).tolist() == [1.0, 1.0]
    # One entry for each token that was drawn.
    assert (entries.shares_NK > 0).sum(1).tolist() == [1, 2]
    assert entries.kept_N.tolist() == [1.0, 1.0]
    # Counts over 64 are exact in float16.
    assert torch.equal(entries.shares_NK.half().float(), entries.shares_NK)


def test_draws_depend_on_the_seed_alone():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    first, again, other = (sampled_entries(logits, 8, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first.ids_NK, again.ids_NK)
    assert torch.equal(first.shares_NK, again.shares_NK)
    assert not torch.equal(first.ids_NK, other.ids_NK)


@pytest.mark.parametrize("k", [1, 4, 256])
def test_the_loss_of_draws_is_unbiased(k):
    generator = torch.Generator().manual_seed(2)
    n, v, d = 6, 40, 8
    states, weight = torch.randn(n, d, generator=generator), torch.randn(v, d, generator=generator)
    teacher_states, teacher_weight = (
        torch.randn(n, 4, generator=generator),
        torch.randn(v, 4, generator=generator),
    )
    labels = torch.zeros(n, dtype=torch.int64)
    full = chunked_loss(
        states,
        labels,
        weight,
        teacher=TeacherHead(teacher_states, teacher_weight, None, torch.ones(n, dtype=torch.bool)),
    )
    logits = teacher_states @ teacher_weight.t()
    losses = []
    for seed in range(400):
        entries = sampled_entries(logits, k, torch.Generator().manual_seed(seed))
        teacher = SparseTeacher(entries.ids_NK, entries.shares_NK)
        losses.append(float(chunked_loss(states, labels, weight, teacher=teacher)))
    mean, deviation = torch.tensor(losses).mean(), torch.tensor(losses).std()
    # Four standard errors of the mean; the full loss is far from that of the likeliest token.
    assert abs(float(mean - full)) < 4 * float(deviation) / len(losses) ** 0.5
    top = top_k_entries(logits, 1)
    of_top = chunked_loss(states, labels, weight, teacher=SparseTeacher(top.ids_NK, top.shares_NK))
    assert abs(float(mean - full)) < 0.2 * abs(float(of_top - full))


def test_a_teacher_of_fewer_tokens_than_the_student():
    generator = torch.Generator().manual_seed(3)
    states, weight = torch.randn(3, 8, generator=generator), torch.randn(12, 8, generator=generator)
    states.requires_grad_()
    said, head = torch.randn(3, 4, generator=generator), torch.randn(10, 4, generator=generator)
    speaks = torch.tensor([True, False, True])
    labels = torch.tensor([1, 11, 2])
    loss = chunked_loss(states, labels, weight, teacher=TeacherHead(said, head, None, speaks))
    wanted = torch.zeros(3, 12)
    wanted[:, :10] = (said @ head.t()).softmax(1)
    wanted[1] = torch.nn.functional.one_hot(labels[1], 12).float()
    plain = -(wanted * (states @ weight.t()).log_softmax(1)).sum()
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-5)
    gradients = [torch.autograd.grad(value, states)[0] for value in (loss, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
