"""GGUF donors: tensors, config and tokenizer of a llama.cpp file, under the names of the Hugging Face
checkpoint.

llama.cpp's converter changes three things, undone here: names; the rows of the q and k projections of
architecture `llama` (its RoPE turns neighbouring pairs, Hugging Face's turns halves); Gemma's norm weights,
stored as 1 + w.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twofold.checkpoint.gguf_header import GGUFHeader, StoredTensor, read_gguf_header
from twofold.checkpoint.tensors import TensorSource

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_PLAIN = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA = _PLAIN | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYER_NAMES = {
    "llama": _PLAIN,
    "qwen2": _PLAIN,
    "qwen3": _PLAIN | _QK_NORM,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA | _QK_NORM,
}
"""Per architecture: GGUF name -> Hugging Face name, both inside a layer."""

_BIASES = ("attn_q", "attn_k", "attn_v", "attn_output")
_ROPE_FACTORS = "rope_freqs.weight"  # becomes config["rope_scaling"], no donor tensor
_CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
}

# ggml type number -> numpy dtype it is read as (numpy has no bfloat16) and torch dtype it is.
_NATIVE = {0: (np.float32, torch.float32), 1: (np.float16, torch.float16), 30: (np.int16, torch.bfloat16)}
_SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
_CHUNK_BYTES = 16 * 2**20  # of float32 output dequantised at a time


class GGUFSource(TensorSource):
    """A GGUF donor's tensors, named and laid out as in its Hugging Face checkpoint.

    Quantised tensors are given as float32, dequantised in pieces of 16 MiB while they are read, so that
    memory is the result's; F32, F16 and BF16 keep their dtype, except Gemma's norms, which become float32
    because 1 is subtracted.
    Exactness: bit-equal to what `gguf.quants.dequantize` gives for the whole tensor.

    Args:
        path: a `.gguf` file of architecture llama (Mistral and SmolLM2 too), qwen2, qwen3, gemma2 or gemma3.

    Raises:
        ImportError: the package `gguf` is not installed.
        ValueError: no GGUF file, truncated, split, of another architecture, or with a tensor that has no
            place.
    """

    def __init__(self, path: str | Path) -> None:
        self.description = str(path)
        self._header = read_gguf_header(Path(path))
        self._stored = _donor_names(self._header)
        self._permuted_heads = _permuted_heads(self._header)
        _check_readable(self._header)

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        if self._is_offset_norm(name):
            return torch.float32
        ggml_type = self._stored[name].ggml_type
        return _NATIVE[ggml_type][1] if ggml_type in _NATIVE else torch.float32

    def get(self, name: str) -> Tensor:
        tensor = _read_tensor(self._header.path, self._stored[name])
        if self._is_offset_norm(name):
            return tensor.float() - 1
        for projection, n_heads in self._permuted_heads.items():
            if f".{projection}." in name:
                # [head, pair, half, ...] -> [head, half, pair, ...]: first all first halves of the pairs
                return tensor.reshape(n_heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        return tensor

    def _is_offset_norm(self, name: str) -> bool:
        return self._header.architecture in ("gemma2", "gemma3") and name.endswith("norm.weight")


def gguf_config(path: str | Path) -> dict[str, Any]:
    """The Hugging Face `config.json` of a GGUF donor, from the file's metadata and tensor shapes.

    What llama.cpp does not store is set as it sets it: Gemma 2's RoPE base 10000; Gemma 3's local base 10000
    and five local layers to one global; the query scale of Gemma 2 and 3 (`head_dim`; 27B: width / heads).
    Floats stored as float32 are given as the shortest decimal that is the same float32 (1e-05, not
    9.99999974e-06).

    Raises:
        ImportError: the package `gguf` is not installed.
        ValueError: as `GGUFSource`; a key is missing; per-layer head counts, partial RoPE or a RoPE scaling
            that a config cannot say.
    """
    header = read_gguf_header(Path(path))
    _donor_names(header)  # lists what has no place, before a config is trusted
    architecture = header.architecture
    n_heads = header.require("attention.head_count")
    hidden_size = header.require("embedding_length")
    head_dim = header.get("attention.key_length", hidden_size // n_heads)
    if (rotated := header.get("rope.dimension_count", head_dim)) != head_dim:
        raise ValueError(
            f"{header.path} rotates {rotated} of {head_dim} head dimensions; partial RoPE cannot be read"
        )
    if "token_embd.weight" not in header.tensors:
        raise ValueError(f"{header.path} has no token_embd.weight; it is no complete language model")
    window = header.get("attention.sliding_window")
    model_type = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    if architecture == "llama" and window:
        model_type = "mistral"  # Llama has no window; Mistral is Llama with one on every layer
    config: dict[str, Any] = {
        "architectures": [f"{_CLASSES[model_type]}ForCausalLM"],
        "model_type": model_type,
        # the tensor's, not the metadata's: converters cut or pad vocabularies
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": header.require("feed_forward_length"),
        "num_hidden_layers": header.require("block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": header.get("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "max_position_embeddings": header.require("context_length"),
        "rms_norm_eps": _shortest(header.require("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(header.get("rope.freq_base", 1e6 if architecture == "gemma3" else 1e4)),
        "rope_scaling": None,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": header.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    config["rope_scaling"] = _rope_scaling(header, config["rope_theta"])
    if architecture in ("gemma2", "gemma3"):
        config |= _gemma_config(header, config)
    else:
        config["hidden_act"] = "silu"
    if model_type in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if model_type == "mistral":
        config["sliding_window"] = window
    return config


def gguf_tokenizer(path: str | Path) -> Any:
    """The tokenizer inside a GGUF file as a `transformers` tokenizer; needs no network.

    `transformers` reads the file with `gguf.GGUFReader`: SmolLM2 (49k tokens) takes 4 to 5 s.

    Raises:
        ImportError: the package `gguf` is not installed.
        ValueError: as `GGUFSource`.
    """
    from transformers import AutoTokenizer

    path = Path(path)
    header = read_gguf_header(path)  # our errors for a broken file, before transformers' own
    tokenizer = AutoTokenizer.from_pretrained(
        str(path.parent), gguf_file=path.name, local_files_only=True, trust_remote_code=False
    )
    # transformers 5.17 takes SmolLM2's BOS for its EOS and leaves the padding token out: the file decides.
    for role, key in _SPECIAL_TOKENS.items():
        number = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(int(number)))
    return tokenizer


def has_tokenizer(path: str | Path) -> bool:
    """True if the GGUF file holds a vocabulary."""
    return "tokenizer.ggml.tokens" in read_gguf_header(Path(path)).metadata


def _gemma_config(header: GGUFHeader, config: dict[str, Any]) -> dict[str, Any]:
    n_layers = config["num_hidden_layers"]
    is_gemma3 = header.architecture == "gemma3"
    period = 6 if is_gemma3 else 2  # every sixth / second layer is global
    is_27b = n_layers == (62 if is_gemma3 else 46)  # how llama.cpp tells it
    scale = config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    gemma: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": scale,
        "sliding_window": header.get("attention.sliding_window", 1024 if is_gemma3 else 4096),
        "layer_types": [
            "full_attention" if (layer + 1) % period == 0 else "sliding_attention"
            for layer in range(n_layers)
        ],
        "attn_logit_softcapping": _shortest(
            header.get("attn_logit_softcapping", None if is_gemma3 else 50.0)
        ),
        "final_logit_softcapping": _shortest(
            header.get("final_logit_softcapping", None if is_gemma3 else 30.0)
        ),
    }
    if is_gemma3:
        gemma["rope_local_base_freq"] = _shortest(header.get("rope.freq_base_swa", 1e4))
    return gemma


def _rope_scaling(header: GGUFHeader, theta: float) -> dict[str, Any] | None:
    """RoPE scaling as config.json states it, or None."""
    if _ROPE_FACTORS in header.tensors:
        factors = _read_tensor(header.path, header.tensors[_ROPE_FACTORS]).double()
        if not bool((factors == 1).all()):
            return _llama3_scaling(header.path, factors, theta)
    kind = header.get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(
            f"{header.path} scales RoPE by {kind!r}; known are linear, yarn and llama3's factors"
        )
    scaling: dict[str, Any] = {"rope_type": kind, "factor": _shortest(header.require("rope.scaling.factor"))}
    if (original := header.get("rope.scaling.original_context_length")) and kind == "yarn":
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama3_scaling(path: Path, factors: Tensor, theta: float) -> dict[str, Any]:
    """Llama 3's scaling from the frequency divisors llama.cpp stores in its place.

    The file keeps the result, not the settings. Every released Llama 3.x uses low 1, high 4 and 8192 original
    positions, so only the factor is open: it is the largest divisor. That is checked against all of them.
    """
    factor = factors.max().item()
    pairs = torch.arange(len(factors), dtype=torch.float64)
    wavelengths = 2 * math.pi * theta ** (pairs / len(factors))
    smooth = ((8192 / wavelengths - 1) / (4 - 1)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not torch.allclose(factors, expected, rtol=1e-3):
        raise ValueError(
            f"{path}: {_ROPE_FACTORS} is not Llama 3's scaling by a factor, with 8192 original positions "
            "and low and high factors of 1 and 4; use the donor's safetensors checkpoint, whose "
            "config.json says the scaling"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _shortest(value: float | None) -> float | None:
    return None if value is None else float(str(np.float32(value)))


def _permuted_heads(header: GGUFHeader) -> dict[str, int]:
    """Projections whose rows are permuted -> their heads."""
    if header.architecture != "llama":
        return {}
    n_heads = header.require("attention.head_count")
    return {"q_proj": n_heads, "k_proj": header.get("attention.head_count_kv", n_heads)}


def _donor_names(header: GGUFHeader) -> dict[str, StoredTensor]:
    """Hugging Face name -> stored tensor, for every tensor of the file but the RoPE factors."""
    layer_names = _LAYER_NAMES[header.architecture]
    mapped: dict[str, StoredTensor] = {}
    unmapped = []
    for name, stored in header.tensors.items():
        stem, _, suffix = name.rpartition(".")
        in_layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if name == _ROPE_FACTORS:
            continue
        if suffix == "weight" and stem in _TOP:
            mapped[f"{_TOP[stem]}.weight"] = stored
        elif (
            in_layer and in_layer[2] in layer_names and (suffix == "weight" or _is_bias(in_layer[2], suffix))
        ):
            mapped[f"model.layers.{in_layer[1]}.{layer_names[in_layer[2]]}.{suffix}"] = stored
        else:
            unmapped.append(name)
    if unmapped:
        raise ValueError(
            f"{header.path}: {len(unmapped)} tensors have no place in a dense {header.architecture} model: "
            f"{', '.join(unmapped[:20])}{', ...' if len(unmapped) > 20 else ''}; mixtures of experts and "
            "adapters cannot be donors"
        )
    return mapped


def _check_readable(header: GGUFHeader) -> None:
    """Every quantisation in the file can be undone."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    for ggml_type in {stored.ggml_type for stored in header.tensors.values()} - _NATIVE.keys():
        kind = GGMLQuantizationType(ggml_type)
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise ValueError(
                f"{header.path} has tensors of type {kind.name}, which the package gguf cannot dequantise; "
                "take another quantisation of the model"
            ) from error


def _is_bias(stem: str, suffix: str) -> bool:
    return suffix == "bias" and stem in _BIASES


def _read_tensor(path: Path, stored: StoredTensor) -> Tensor:
    if stored.ggml_type in _NATIVE:
        numpy_dtype, torch_dtype = _NATIVE[stored.ggml_type]
        values = np.fromfile(path, numpy_dtype, count=math.prod(stored.shape), offset=stored.offset)
        return torch.from_numpy(values).view(torch_dtype).reshape(stored.shape)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    n_columns = stored.shape[-1]
    n_rows = math.prod(stored.shape[:-1])
    result = np.empty((n_rows, n_columns), np.float32)
    row_bytes = stored.num_bytes // max(n_rows, 1)
    step = max(1, _CHUNK_BYTES // (4 * n_columns))
    for row in range(0, n_rows, step):
        rows = min(step, n_rows - row)
        packed = np.fromfile(path, np.uint8, count=rows * row_bytes, offset=stored.offset + row * row_bytes)
        result[row : row + rows] = dequantize(
            packed.reshape(rows, row_bytes), GGMLQuantizationType(stored.ggml_type)
        )
    return torch.from_numpy(result).reshape(stored.shape)
