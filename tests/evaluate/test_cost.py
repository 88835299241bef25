"""Operations against the published figures and PyTorch's own counter; bytes against the engine's accounting."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.evaluate.examples import one_stack
from tests.models import hf
from tests.models.test_flops import TABLE, t5gemma
from tests.models.tiny import MEETINGS, build, gemma_stack, meeting_id, pair_config, random_ids, stack
from twofold.config import EncoderDecoderConfig
from twofold.evaluate import contender_config, kind_of, open_contender
from twofold.evaluate.cost import answer_flops, footprint
from twofold.infer.backends.base import Start
from twofold.infer.backends.torch_backend import TorchBackend
from twofold.models.flops import attention_pairs

N, M = 11, 7


def start(n_source: int, n_tokens: int) -> Start:
    """One row over a source."""
    return Start(source_ids=(5,) * n_source, prefix_ids=(2,), n_rows=1, n_tokens=n_tokens)


def hidden_work(config: EncoderDecoderConfig, n: int, m: int) -> tuple[int, int]:
    """Operations on hidden (query, key) pairs, which the eager reference computes too: reading, then writing."""
    pairs = attention_pairs(config, n, m)
    per_pair = [4 * side.num_attention_heads * side.head_dim for side in (config.encoder, config.decoder)]
    reading = sum(n * n - visible for visible in pairs.encoder)
    writing = sum(m * (m + n) - own - cross for own, cross in zip(pairs.decoder, pairs.cross, strict=True))
    return per_pair[0] * reading, per_pair[1] * writing


@pytest.mark.parametrize("side", [stack(), gemma_stack(sliding_window=4)], ids=["llama", "gemma"])
@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
def test_reading_and_writing_are_what_the_dispatcher_sees(meeting, side):
    config = pair_config(side, **meeting)
    model = build(config)
    model.set_attention_backend("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(random_ids(1, N), decoder_input_ids=random_ids(1, M))
    found = answer_flops(config, N, M)
    hidden_reading, hidden_writing = hidden_work(config, N, M)
    assert found.total + hidden_reading + hidden_writing == counter.get_total_flops()

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encode(random_ids(1, N))
    width = side.num_key_value_heads * side.head_dim
    keys_values = side.num_hidden_layers * 2 * 2 * side.hidden_size * width * N
    assert found.reading + hidden_reading == counter.get_total_flops() + keys_values


@pytest.mark.filterwarnings("ignore:.*no tokenizer files")
@pytest.mark.parametrize("family", hf.DONOR_CONFIGS)
def test_decoder_only_models_cost_what_transformers_computes(family, tmp_path):
    donor = hf.donor(hf.DONOR_CONFIGS[family]).eval()
    donor.set_attn_implementation("eager")
    donor.save_pretrained(tmp_path / "donor")
    config = contender_config(tmp_path / "donor")
    assert config == open_contender(tmp_path / "donor").model.config
    assert kind_of(config) == "decoder-only"
    side, total = config.decoder, N + M
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        donor(random_ids(1, total), logits_to_keep=M)
    with torch.no_grad(), FlopCounterMode(display=False) as prompt:
        donor.model(random_ids(1, N))

    def hidden(length: int) -> int:
        windows = [length if kind == "full_attention" else side.sliding_window for kind in side.layer_types]
        seen = sum(min(query + 1, window) for window in windows for query in range(length))
        return 4 * side.num_attention_heads * side.head_dim * (length * length * len(windows) - seen)

    found = answer_flops(config, N, M)
    # RoPE's table is a product of positions and frequencies in transformers, which is not the model's work.
    assert math.isclose(found.total + hidden(total), whole.get_total_flops(), rel_tol=0.01)
    assert math.isclose(found.reading + hidden(N), prompt.get_total_flops(), rel_tol=0.01)
    assert footprint(config, "float32").parameters == sum(p.numel() for p in donor.parameters())


@pytest.mark.parametrize("size", TABLE)
def test_the_published_sizes_at_4096_tokens(size):
    pair = t5gemma(size, size)
    decoder_only, encoder_decoder = TABLE[size]
    assert round(answer_flops(one_stack(pair), 4096, 4096).total / 1e14, 3) == decoder_only
    assert round(answer_flops(pair, 4096, 4096).total / 1e14, 3) == encoder_decoder


def test_an_unbalanced_pair_reads_with_9b_and_writes_with_2b():
    found = answer_flops(t5gemma("9B", "2B"), 4096, 4096)
    assert round(found.total / 1e14, 3) == 1.101
    small = answer_flops(t5gemma("2B", "2B"), 4096, 4096)
    assert found.writing == small.writing
    assert found.reading > 3 * small.reading
    with pytest.raises(ValueError, match="lengths must be 0 or more tokens, got -1 to read and 3"):
        answer_flops(t5gemma("2B", "2B"), -1, 3)


@pytest.mark.parametrize(
    ("sides", "pair", "decoder_only"), [("2B 2B", 2.860, 2.614), ("9B 2B", 2.860, 2.614), ("9B 9B", 10.474, 9.241)]
)  # fmt: skip
def test_weights_read_for_each_token(sides, pair, decoder_only):
    """The derived figures of the papers' sizes, in 1e9, whose last digit depends on whether norms are counted."""
    config = t5gemma(*sides.split())
    for one, expected in [(config, pair), (one_stack(config), decoder_only)]:
        found = footprint(one, "float32").parameters_per_token / 1e9
        assert found == pytest.approx(expected, abs=1.2e-3)


@pytest.mark.parametrize("meeting", [MEETINGS[i] for i in (0, 8, -1)], ids=meeting_id)
def test_weights_read_for_each_token_are_those_of_a_step(meeting):
    """Parameters that a step really touches, by what changes its logits."""
    config = pair_config(stack(), **meeting)
    model = build(config)
    backend = TorchBackend(model)
    ((held, _),) = backend.start([start(3, 4)])
    (before,) = backend.step([held], [[9]])
    read = 0
    for name, parameter in model.named_parameters():
        ((held, _),) = backend.start([start(3, 4)])
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.5).add_(0.1)
        (after,) = backend.step([held], [[9]])
        with torch.no_grad():
            parameter.copy_(kept)
        read += parameter.numel() if not torch.equal(before, after) else 0
        if torch.equal(before, after):
            assert "encoder" in name or "cross_attn.k" in name or "cross_attn.v" in name or "source_" in name
    assert footprint(config, "float32").parameters_per_token == read


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
def test_cache_bytes_are_the_engines(precision):
    pytest.importorskip("openvino")
    from twofold.infer.backends.openvino.backend import OpenVinoBackend

    side = stack(
        layer_types=("full_attention",) * 3, sliding_window=None, hidden_size=64, intermediate_size=64
    )
    config = pair_config(side, stack(num_hidden_layers=2, layer_types=("full_attention",) * 2))
    found = footprint(config, precision).cache_bytes_per_token
    backends = [OpenVinoBackend(build(config), precision, threads=1)]
    if precision in ("float32", "bfloat16"):
        backends.append(TorchBackend(build(config).to(getattr(torch, precision))))
    for backend in backends:
        base = backend.bytes_needed(start(4, 4))
        assert backend.bytes_needed(start(5, 4)) - base == found
        assert backend.bytes_needed(start(4, 5)) - base == found


def test_bytes_of_each_precision():
    """By hand: a stack of 32 x 40 tables, one layer a side, heads of 8."""
    side = stack(num_hidden_layers=1, layer_types=("full_attention",))
    config = pair_config(side, tie_word_embeddings="all")
    attention = {(32, 32): 2, (16, 32): 2}  # q and o; k and v
    mlp = {(48, 32): 2, (32, 48): 1}
    matrices = [(40, 32)]
    for layer in (attention, mlp):
        matrices += [shape for shape, count in layer.items() for _ in range(2 * count)]
    matrices += [shape for shape, count in attention.items() for _ in range(count)]  # cross-attention
    vectors = 2 * (2 * 32) + 32 + 2 * 32
    weights = sum(n_out * n_in for n_out, n_in in matrices)
    assert footprint(config, "float32").parameters == weights + vectors
    assert footprint(config, "float32").weight_bytes == 4 * (weights + vectors)
    assert footprint(config, "bfloat16").weight_bytes == 2 * (weights + vectors)
    rows = sum(n_out for n_out, _ in matrices)
    assert footprint(config, "int8").weight_bytes == weights + 4 * rows + 4 * vectors
    groups = sum(n_out * (n_in // math.gcd(n_in, 64)) for n_out, n_in in matrices)
    assert footprint(config, "int4").weight_bytes == weights // 2 + 4 * groups + 4 * vectors
