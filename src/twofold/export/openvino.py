"""OpenVINO models: two graphs that OpenVINO runs without twofold, for any pair.

The same operations as the engine's CPU backend, which keeps embeddings, masks and attention to itself; here they are
part of the graphs.

Letters: B batch, T new decoder tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from twofold.config import EncoderDecoderConfig
from twofold.export.agreement import Run, Sample, Written, chosen_logprobs, in_float32
from twofold.export.transformers import for_sources, wanted_ids
from twofold.infer.padding import padded
from twofold.models import EncoderDecoder

if TYPE_CHECKING:
    from twofold.infer.backends.openvino.lower import WeightFormat

ENCODER, DECODER = "openvino_encoder_model.xml", "openvino_decoder_model.xml"
QUANTIZATIONS: tuple[WeightFormat, ...] = ("int8", "int4")

_EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}
"""Products in float32; OpenVINO's own choice, where the processor has it, is bfloat16, and int8 for the cache."""
_STEPS = 3
"""Decoder tokens that the comparison gives one by one."""


def write_openvino(model: EncoderDecoder, folder: Path, *, quantization: str | None = None) -> Written:
    """Write both graphs, config.json, generation_config.json, precision.json and the tokenizer.

    Args:
        quantization: how matrices are stored, see `Lowering`: "int8" or "int4", embeddings in int8 with both; default
            float32.

    Raises:
        ValueError: another quantization, or a tokenizer that does not begin sources as the pair wants.
        ImportError: OpenVINO is missing.
    """
    _library()
    weights: WeightFormat = "float"
    if quantization is not None:
        if quantization not in QUANTIZATIONS:
            raise ValueError(
                f"quantization of openvino must be {' or '.join(QUANTIZATIONS)}, got {quantization!r}; leave it out "
                "for float32"
            )
        weights = quantization
    pair, config = in_float32(model), model.config
    _save(pair, folder, weights)
    _write_json(folder / "config.json", config.model_dump(mode="json"))
    tokens = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }
    _write_json(folder / "generation_config.json", tokens)
    is_float = weights == "float"
    precision = {
        "matrices": "float32" if is_float else weights,
        "embeddings": "float32" if is_float else "int8",
        "others": "float32",
        "twofold": version("twofold"),
    }
    _write_json(folder / "precision.json", precision)
    if model.tokenizer is not None:
        _write_tokenizer(model, folder)
    written = _run_folder(folder, config)
    if is_float:
        return Written(run=written)

    def run(given: Sequence[Sample]) -> list[Tensor]:
        with tempfile.TemporaryDirectory() as unrounded:
            _save(pair, Path(unrounded), "float")
            return _run_folder(Path(unrounded), config)(given)

    return Written(run=run, run_rounded=written)


def _library() -> ModuleType:
    try:
        import openvino
    except ImportError as error:
        raise ImportError(
            "exports to OpenVINO need the package openvino; pip install 'twofold[cpu]'"
        ) from error
    module: ModuleType = openvino
    return module


def _save(pair: EncoderDecoder, folder: Path, weights: WeightFormat) -> None:
    from twofold.export.openvino_graphs import decoder_graph, encoder_graph
    from twofold.infer.backends.openvino.lower import Lowering

    for name, make in ((ENCODER, encoder_graph), (DECODER, decoder_graph)):
        _library().save_model(make(pair, Lowering(weights)), folder / name, compress_to_fp16=False)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_tokenizer(model: EncoderDecoder, folder: Path) -> None:
    """Its files, of which tokenizer.json alone has to be enough."""
    from tokenizers import Tokenizer

    for_sources(model.tokenizer, model.config).save_pretrained(folder)
    text, wanted = wanted_ids(model.tokenizer, model.config)
    found = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    if found != wanted:
        raise ValueError(
            f"tokenizer.json makes {found} of {text!r}, the pair wants {wanted}; save the model without tokenizer "
            "(model.tokenizer = None) and add its files by hand"
        )


def _run_folder(folder: Path, config: EncoderDecoderConfig) -> Run:
    """All samples in one batch, sources padded on the right and targets on the left; the last tokens one by one."""
    from twofold.infer.backends.openvino.compiling import compile_graph

    def run(given: Sequence[Sample]) -> list[Tensor]:
        core = _library().Core()
        encoder, decoder = (
            compile_graph(core, folder / name, _EXACT).create_infer_request() for name in (ENCODER, DECODER)
        )
        source_ids, source_mask = _padded([source for source, _ in given], "right")
        read = encoder.infer({"input_ids": source_ids, "attention_mask": source_mask}).to_dict()
        of_source = {output.get_any_name(): keys_values for output, keys_values in read.items()}
        of_source["encoder_attention_mask"] = source_mask
        target_ids, target_mask = _padded([target[:-1] for _, target in given], "left")
        n_tokens = target_ids.shape[1]
        edges = [0, *range(max(1, n_tokens - _STEPS), n_tokens + 1)]
        found = []
        for start, end in itertools.pairwise(edges):
            step = {
                "input_ids": target_ids[:, start:end],
                "attention_mask": target_mask[:, :end],
                "beam_idx": np.arange(len(given), dtype=np.int32),
            }
            found.append(torch.from_numpy(decoder.infer(of_source | step)["logits"].copy()))
        logits_BTV = torch.cat(found, dim=1)
        return [
            chosen_logprobs(logits_TV[None, n_tokens - len(target) + 1 :], target)
            for logits_TV, (_, target) in zip(logits_BTV, given, strict=True)
        ]

    return run


def _padded(rows: Sequence[Sequence[int]], side: Literal["left", "right"]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, int64 [B, longest]."""
    ids, mask = padded(rows, side, torch.device("cpu"))
    return ids.numpy(), mask.long().numpy()
