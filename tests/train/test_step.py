import itertools
from dataclasses import replace

import pytest
import torch

from tests.train.tiny_run import BOS, PAD, loader, tiny_model
from twofold.config.recipe import OptimizerConfig
from twofold.data import Example, collate
from twofold.train import LossModule, NonFiniteError, token_loss, train_step
from twofold.train import step as step_module
from twofold.train.loss import SparseTeacher
from twofold.train.optimizer import new_optimizer, trainable_parameters
from twofold.train.step import scored_positions
from twofold.train.world import ONE_PROCESS


def setup(learning_rate=1e-2):
    model = tiny_model().train()
    config = OptimizerConfig(learning_rate=learning_rate)
    return model, new_optimizer(model, trainable_parameters(model), config)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def examples(lengths):
    generator = torch.Generator().manual_seed(1)

    def ids(length):
        return torch.randint(0, 256, (length,), generator=generator).numpy()

    return [Example(ids(n), torch.tensor([BOS]).numpy(), ids(n + 2), False) for n in lengths]


def gradients_of(batches):
    """Gradients of one step, read off an update by plain gradient descent with rate 1."""
    model, _ = setup()
    before = weights(model)
    result = train_step(
        LossModule(model), torch.optim.SGD(model.parameters()), batches, step=1, learning_rate=1.0
    )
    return result, {name: before[name] - p.detach() for name, p in model.named_parameters()}


def assert_same_step(one, other):
    (result, gradients), (other_result, other_gradients) = one, other
    assert result.loss == pytest.approx(other_result.loss, rel=1e-5)
    assert result.grad_norm == pytest.approx(other_result.grad_norm, rel=1e-4)
    assert result.scored_tokens == other_result.scored_tokens
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, other_gradients[name], rtol=1e-4, atol=1e-6)


def test_accumulation_equals_one_big_batch():
    # Unequal lengths: a mean of the batches' means would differ.
    rows = [[example] for example in examples([3, 12, 5, 9])]
    one = gradients_of([collate(rows, PAD)])
    several = gradients_of([collate(rows[:1], PAD), collate(rows[1:], PAD)])
    assert_same_step(one, several)


def test_padding_changes_nothing():
    rows = [[example] for example in examples([3, 12])]
    result = gradients_of([collate(rows, PAD)])
    assert_same_step(result, gradients_of([collate(rows, PAD, 40, 40)]))
    assert result[0].real_tokens == (3 + 5) + (12 + 14)
    assert result[0].scored_tokens == 5 + 14


def test_packing_changes_nothing():
    one, other = examples([3, 12])
    assert_same_step(
        gradients_of([collate([[one], [other]], PAD)]), gradients_of([collate([[one, other]], PAD)])
    )


def test_gradients_are_clipped_to_the_norm():
    model, _ = setup()
    before = weights(model)
    sgd = torch.optim.SGD(model.parameters())
    result = train_step(
        LossModule(model), sgd, [next(loader(model))], step=1, learning_rate=1.0, max_grad_norm=1e-3
    )
    moved = torch.cat([(before[name] - p.detach()).flatten() for name, p in model.named_parameters()])
    assert result.grad_norm > 0.1
    assert moved.norm().item() == pytest.approx(1e-3, rel=2e-2)


def test_small_gradients_are_not_scaled_up():
    model, _ = setup()
    batch = next(loader(model))
    _, gradients = gradients_of([batch])
    before = weights(model)
    sgd = torch.optim.SGD(model.parameters())
    train_step(LossModule(model), sgd, [batch], step=1, learning_rate=1.0, max_grad_norm=1e6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(before[name] - parameter.detach(), gradients[name])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_loss_stops_before_the_update(bad):
    model, optimizer = setup()
    with torch.no_grad():
        model.decoder.norm.weight[3] = bad
    before = weights(model)
    with pytest.raises(NonFiniteError, match="step 7"):
        train_step(LossModule(model), optimizer, [next(loader(model))], step=7, learning_rate=0.1)
    assert all(torch.equal(before[n].nan_to_num(), p.nan_to_num()) for n, p in model.named_parameters())
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())


def test_a_non_finite_loss_with_finite_gradients_stops_too(monkeypatch):
    real = step_module.batch_loss
    monkeypatch.setattr(step_module, "batch_loss", lambda *arguments: real(*arguments) + float("inf"))
    model, optimizer = setup()
    before = weights(model)
    with pytest.raises(NonFiniteError, match="loss inf"):
        train_step(LossModule(model), optimizer, [next(loader(model))], step=1, learning_rate=0.1)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_non_finite_gradient_stops_before_the_update():
    model, optimizer = setup()
    model.encoder.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weights(model)
    with pytest.raises(NonFiniteError, match="gradient norm"):
        train_step(
            LossModule(model), optimizer, [next(loader(model))], step=1, learning_rate=0.1, max_grad_norm=1.0
        )
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_no_scored_token_is_refused():
    model, optimizer = setup()
    batch = next(loader(model))
    empty = replace(batch, labels=torch.full_like(batch.labels, -100))
    with pytest.raises(ValueError, match="no scored token"):
        train_step(LossModule(model), optimizer, [empty], step=1, learning_rate=0.1)


def test_the_learning_rate_is_that_of_the_step():
    model, optimizer = setup(learning_rate=1.0)
    before = weights(model)
    result = train_step(LossModule(model), optimizer, [next(loader(model))], step=1, learning_rate=0.0)
    assert result.learning_rate == 0.0
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_bfloat16_computes_near_float32_and_keeps_float32_weights():
    losses = {}
    for precision in ("float32", "bfloat16"):
        model, optimizer = setup()
        batch = next(loader(model))
        result = train_step(LossModule(model, precision), optimizer, [batch], step=1, learning_rate=1e-3)
        losses[precision] = result.loss
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=1e-2)


def test_the_module_gives_the_plain_loss_and_its_gradients():
    model = tiny_model()
    batch = next(loader(model))
    logits = model(
        input_ids=batch.input_ids,
        segment_ids=batch.segment_ids,
        decoder_input_ids=batch.decoder_input_ids,
        decoder_segment_ids=batch.decoder_segment_ids,
    ).logits
    plain, _ = token_loss(logits, batch.labels)
    wanted = torch.autograd.grad(plain, tuple(model.parameters()))
    loss = LossModule(model)(batch, scored_positions(batch))
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    for gradient, expected in zip(torch.autograd.grad(loss, tuple(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_is_asked_in_training_and_not_in_evaluation():
    model = tiny_model()
    batch = next(loader(model))
    scored = scored_positions(batch)
    asked = []

    def teacher(given, positions):
        asked.append(positions)
        n = len(positions)
        return SparseTeacher(torch.zeros(n, 1, dtype=torch.int64), torch.ones(n, 1))

    module = LossModule(model, teacher=teacher)
    plain = LossModule(model)(batch, scored).item()
    assert module(batch, scored).item() == plain  # in eval mode
    assert asked == []
    assert module.train()(batch, scored).item() != plain
    assert torch.equal(asked[0], scored)


def test_a_bad_batch_is_named_with_its_documents():
    batch = replace(next(loader(tiny_model())), documents=())
    known = replace(batch, documents=("corpus.jsonl 17", "corpus.jsonl 4"))
    said = step_module._where_from(ONE_PROCESS, [1.0, float("inf"), float("nan")], [batch, known, batch])
    assert (
        said == ", from batch 1 (documents corpus.jsonl 17, corpus.jsonl 4), 2 (documents unknown) of 0 to 2"
    )
    assert step_module._where_from(ONE_PROCESS, [1.0], [batch]) == ""


def test_every_batch_draws_from_its_own_seed():
    seeds = {step_module.batch_seed(*at) for at in itertools.product(range(3), repeat=3)}
    assert len(seeds) == 27
    assert max(seeds) < 2**63
