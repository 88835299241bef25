"""What only a GPU can show: FlexAttention compiled, with gradients; generation and training there equal the CPU's."""

import pytest
import torch

from tests.models.tiny import MEETINGS, build, gemma_stack, meeting_id, pair_config, random_ids, stack
from twofold.infer import generate
from twofold.models.attention import Backend, attend
from twofold.models.masks import AttentionMask, Rule, Tokens

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


def long_masks() -> dict[str, AttentionMask]:
    """Several blocks of 128 in each direction, none of the lengths a multiple of it; two rows, the second padded
    on the left."""
    own = Tokens.from_segments(
        torch.tensor([[1] * 150 + [2] * 30 + [3] * 280 + [0] * 20, [0] * 40 + [1] * 440])
    )
    source = Tokens.from_segments(
        torch.tensor([[1] * 290 + [2] * 60 + [3] * 150, [0] * 7 + [1] * 200 + [0] * 293])
    )
    later = own.continued_after(source)
    return {
        "bidirectional": AttentionMask(own, (own, Rule())),
        "causal": AttentionMask(own, (own, Rule(future=0))),
        "sink": AttentionMask(own, (own, Rule(sink=True))),
        "window": AttentionMask(own, (own, Rule(past=63, future=64))),
        "causal window": AttentionMask(own, (own, Rule(past=99, future=0))),
        "cross": AttentionMask(own, (source, Rule())),
        "merged": AttentionMask(own, (source, Rule()), (own, Rule(past=99, future=0))),
        "continuing": AttentionMask(later, (source, Rule(past=99)), (later, Rule(past=99, future=0))),
    }


def on_cuda(tokens: Tokens) -> Tokens:
    return Tokens(tokens.positions.cuda(), tokens.segments.cuda(), tokens.is_plain)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "head_dim", "dtype", "tolerance"),
    [
        (4, 2, 64, torch.float32, 1e-4),
        (3, 3, 16, torch.float32, 1e-4),
        (
            2,
            1,
            256,
            torch.bfloat16,
            3e-2,
        ),  # in float32 a block of this width may not fit the GPU's shared memory
    ],
)
@pytest.mark.parametrize("name", long_masks())
def test_flex_equals_eager_over_many_blocks(name, n_heads, n_kv_heads, head_dim, dtype, tolerance, softcap):
    """Result and gradients, the kernel reading the block lists, against the dense mask on the CPU in float32."""
    mask = long_masks()[name]
    n_batch, n_queries, n_keys = mask.dense.shape
    generator = torch.Generator().manual_seed(0)
    shapes = [(n_heads, n_queries), (n_kv_heads, n_keys), (n_kv_heads, n_keys), (n_heads, n_queries)]
    *tensors, weights = (
        torch.randn(n_batch, *shape, head_dim, generator=generator).to(dtype) for shape in shapes
    )
    scale = 3 * head_dim**-0.5

    def result_and_gradients(backend, device, dtype, mask):
        leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in tensors]
        out = attend(*leaves, mask, scale=scale, softcap=softcap, backend=backend)
        gradients = torch.autograd.grad((out * weights.to(device)).sum(), leaves)
        return [x.detach().float().cpu() for x in (out, *gradients)]

    parts = [(on_cuda(keys), rule) for keys, rule in mask.parts]
    found = result_and_gradients("flex", "cuda", dtype, AttentionMask(on_cuda(mask.queries), *parts))
    expected = result_and_gradients("eager", "cpu", torch.float32, mask)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


def test_auto_makes_no_dense_mask_for_packed_training():
    """8192 tokens in 4 rows: the mask alone would be 268 MB."""
    torch.manual_seed(0)
    n = 8192
    segments = (1 + torch.arange(n, device="cuda") // 500).expand(4, n).contiguous()
    tokens = Tokens.from_segments(segments)
    mask = AttentionMask(tokens, (tokens, Rule(future=0)))
    q, k, v = (torch.randn(4, 2, n, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    attend(*leaves, mask, scale=0.125).sum().backward()  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fresh = AttentionMask(tokens, (tokens, Rule(future=0)))
    attend(*leaves, fresh, scale=0.125).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 200e6


def test_greedy_output_equals_the_cpus():
    model = build(pair_config(gemma_stack(head_dim=16)), qk_factor=2.0)
    sources, prefixes = [[5, 6, 7, 8, 9], [12]], [[2], [2, 20, 21]]
    expected = generate(model, sources, prefixes, max_new_tokens=8, stop_token_ids=[])
    assert generate(model.cuda(), sources, prefixes, max_new_tokens=8, stop_token_ids=[]) == expected
