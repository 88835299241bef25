import pytest
import torch

from tests.train.tiny_run import loader, tiny_model
from twofold.train import LossModule, evaluate, token_loss


def test_every_token_has_the_same_weight_and_dropout_is_off():
    model = tiny_model(dropout=0.5).train()
    batches = list(loader(model, packing=False, rows_per_batch=5).one_pass())
    sizes = [batch.num_scored_tokens for batch in batches]
    assert len(set(sizes)) > 1
    evaluation = evaluate(LossModule(model), batches)
    assert model.training
    model.eval()
    total = 0.0
    for b in batches:
        with torch.no_grad():
            logits = model(
                b.input_ids,
                decoder_input_ids=b.decoder_input_ids,
                segment_ids=b.segment_ids,
                decoder_segment_ids=b.decoder_segment_ids,
            ).logits
        total += token_loss(logits, b.labels)[0].item()
    assert evaluation.scored_tokens == sum(sizes)
    assert evaluation.loss == pytest.approx(total / sum(sizes), rel=1e-6)


def test_it_leaves_random_numbers_and_gradients_alone():
    model = tiny_model(dropout=0.5).train()
    before = torch.get_rng_state()
    evaluate(LossModule(model), loader(model).one_pass())
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="no scored token"):
        evaluate(LossModule(tiny_model()), [])
