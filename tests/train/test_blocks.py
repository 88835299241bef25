from functools import partial

import pytest
import torch

from tests.train.tiny_run import loader, tiny_model
from twofold.models.attention import Attention
from twofold.models.stack import DecoderBlock, EncoderBlock
from twofold.train import LossModule
from twofold.train.blocks import blocks_of, checkpoint_activations, compile_blocks, restore_blocks
from twofold.train.step import scored_positions


def loss_and_gradients(model):
    batch = next(loader(model))
    torch.manual_seed(3)  # dropout
    loss = LossModule(model)(batch, scored_positions(batch))
    return loss, torch.autograd.grad(loss, tuple(model.parameters()), materialize_grads=True)


def saved_bytes(model):
    """Bytes that autograd keeps for the backward pass, each storage once, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = next(loader(model))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        LossModule(model)(batch, scored_positions(batch))
    return sum(seen.values())


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-6, atol=0)
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("dropout", [0.2, 0.0])  # with dropout another attention kernel is used
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("meeting", [{}, {"layout": "merged", "reads": "aligned", "cross_rope": True}])
def test_checkpointing_changes_no_gradient_and_keeps_dropout(mode, meeting, softcap, dropout):
    model = tiny_model(dropout=dropout, **meeting).train()
    for module in model.modules():
        if isinstance(module, Attention):
            module.softcap = softcap
    plain = loss_and_gradients(model)
    checkpoint_activations(model, mode)
    assert_same(loss_and_gradients(model), plain)


def test_checkpointing_computes_blocks_again_and_full_keeps_only_their_inputs():
    model = tiny_model().train()
    forwards = []
    for block in blocks_of(model):
        block.mlp.gate_proj.register_forward_hook(lambda *_: forwards.append(1))
    loss_and_gradients(model)
    assert len(forwards) == 4
    plain = saved_bytes(model)
    checkpoint_activations(model, "full")
    forwards.clear()
    loss_and_gradients(model)
    assert len(forwards) == 8
    assert saved_bytes(model) < 0.5 * plain


def test_names_and_evaluation_stay_and_all_is_undone():
    model = tiny_model()
    names = list(model.state_dict())
    plain = loss_and_gradients(model)[0]
    checkpoint_activations(model, "full")
    assert list(model.state_dict()) == names
    with torch.no_grad():
        batch = next(loader(model))
        assert LossModule(model)(batch, scored_positions(batch)).item() == pytest.approx(
            plain.item(), rel=1e-6
        )
    restore_blocks(model)
    assert all("forward" not in block.__dict__ for block in blocks_of(model))
    assert [type(b) for b in blocks_of(model)] == [EncoderBlock] * 2 + [DecoderBlock] * 2


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_compiled_blocks_give_the_same_gradients(mode, monkeypatch):
    # The graphs are captured and differentiated as for a device; C++ for this processor would take minutes.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = tiny_model().train()
    plain = loss_and_gradients(model)
    checkpoint_activations(model, mode)
    compile_blocks(model)
    assert_same(loss_and_gradients(model), plain)
