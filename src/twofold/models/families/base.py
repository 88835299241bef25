"""What a family file is made of: a strict reader of config.json, a tensor map as data, and two record types.

A family reads its own config.json and names its own tensors; nothing outside `families/` knows its oddities.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from twofold.config import EncoderDecoderConfig, RopeConfig, StackConfig

JsonDict = dict[str, Any]

_BOOKKEEPING = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention architectures
    auto_map bad_words_ids begin_suppress_tokens cache_implementation chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label is_decoder is_encoder_decoder is_llama_config label2id length_penalty
    max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class
    top_k top_p torch_dtype torchscript transformers.js_config transformers_version typical_p
    unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)
"""Keys that transformers and its surroundings write into config.json and that change no number we compute."""

_REQUIRED = object()


class ConfigReader:
    """Takes keys out of a config.json block one by one; what is left at the end is an error.

    Args:
        block: the parsed JSON object.
        where: how messages name it, for example "gemma2 config".
    """

    def __init__(self, block: JsonDict, where: str) -> None:
        self._left = dict(block)
        self._where = where

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of a key, which counts as read. A key that is null gets the default too.

        Raises:
            ValueError: the key is missing and has no default.
        """
        value = self._left.pop(key, None)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ValueError(f"{self._where} has no {key!r}, which is required")
        return default

    def take_nullable(self, key: str, default: Any) -> Any:
        """As `take`, but null is a value: a soft-cap that is null is off, one that is absent has its default."""
        return self._left.pop(key, default)

    def expect(self, key: str, *allowed: Any) -> None:
        """Read a key that may be absent or null, or have one of the values under which it changes nothing."""
        value = self._left.pop(key, None)
        if value is not None and value not in allowed:
            wanted = " or ".join(repr(a) for a in allowed)
            raise ValueError(f"{self._where}: {key}={value!r} is not supported; only {wanted} is")

    def finish(self) -> None:
        """Raises:
        ValueError: keys are left that nobody read; lists them.
        """
        unknown = sorted(set(self._left) - _BOOKKEEPING)
        if unknown:
            listed = ", ".join(f"{key}={self._left[key]!r}" for key in unknown)
            raise ValueError(
                f"{self._where} has keys that twofold does not know: {listed}. They may change what the model "
                "computes; remove them from config.json if you are sure that they do not"
            )

    def take_tokens(self, key: str) -> tuple[int, ...]:
        """A token id field that may be an int, a list or absent."""
        value = self.take(key, ())
        return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def read_rope(block: JsonDict, where: str) -> RopeConfig:
    """One rope entry as transformers writes it: `rope_theta`, `rope_type` (or `type`), and scaling settings."""
    reader = ConfigReader(block, where)
    old_name = reader.take("type", "default")
    scaling = reader.take("rope_type", old_name)
    if block.get("type") is not None and scaling != old_name:
        raise ValueError(f"{where}: rope_type={scaling!r} and type={old_name!r} disagree; keep one of them")
    reader.expect("partial_rotary_factor", 1, 1.0)
    if scaling not in ("default", "linear", "llama3"):
        raise ValueError(f"{where}: rope type {scaling!r} is not supported; use default, linear or llama3")
    settings: JsonDict = {"theta": float(reader.take("rope_theta")), "scaling": scaling}
    if scaling != "default":
        settings["factor"] = float(reader.take("factor"))
    if scaling == "llama3":
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            settings[key] = reader.take(key)
    reader.finish()
    return RopeConfig(**settings)


def take_single_rope(reader: ConfigReader, where: str, default_theta: float) -> RopeConfig:
    """The rope of a family with one theta: new spelling `rope_parameters`, or `rope_theta` + `rope_scaling`."""
    block = reader.take("rope_parameters", {}) | reader.take("rope_scaling", {})
    if "rope_theta" in block:
        reader.expect("rope_theta", block["rope_theta"])
    else:
        block["rope_theta"] = reader.take("rope_theta", default_theta)
    return read_rope(block, f"{where}, rope")


def write_rope(rope: RopeConfig) -> JsonDict:
    """The inverse of `read_rope`."""
    block: JsonDict = {"rope_type": rope.scaling, "rope_theta": rope.theta}
    if rope.scaling != "default":
        block["factor"] = rope.factor
    if rope.scaling == "llama3":
        block |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    return block


@dataclass(frozen=True)
class TensorMap:
    """Their tensor names to ours, as data; `{i}` stands for a layer index, None for what is dropped on purpose."""

    names: Mapping[str, str | None]

    def to_own(self, name: str) -> str | None:
        """Our name, or None for a dropped tensor.

        Raises:
            KeyError: the map has no entry.
        """
        pattern, index = _as_pattern(name)
        own = self.names[pattern]
        return own if own is None else own.replace("{i}", index)

    def from_own(self, name: str) -> str:
        """Their name.

        Raises:
            KeyError: the map has no entry.
        """
        pattern, index = _as_pattern(name)
        for theirs, own in self.names.items():
            if own == pattern:
                return theirs.replace("{i}", index)
        raise KeyError(name)


def _as_pattern(name: str) -> tuple[str, str]:
    found = re.search(r"(?<=layers\.)\d+(?=\.)", name)
    if found is None:
        return name, ""
    return name[: found.start()] + "{i}" + name[found.end() :], found.group()


def donor_map(norms: Mapping[str, str], *, attention_names: tuple[str, ...]) -> TensorMap:
    """The map of a decoder-only checkpoint in transformers' naming.

    Args:
        norms: their layer norm names to ours, without `.weight`.
        attention_names: tensors below `self_attn`, which keep their names.
    """
    names: dict[str, str | None] = {
        "model.embed_tokens.weight": "embed_tokens.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "lm_head.out_proj.weight",
        "model.layers.{i}.self_attn.rotary_emb.inv_freq": None,  # written by old releases; computed from theta
    }
    same = [f"self_attn.{name}" for name in attention_names]
    same += [f"mlp.{name}_proj.{kind}" for name in ("gate", "up", "down") for kind in ("weight", "bias")]
    for theirs, own in {
        **{name: name for name in same},
        **{f"{a}.weight": f"{b}.weight" for a, b in norms.items()},
    }.items():
        names[f"model.layers.{{i}}.{theirs}"] = f"layers.{{i}}.{own}"
    return TensorMap(names)


@dataclass(frozen=True)
class DonorConfig:
    """What a decoder-only config.json says."""

    stack: StackConfig
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None


def read_donor(reader: ConfigReader, stack: StackConfig, *, ties_by_default: bool) -> DonorConfig:
    """The part of a donor's config.json that is not its stack; then nothing may be left over."""
    eos = reader.take_tokens("eos_token_id")
    donor = DonorConfig(
        stack=stack,
        tie_word_embeddings=bool(reader.take("tie_word_embeddings", ties_by_default)),
        bos_token_id=reader.take("bos_token_id", None),
        eos_token_ids=eos,
        pad_token_id=reader.take("pad_token_id", None),
    )
    reader.finish()
    return donor


@dataclass(frozen=True)
class DonorFamily:
    """A decoder-only family that can be adapted."""

    model_types: tuple[str, ...]
    """Values of `model_type` in config.json."""
    read_config: Callable[[JsonDict], DonorConfig]
    tensor_map: TensorMap
    """Its checkpoint's names to those of one of our stacks (no `model.encoder.` in front)."""


@dataclass(frozen=True)
class PairFamily:
    """A family of encoder-decoder checkpoints that can be read and written."""

    model_type: str
    read_config: Callable[[JsonDict], EncoderDecoderConfig]
    write_config: Callable[[EncoderDecoderConfig], JsonDict]
    """Raises ValueError where the config is not one of this family."""
    tensor_map: TensorMap
    is_skippable: Callable[[str], bool] = lambda name: False
    """Tensors that a reader may leave out when asked to (a vision tower)."""
