"""Make room in a vocabulary: more rows in every table, more tokens in the tokenizer, sizes in step everywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twofold.config import EncoderDecoderConfig
from twofold.models import EncoderDecoder


def resize_vocabulary(model: EncoderDecoder, vocab_size: int, *, seed: int = 0) -> None:
    """Grow both embedding tables and the LM head, in place; shared tables stay shared.

    New rows are drawn from a normal distribution with the mean and standard deviation, per channel, of the rows
    there are, so that their logits start among those of ordinary tokens.

    Args:
        vocab_size: the new number of rows, at least the present one.

    Raises:
        ValueError: fewer rows than there are.
    """
    config = model.config
    old_size = config.decoder.vocab_size
    if vocab_size < old_size:
        raise ValueError(f"the vocabulary has {old_size} entries and can only grow, got {vocab_size}")
    if vocab_size == old_size:
        return
    generator = torch.Generator().manual_seed(seed)
    tables: list[nn.Embedding | nn.Linear] = [model.encoder.embed_tokens]
    if config.tie_word_embeddings != "all" and not config.tie_stacks:
        tables.append(model.decoder.embed_tokens)
    if config.tie_word_embeddings == "none":
        tables.append(model.lm_head.out_proj)
    for table in tables:
        table.weight = nn.Parameter(_grown(table.weight.detach(), vocab_size, generator))
    model.tie_weights()
    model.encoder.embed_tokens.num_embeddings = model.decoder.embed_tokens.num_embeddings = vocab_size
    model.lm_head.out_proj.out_features = vocab_size
    _set_config(model, vocab_size)


def _grown(weight_VD: Tensor, vocab_size: int, generator: torch.Generator) -> Tensor:
    old = weight_VD.float()
    noise = torch.randn(vocab_size - len(old), old.shape[1], generator=generator).to(old.device)
    new_rows = old.mean(dim=0) + old.std(dim=0) * noise
    return torch.cat([weight_VD, new_rows.to(weight_VD.dtype)])


def _set_config(model: EncoderDecoder, vocab_size: int) -> None:
    sizes = {"vocab_size": vocab_size}
    config = model.config
    encoder, decoder = config.encoder.model_copy(update=sizes), config.decoder.model_copy(update=sizes)
    model.config = EncoderDecoderConfig.model_validate(
        config.model_copy(update={"encoder": encoder, "decoder": decoder}).model_dump()
    )
    model.encoder.stack_config, model.decoder.stack_config = model.config.encoder, model.config.decoder


def add_sentinels(model: EncoderDecoder, count: int) -> list[int]:
    """Add `<extra_id_0>`, `<extra_id_1>`... to the tokenizer, and rows for them to the model where it has none.

    Those that the tokenizer has already are used, not added again.

    Args:
        count: sentinels wanted.

    Returns:
        Their ids, in the order in which span corruption uses them.

    Raises:
        ValueError: the model has no tokenizer.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(
            "the model has no tokenizer to add sentinels to; load a checkpoint with tokenizer files"
        )
    names = [f"<extra_id_{i}>" for i in range(count)]
    tokenizer.add_special_tokens({"additional_special_tokens": names}, replace_extra_special_tokens=False)
    ids = [int(i) for i in tokenizer.convert_tokens_to_ids(names)]
    resize_vocabulary(model, max(model.config.decoder.vocab_size, max(ids, default=-1) + 1))
    return ids
