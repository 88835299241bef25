"""Linear layers by our own kernels against torch's, and the decoder that is made of them."""

import pytest
import torch
from torch import nn

from tests.models.tiny import MEETINGS, assert_same, build, gemma_stack, meeting_id, pair_config, stack
from twofold.infer.backends import narrow
from twofold.infer.backends.matrices import Matrices
from twofold.infer.backends.narrow import NarrowDecoder
from twofold.infer.backends.rounding import int8_rows

FORMATS = ("float32", "bfloat16", "int8")


def rounded(weight, format):
    """What a format makes of a weight, in float32."""
    if format == "int8":
        whole, scale = int8_rows(weight)
        return whole.float() * scale
    return weight.bfloat16().float() if format == "bfloat16" else weight


def round_matrices(model, format):
    """In place: all that `NarrowDecoder` reads as a matrix, each once."""
    done = set()
    for name, module in model.named_modules():
        is_read = name.startswith(("model.decoder.layers", "lm_head"))
        if isinstance(module, nn.Linear) and is_read and module.weight.data_ptr() not in done:
            module.weight.data.copy_(rounded(module.weight.data, format))
            done.add(module.weight.data_ptr())


def multiply(modules, format, x, **options):
    matrices = Matrices(modules, format, **options)
    out = torch.full((len(x), matrices.n_outputs), torch.nan)
    matrices.multiply(x.numpy(), out.numpy())
    return out


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("n_tokens", [1, 2, 3, 4, 5])
def test_several_matrices_equal_linear_layers(format, n_tokens):
    """Blocks of 32 outputs that are not filled, inputs that fill no vector, layers with and without biases."""
    torch.manual_seed(n_tokens)
    modules = [
        nn.Linear(37, 70),
        nn.Linear(37, 3, bias=False),
        nn.Linear(37, 32),
        nn.Linear(37, 33, bias=False),
    ]
    x = torch.randn(n_tokens, 37)
    expected = torch.cat(
        [nn.functional.linear(x, rounded(m.weight.data, format), m.bias) for m in modules], dim=-1
    )
    assert_same(multiply(modules, format, x), expected.detach())


@pytest.mark.parametrize("format", FORMATS)
def test_rounded_to_nearest(format):
    weight = torch.randn(5, 64)
    step = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 0.5 / 127}[format]
    largest = weight.abs().amax(dim=1, keepdim=True) if format == "int8" else weight.abs()
    linear = nn.Linear(64, 5, bias=False)
    linear.weight.data = weight
    found = multiply([linear], format, torch.eye(64)).T
    assert ((found - weight).abs() <= step * largest * 1.001).all()
    assert (found - weight).abs().max() >= 0.5 * step * largest.max() * 0.1


def test_softcap():
    linear = nn.Linear(8, 40)
    linear.weight.data *= 100
    x = torch.randn(3, 8)
    expected = 30.0 * torch.tanh(linear(x) / 30.0)
    found = multiply([linear], "float32", x, softcap=30.0)
    assert (found - expected).abs().max() < 1e-5
    assert found.abs().max() > 25


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_broken_weights_are_seen(softcap):
    """No number stays none, for the engine to refuse it."""
    linear = nn.Linear(8, 40)
    linear.weight.data[17, 3] = torch.nan
    found = multiply([linear], "float32", torch.ones(2, 8), softcap=softcap)
    assert found.isnan().nonzero().tolist() == [[0, 17], [1, 17]]


def test_float32_matrices_are_the_models_own():
    linear = nn.Linear(8, 4, bias=False)
    matrices = Matrices([linear], "float32")
    out = torch.empty(1, 4)
    with torch.no_grad():
        linear.weight.fill_(2.0)
    matrices.multiply(torch.ones(1, 8).numpy(), out.numpy())
    assert out.tolist() == [[16.0] * 4]


def attend_by_name(layer, attention, q, new, out):
    """Some function of all that attention is given."""
    out[:] = q * (layer + 1)
    if new is not None:
        out += (new[0] - 0.5 * new[1]).repeat(q.shape[1] // new[0].shape[1], axis=1)


@pytest.mark.parametrize("format", ["bfloat16", "int8"])
@pytest.mark.parametrize("meeting", [MEETINGS[i] for i in (0, 15)], ids=meeting_id)
@pytest.mark.parametrize("family", [gemma_stack, stack])
def test_nothing_but_weights_is_rounded(format, meeting, family):
    model = build(pair_config(family(), tie_word_embeddings="none", **meeting), qk_factor=2.0)
    ids, positions = torch.tensor([5, 6, 7]), torch.tensor([3, 0, 8])
    found = NarrowDecoder(model, format).run(ids, positions, attend_by_name).clone()
    exact = NarrowDecoder(model, "float32").run(ids, positions, attend_by_name).clone()
    round_matrices(model, format)
    assert_same(NarrowDecoder(model, "float32").run(ids, positions, attend_by_name), found)
    assert (found - exact).abs().max() > 1e-3


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "gelu"])
def test_activations(activation):
    model = build(pair_config(stack(hidden_activation=activation)))
    mlp = model.decoder.layers[0].mlp
    x = 3 * torch.randn(2, mlp.gate_proj.in_features)
    wide = torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], dim=-1).detach()
    out = torch.empty(2, wide.shape[1] // 2)
    narrow._gated(wide.numpy(), narrow._ACTIVATIONS[activation], out.numpy())
    assert_same(out, mlp.inner(x).detach())
