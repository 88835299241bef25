"""Quantised linear layers through torchao, as far as it goes without a CUDA device."""

import sys

import pytest
import torch
from torch import nn

from tests.infer.backends.test_backends import paged, start
from tests.models.tiny import pair_config, stack
from twofold.infer.backends import TorchBackend
from twofold.infer.backends.weight_only import quantise
from twofold.models import EncoderDecoder


def bfloat16_model(**changes) -> EncoderDecoder:
    model = EncoderDecoder(pair_config(stack(), layout="merged", **changes)).eval()
    model.initialise_randomly(0)
    return model.to(torch.bfloat16)


def test_int8_is_near_and_takes_every_matrix():
    pytest.importorskip("torchao", reason="needs the extra 'cuda'")
    exact, near = bfloat16_model(), bfloat16_model(tie_stacks=True, tie_word_embeddings="all")
    near.load_state_dict(exact.state_dict())
    quantise(near, "int8")
    assert {type(m.weight).__name__ for m in near.modules() if isinstance(m, nn.Linear)} == {"Int8Tensor"}
    assert type(near.decoder.embed_tokens.weight) is nn.Parameter
    once = near.decoder.layers[0].mlp.up_proj.weight
    quantise(near, "int8")
    assert near.decoder.layers[0].mlp.up_proj.weight is once


def test_steps_in_int8_are_near():
    pytest.importorskip("torchao", reason="needs the extra 'cuda'")
    exact, near = bfloat16_model(), bfloat16_model()
    quantise(near, "int8")
    reference, backend = TorchBackend(exact), paged(near)
    (held, theirs), (other, ours) = reference.start([start(0)])[0], backend.start([start(0)])[0]
    assert 1e-4 < (ours - theirs).square().mean().sqrt() / theirs.std() < 0.03
    theirs, ours = reference.step([held], [[5]])[0], backend.step([other], [[5]])[0]
    assert 1e-4 < (ours - theirs).square().mean().sqrt() / theirs.std() < 0.03


def test_missing_torchao_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(
        ImportError, match=r"precision='int4' on CUDA needs torchao; pip install 'twofold\[cuda\]'"
    ):
        quantise(bfloat16_model(), "int4")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "most"), [("int8", 0.03), ("int4", 0.3)])
def test_engines_on_cuda_run_it(precision, most):
    pytest.importorskip("torchao", reason="needs the extra 'cuda'")
    from twofold.infer.backends import make_backend

    wide = stack(hidden_size=256, intermediate_size=512)
    exact, near = (EncoderDecoder(pair_config(wide, layout="merged")).eval().cuda() for _ in "ab")
    for model in (exact, near):
        model.initialise_randomly(0)
    ours, theirs = make_backend(near, precision=precision), make_backend(exact, precision="bfloat16")
    (held, _), (other, _) = ours.start([start(0)])[0], theirs.start([start(0)])[0]
    a, b = ours.step([held], [[5]])[0], theirs.step([other], [[5]])[0]
    assert (a - b).square().mean().sqrt() / b.std() < most
