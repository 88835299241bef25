"""Folders that transformers loads: a released family's files, or twofold's own model class."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twofold.checkpoint.save import Format, save
from twofold.config import EncoderDecoderConfig
from twofold.data.convention import Convention
from twofold.data.tokenize import encode
from twofold.export.agreement import Run, Sample, Written, chosen_logprobs
from twofold.models import EncoderDecoder
from twofold.models.masks import encoder_rule

_PROBE = "one two"


def write_t5gemma(model: EncoderDecoder, folder: Path) -> Written:
    """`twofold.save(..., format="t5gemma")`."""
    return _write_family(model, folder, "t5gemma")


def write_t5gemma2(model: EncoderDecoder, folder: Path) -> Written:
    """`twofold.save(..., format="t5gemma2")`."""
    return _write_family(model, folder, "t5gemma2")


def _write_family(model: EncoderDecoder, folder: Path, family: Format) -> Written:
    save(model, folder, format=family)
    # transformers from 5.4 on lets a T5Gemma encoder token see one token too many beyond its window.
    config = model.config
    rules = [encoder_rule(config.encoder, kind, "bidirectional") for kind in set(config.encoder.layer_types)]
    reaches = [reach + 1 for rule in rules for reach in (rule.past, rule.future) if reach is not None]
    # eager: the only attention in which every version of transformers caps scores.
    return Written(
        run=_run_folder(folder, attn_implementation="eager"), max_source=min(reaches, default=None)
    )


def write_hf(model: EncoderDecoder, folder: Path) -> Written:
    """`TwofoldForConditionalGeneration.save_pretrained`, and a tokenizer that begins sources as the pair wants it."""
    from twofold.hf import TwofoldForConditionalGeneration

    TwofoldForConditionalGeneration.of(model).save_pretrained(folder)
    if model.tokenizer is not None:
        for_sources(model.tokenizer, model.config).save_pretrained(folder)
        _check_tokenizer(folder, model.config)
    return Written(run=_run_folder(folder))


def for_sources(tokenizer: Any, config: EncoderDecoderConfig) -> Any:
    """A copy of a tokenizer that adds BOS where sources of the pair have one and nothing else, and that can pad."""
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(Convention.of(config).pad_token_id)
    text, wanted = wanted_ids(tokenizer, config)
    if tokenizer(text)["input_ids"] != wanted:
        from tokenizers.processors import TemplateProcessing

        bos = config.bos_token_id
        name = None if bos is None else tokenizer.convert_ids_to_tokens(bos)
        template, special = (f"{name} $A", [(name, bos)]) if config.source_bos else ("$A", [])
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=template, special_tokens=special
        )
    return tokenizer


def wanted_ids(tokenizer: Any, config: EncoderDecoderConfig) -> tuple[str, list[int | None]]:
    """A text, and what it should become as a source."""
    bos = [config.bos_token_id] if config.source_bos else []
    return _PROBE, [*bos, *encode(tokenizer, _PROBE).tolist()]


def _check_tokenizer(folder: Path, config: EncoderDecoderConfig) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    text, wanted = wanted_ids(tokenizer, config)
    found = tokenizer(text)["input_ids"]
    if found != wanted:
        raise ValueError(
            f"the tokenizer's class does not keep how a source begins: it makes {found} of {text!r}, the pair wants "
            f"{wanted}; save the model without tokenizer (model.tokenizer = None) and add its files by hand"
        )


def _run_folder(folder: Path, **options: Any) -> Run:
    def run(given: Sequence[Sample]) -> list[Tensor]:
        from transformers import AutoModelForSeq2SeqLM

        loaded = AutoModelForSeq2SeqLM.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, **options
        )
        found = []
        with torch.no_grad():
            for source, target in given:
                ids, decoder_ids = torch.tensor([source]), torch.tensor([target[:-1]])
                output = loaded(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    decoder_input_ids=decoder_ids,
                    decoder_attention_mask=torch.ones_like(decoder_ids),
                )
                found.append(chosen_logprobs(output.logits, target))
        return found

    return run
