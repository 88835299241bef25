"""GGUF donors against the weights they were converted from and against what transformers reads."""

import sys

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from twofold.checkpoint import GGUFSource, gguf_config, gguf_tokenizer
from twofold.checkpoint.gguf_header import read_gguf_header

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3"]
GEMMA_KEYS = {"attention.key_length": 16, "attention.sliding_window": 32}


def extra_keys(architecture):
    if architecture.startswith("gemma"):
        return GEMMA_KEYS
    return {"attention.key_length": 16} if architecture == "qwen3" else {}


def transformers_weights(path):
    """What transformers makes of the file, without the second name of a tied head.

    With our config: transformers' own reading of a Qwen 3 file ignores its head width.
    """
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=AutoConfig.for_model(**gguf_config(path)),
        quantization_config=GgufConfig(dequantize=True),
    )
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def assert_same(source, expected):
    assert sorted(source.names()) == sorted(expected)
    for name, value in expected.items():
        got = source.get(name)
        assert tuple(got.shape) == tuple(value.shape) == source.shape(name), name
        assert got.dtype == source.dtype(name), name
        assert torch.equal(got, value), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gives_back_the_weights_it_was_converted_from(write_gguf, donor_weights, architecture):
    path = write_gguf(architecture, **extra_keys(architecture))
    expected = {}
    for name, value in donor_weights(architecture).items():
        if architecture.startswith("gemma") and "norm" in name:
            value = (value + np.float32(1)) - np.float32(1)  # what float32 leaves of 1 + w
        expected[name] = torch.from_numpy(value)
    with GGUFSource(path) as source:
        assert source.description == str(path)
        assert_same(source, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_reads_the_same(write_gguf, architecture):
    quantised = {"blk.0.ffn_down.weight": "Q8_0", "blk.1.attn_q.weight": "Q4_0", "token_embd.weight": "Q8_0"}
    path = write_gguf(architecture, quantised=quantised, **extra_keys(architecture))
    assert_same(GGUFSource(path), transformers_weights(path))


def test_rows_of_llama_projections_are_put_back(write_gguf):
    # One head of 4: the converter wrote rows (0, 2, 1, 3), pairs of RoPE side by side.
    stored = np.array([[0.0], [2.0], [1.0], [3.0]], np.float32)
    tensors = {"blk.0.attn_q.weight": stored, "blk.0.attn_k.weight": stored, "blk.0.attn_v.weight": stored}
    heads = {"attention.head_count": 1, "attention.head_count_kv": 1}
    source = GGUFSource(write_gguf("llama", tensors, **heads))
    assert source.get("model.layers.0.self_attn.q_proj.weight").flatten().tolist() == [0, 1, 2, 3]
    assert source.get("model.layers.0.self_attn.k_proj.weight").flatten().tolist() == [0, 1, 2, 3]
    assert source.get("model.layers.0.self_attn.v_proj.weight").flatten().tolist() == [0, 2, 1, 3]
    other = GGUFSource(write_gguf("qwen2", tensors, **heads))
    assert other.get("model.layers.0.self_attn.q_proj.weight").flatten().tolist() == [0, 2, 1, 3]


def test_llama_biases_are_put_back(write_gguf):
    tensors = {"blk.0.attn_q.bias": np.array([0.0, 2.0, 1.0, 3.0], np.float32)}
    source = GGUFSource(write_gguf("llama", tensors, **{"attention.head_count": 1}))
    assert source.get("model.layers.0.self_attn.q_proj.bias").tolist() == [0, 1, 2, 3]


def test_gemma_norms_lose_their_one(write_gguf):
    tensors = {
        "blk.0.attn_norm.weight": np.array([1.5, 0.0], np.float32),
        "blk.0.post_ffw_norm.weight": np.array([3.0, 1.0], np.float16),
        "blk.0.ffn_up.weight": np.array([[1.5, 0.0]], np.float32),
    }
    source = GGUFSource(write_gguf("gemma2", tensors))
    assert source.get("model.layers.0.input_layernorm.weight").tolist() == [0.5, -1]
    half = "model.layers.0.post_feedforward_layernorm.weight"
    assert source.dtype(half) == source.get(half).dtype == torch.float32
    assert source.get(half).tolist() == [2, 0]
    assert source.get("model.layers.0.mlp.up_proj.weight").tolist() == [[1.5, 0]]


def test_native_dtypes_are_kept(write_gguf):
    tensors = {
        "token_embd.weight": np.array([[1.0, -2.5]], np.float16),
        "blk.0.ffn_up.weight": np.array([[3.0, 0.1, -1.0]], np.float32),
        "blk.0.attn_norm.weight": np.array([3.0, 0.1], np.float32),
    }
    source = GGUFSource(write_gguf("qwen2", tensors, quantised={"blk.0.ffn_up.weight": "BF16"}))
    expected = {
        "model.embed_tokens.weight": torch.tensor([[1, -2.5]], dtype=torch.float16),
        "model.layers.0.mlp.up_proj.weight": torch.tensor([[3, 0.1, -1]], dtype=torch.bfloat16),
        "model.layers.0.input_layernorm.weight": torch.tensor([3, 0.1]),
    }
    assert_same(source, expected)


def test_pieces_add_up_to_the_whole_tensor(write_gguf, monkeypatch):
    monkeypatch.setattr("twofold.checkpoint.gguf._CHUNK_BYTES", 4 * 64 * 5)  # 5 rows of 64 at a time
    value = np.random.default_rng(1).standard_normal((13, 64)).astype(np.float32)
    source = GGUFSource(
        write_gguf("qwen2", {"token_embd.weight": value}, quantised={"token_embd.weight": "Q4_0"})
    )
    kind = gguf.GGMLQuantizationType.Q4_0
    whole = gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind)
    assert source.dtype("model.embed_tokens.weight") == torch.float32
    assert torch.equal(source.get("model.embed_tokens.weight"), torch.from_numpy(whole))


def test_untied_head(write_gguf, donor_weights, to_gguf):
    weights = donor_weights("llama") | {"lm_head.weight": np.ones((48, 64), np.float32)}
    path = write_gguf("llama", to_gguf("llama", weights))
    assert GGUFSource(path).get("lm_head.weight").sum() == 48 * 64
    assert gguf_config(path)["tie_word_embeddings"] is False
    assert gguf_config(write_gguf("llama"))["tie_word_embeddings"] is True


def test_tensors_without_a_place_are_listed(write_gguf):
    tensors = {name: np.ones((2, 2), np.float32) for name in ("blk.0.ffn_gate_exps.weight", "cls.weight")}
    path = write_gguf("llama", tensors | {"token_embd.weight": np.ones((2, 2), np.float32)})
    for read in (GGUFSource, gguf_config):
        with pytest.raises(ValueError, match=r"2 tensors .*: blk\.0\.ffn_gate_exps\.weight, cls\.weight"):
            read(path)
    norm = {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}
    with pytest.raises(ValueError, match=r"no place in a dense llama model: blk\.0\.attn_q_norm\.weight"):
        GGUFSource(write_gguf("llama", norm))
    bias = {"blk.0.attn_norm.bias": np.ones(16, np.float32)}
    with pytest.raises(ValueError, match="no place"):
        GGUFSource(write_gguf("qwen2", bias))


def test_other_architectures_are_refused(write_gguf):
    path = write_gguf("phi3", {"token_embd.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match="'phi3'; supported are llama, qwen2, qwen3, gemma2, gemma3"):
        GGUFSource(path)


def test_types_gguf_cannot_dequantise_are_refused(write_gguf):
    path = write_gguf("llama", {"token_embd.weight": np.ones((2, 2), np.int8)})
    with pytest.raises(ValueError, match="tensors of type I8"):
        GGUFSource(path)


def test_parts_of_a_split_file_are_refused(write_gguf):
    path = write_gguf("llama", general={"split.count": 3})
    with pytest.raises(ValueError, match="one of 3 parts; merge them first"):
        GGUFSource(path)


def test_every_truncation_is_refused(write_gguf):
    path = write_gguf("llama", general={"tokenizer.ggml.tokens": ["a", "b"]})
    whole = path.read_bytes()
    header_end = len(whole) - sum(tensor.num_bytes for tensor in read_gguf_header(path).tensors.values())
    for length in [*range(0, header_end, 7), header_end + 1000, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"tiny\.gguf .*(truncated|no GGUF file)"):
            GGUFSource(path)


def test_files_that_are_not_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ValueError, match="no GGUF file: it starts with"):
        GGUFSource(path)
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(64))
    with pytest.raises(ValueError, match="version 1; little-endian files of version 2 and 3"):
        GGUFSource(path)
    with pytest.raises(FileNotFoundError, match="no such GGUF file"):
        GGUFSource(tmp_path / "nothing.gguf")


def test_unknown_value_type_is_a_damaged_header(write_gguf):
    path = write_gguf("llama")
    content = bytearray(path.read_bytes())
    # magic, version, two counts, then the first key "general.architecture" and its type
    content[4 + 4 + 16 + 8 + 20] = 99
    path.write_bytes(content)
    with pytest.raises(ValueError, match="unreadable GGUF header"):
        GGUFSource(path)


def test_without_the_package_the_extra_is_named(write_gguf, monkeypatch):
    path = write_gguf("llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'pip install "twofold\[gguf\]"'):
        GGUFSource(path)


def test_header_agrees_with_ggufs_own_reader(write_gguf):
    general = {"general.alignment": 64, "general.tags": ["x", "yy"], "some.numbers": [1, 2, 3]}
    path = write_gguf("qwen3", general=general, quantised={"blk.0.ffn_down.weight": "Q8_0"})
    assert_header_agrees(path)


def assert_header_agrees(path):
    header, reader = read_gguf_header(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == fields
    assert {name: (t.shape, t.ggml_type, t.offset, t.num_bytes) for name, t in header.tensors.items()} == {
        t.name: (tuple(t.shape.tolist()[::-1]), t.tensor_type, t.data_offset, t.n_bytes)
        for t in reader.tensors
    }


def test_config_of_a_llama_donor(write_gguf):
    general = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    assert gguf_config(write_gguf("llama", general=general)) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 48,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "hidden_act": "silu",
        "attention_bias": False,
    }


def test_config_of_qwen_donors(write_gguf):
    config = gguf_config(write_gguf("qwen2", **{"rope.freq_base": 1e6}))
    assert (config["model_type"], config["rope_theta"], config["head_dim"]) == ("qwen2", 1e6, 16)
    assert "attention_bias" not in config  # Qwen 2 has biases on q, k, v always and no such key
    config = gguf_config(write_gguf("qwen3", **{"attention.key_length": 32, "rope.dimension_count": None}))
    assert (config["model_type"], config["head_dim"], config["attention_bias"]) == ("qwen3", 32, False)


def test_config_of_a_gemma2_donor(write_gguf):
    keys = {"rope.freq_base": None, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 40.0}
    config = gguf_config(write_gguf("gemma2", **GEMMA_KEYS, **keys))
    assert config["model_type"] == "gemma2"
    assert config["hidden_activation"] == "gelu_pytorch_tanh"
    assert config["rope_theta"] == 10000
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (40, 30)
    assert (config["sliding_window"], config["query_pre_attn_scalar"]) == (32, 16)
    assert config["layer_types"] == ["sliding_attention", "full_attention"]


def test_config_of_a_gemma3_donor(write_gguf):
    keys = {
        "rope.freq_base": None,
        "block_count": 7,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    }
    config = gguf_config(write_gguf("gemma3", **GEMMA_KEYS, **keys))
    assert (config["model_type"], config["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert config["attn_logit_softcapping"] is config["final_logit_softcapping"] is None
    assert config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(("architecture", "layers", "scalar"), [("gemma2", 46, 144), ("gemma3", 62, 168)])
def test_query_scale_of_27b_is_width_over_heads(write_gguf, architecture, layers, scalar):
    shape = {"block_count": layers, "embedding_length": 32 * scalar, "attention.head_count": 32}
    keys = {"attention.key_length": 128, "rope.dimension_count": None}
    assert gguf_config(write_gguf(architecture, **shape, **keys))["query_pre_attn_scalar"] == scalar
    shape["block_count"] -= 1
    assert gguf_config(write_gguf(architecture, **shape, **keys))["query_pre_attn_scalar"] == 128


def test_llama_with_a_window_is_mistral(write_gguf):
    config = gguf_config(write_gguf("llama", **{"attention.sliding_window": 64}))
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 64)
    assert config["architectures"] == ["MistralForCausalLM"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_takes_the_config(write_gguf, architecture):
    path = write_gguf(architecture, **extra_keys(architecture))
    ours = gguf_config(path)
    config = AutoConfig.for_model(**ours)
    own = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(config, key) == getattr(own, key) == ours[key]
    assert config.num_key_value_heads == own.num_key_value_heads == 2
    assert config.tie_word_embeddings == own.tie_word_embeddings
    assert config.rms_norm_eps == pytest.approx(own.rms_norm_eps, rel=1e-7)
    assert config.rope_parameters == own.rope_parameters


def test_heads_that_differ_by_layer_are_refused(write_gguf):
    with pytest.raises(ValueError, match=r"head_count_kv differs from layer to layer \(\[2, 1\]\)"):
        GGUFSource(write_gguf("llama", **{"attention.head_count_kv": [2, 1]}))
    assert gguf_config(write_gguf("llama", **{"attention.head_count_kv": [2, 2]}))["num_key_value_heads"] == 2


@pytest.mark.parametrize("key", ["context_length", "block_count", "attention.layer_norm_rms_epsilon"])
def test_missing_keys_are_named(write_gguf, key):
    with pytest.raises(ValueError, match=f"lacks the key qwen2.{key}"):
        gguf_config(write_gguf("qwen2", **{key: None}))


def test_partial_rope_and_missing_embeddings_are_refused(write_gguf):
    with pytest.raises(ValueError, match="rotates 8 of 16 head dimensions"):
        gguf_config(write_gguf("llama", **{"rope.dimension_count": 8}))
    with pytest.raises(ValueError, match=r"no token_embd\.weight"):
        gguf_config(write_gguf("llama", {"output_norm.weight": np.ones(64, np.float32)}))


def test_rope_scaling_from_metadata(write_gguf):
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32,
    }
    scaling = gguf_config(write_gguf("qwen2", **keys))["rope_scaling"]
    assert scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert gguf_config(write_gguf("qwen2", **{"rope.scaling.type": "none"}))["rope_scaling"] is None
    with pytest.raises(ValueError, match="scales RoPE by 'longrope'"):
        gguf_config(write_gguf("qwen2", **{"rope.scaling.type": "longrope"}))


def llama3_divisors(scaling, head_dim):
    """Divisors of the frequencies, from transformers' own implementation of Llama 3's scaling."""
    config = AutoConfig.for_model(
        "llama",
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=dict(scaling),
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    return (plain / scaled).numpy().round(5)  # the division's float32 noise; the converter writes 8.0 as such


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_read_back_from_its_factors(write_gguf, donor_weights, to_gguf, factor):
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    tensors = to_gguf("llama", donor_weights("llama"))
    shape = {"attention.key_length": 64, "rope.dimension_count": 64, "rope.freq_base": 500000.0}
    factors = {"rope_freqs.weight": llama3_divisors(scaling, 64)}
    path = write_gguf("llama", tensors | factors, **shape)
    assert gguf_config(path)["rope_scaling"] == scaling
    assert not any("rope" in name for name in GGUFSource(path).names())
    other = {"rope_freqs.weight": llama3_divisors(scaling | {"original_max_position_embeddings": 4096}, 64)}
    with pytest.raises(ValueError, match="not Llama 3's scaling by a factor"):
        gguf_config(write_gguf("llama", tensors | other, **shape))
    ones = {"rope_freqs.weight": np.ones(32, np.float32)}
    assert gguf_config(write_gguf("llama", tensors | ones, **shape))["rope_scaling"] is None


@pytest.mark.smollm2
def test_smollm2_equals_what_transformers_reads(smollm2):
    assert_same(GGUFSource(smollm2), transformers_weights(smollm2))


@pytest.mark.smollm2
def test_smollm2_header_config_and_tokenizer(smollm2):
    assert_header_agrees(smollm2)
    config = gguf_config(smollm2)
    assert (config["vocab_size"], config["num_hidden_layers"], config["head_dim"]) == (49152, 30, 64)
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-05, 100000)
    tokenizer = gguf_tokenizer(smollm2)
    ids = tokenizer("Two stacks, one text.")["input_ids"]
    assert tokenizer.decode(ids) == "Two stacks, one text."
    assert tokenizer.eos_token == "<|im_end|>"
