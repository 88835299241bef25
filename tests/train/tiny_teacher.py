"""A tiny donor of transformers, and what it says about texts read alone."""

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.train.tiny_run import BOS, EOS, PAD, VOCAB, byte_tokenizer, tiny_model
from twofold.models import EncoderDecoder


def save_donor(
    folder: Path, *, adds_bos: bool = False, hidden_size: int = 32, seed: int = 0
) -> transformers.LlamaForCausalLM:
    """A Llama with large random weights and the byte tokenizer."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    donor = transformers.LlamaForCausalLM(config).eval()
    donor.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    tokenizer.save_pretrained(folder)
    return donor


@torch.no_grad()
def next_token_distributions(donor: transformers.LlamaForCausalLM, text: list[int]) -> torch.Tensor:
    """float32 [len(text), V]: after each token, reading the text alone."""
    return donor(input_ids=torch.tensor([text])).logits[0].float().softmax(dim=-1)


def student(**meeting: Any) -> EncoderDecoder:
    """A tiny student that is sure of itself, so that who teaches changes its loss by a lot."""
    model = tiny_model(**meeting)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
    return model
