"""Donors with text, and the harness's own Hugging Face backend as reference."""

import copy
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.models import hf
from twofold.evaluate import open_contender


@pytest.fixture(scope="session")
def merging_tokenizer(byte_tokenizer: Any) -> Any:
    """One token per byte, and 256 for "ac", so that a text cut there is other tokens; BOS 257, end 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, "ac"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "c")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        chat_template=byte_tokenizer.chat_template,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )


@pytest.fixture(scope="session")
def bos_tokenizer(byte_tokenizer: Any) -> Any:
    """The byte tokenizer, which puts BOS before every text."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 256)]
    )
    return tokenizer


@pytest.fixture(scope="session")
def donors(
    merging_tokenizer: Any, bos_tokenizer: Any, tmp_path_factory: Any
) -> dict[str, tuple[Any, Any, Any]]:
    """By name: folder, model of transformers, tokenizer. Llama without BOS, "ac" one token; Gemma 2 with BOS, windows
    and soft-caps."""
    made = {}
    for name, make, tokenizer in (
        ("llama", hf.llama_config, merging_tokenizer),
        ("gemma2", hf.gemma2_config, bos_tokenizer),
    ):
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        ids |= {"pad_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer)}
        config = make(max_position_embeddings=96, **ids)
        folder = tmp_path_factory.mktemp("donors") / name
        model = hf.donor(config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[name] = (folder, model, tokenizer)
    return made


@pytest.fixture
def hflm() -> Any:
    """The reference: a model of transformers as the harness runs it."""
    from lm_eval.models.huggingface import HFLM

    def make(model: Any, tokenizer: Any, **options: Any) -> Any:
        return HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=1, **options)

    return make


@pytest.fixture
def contender_of(donors: Any) -> Any:
    """A donor as a decoder-only contender."""
    return lambda name: open_contender(donors[name][0])
