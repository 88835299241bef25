"""What only a GPU can show: FlexAttention compiled, with gradients; generation and training there equal the CPU's."""

import pytest
import torch

from tests.models.tiny import MEETINGS, build, gemma_stack, meeting_id, pair_config, random_ids, stack
from twofold.infer import generate
from twofold.models.attention import Backend

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run(model, backend: Backend, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two packed rows, and the gradient of the decoder's first query projection."""
    model = model.to(device)
    model.set_attention_backend(backend)
    model.zero_grad(set_to_none=True)
    ids, target = random_ids(2, 40).to(device), random_ids(2, 30, seed=1).to(device)
    source_segments = torch.tensor([[1] * 15 + [2] * 20 + [0] * 5, [1] * 40], device=device)
    target_segments = torch.tensor([[1] * 12 + [2] * 13 + [0] * 5, [1] * 30], device=device)
    logits = model(ids, None, target, segment_ids=source_segments, decoder_segment_ids=target_segments).logits
    logits[target_segments > 0].square().mean().backward()
    gradient = model.decoder.layers[0].self_attn.q_proj.weight.grad
    return logits[target_segments > 0].detach().cpu(), gradient.cpu()


@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
def test_flex_equals_eager_with_soft_caps_windows_and_segments(meeting):
    config = pair_config(
        gemma_stack(head_dim=16), encoder_mask=("sink", "bidirectional", "causal"), **meeting
    )
    expected, expected_gradient = run(build(config, qk_factor=2.0), "eager", "cpu")
    found, gradient = run(build(config, qk_factor=2.0), "flex", "cuda")
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    assert (gradient - expected_gradient).abs().max() < 1e-3 * expected_gradient.abs().max()


def test_sdpa_equals_eager():
    config = pair_config(stack(head_dim=16), encoder_mask=("sink", "bidirectional", "causal"))
    expected, expected_gradient = run(build(config), "eager", "cpu")
    found, gradient = run(build(config), "sdpa", "cuda")
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    assert (gradient - expected_gradient).abs().max() < 1e-3 * expected_gradient.abs().max()


def test_greedy_output_equals_the_cpus():
    model = build(pair_config(gemma_stack(head_dim=16)), qk_factor=2.0)
    sources, prefixes = [[5, 6, 7, 8, 9], [12]], [[2], [2, 20, 21]]
    expected = generate(model, sources, prefixes, max_new_tokens=8, stop_token_ids=[])
    assert generate(model.cuda(), sources, prefixes, max_new_tokens=8, stop_token_ids=[]) == expected
