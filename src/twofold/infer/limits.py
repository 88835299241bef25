"""What a model can take: token ids inside its vocabulary, and no more of them than it has positions."""

from __future__ import annotations

from collections.abc import Sequence

from twofold.config import EncoderDecoderConfig


def check_inputs(
    config: EncoderDecoderConfig, source: Sequence[int], prefix: Sequence[int], n_new: int, *, name: str
) -> None:
    """Refuse what the model cannot compute.

    Args:
        config: of the model.
        source: encoder token ids, may be empty.
        prefix: decoder token ids that are given.
        n_new: tokens that are to follow the prefix.
        name: of the row or request, for the message.

    Raises:
        ValueError: an empty prefix, an id outside the vocabulary, or too many tokens.
    """
    if len(prefix) == 0:
        raise ValueError(f"{name} has an empty decoder prefix; it needs at least a start token")
    check_ids(config, (*source, *prefix), name)
    before = len(prefix) + (len(source) if config.decoder_positions == "continue" else 0)
    limit = config.decoder.max_position_embeddings
    if before + n_new > limit:
        raise ValueError(
            f"{name}: {before} tokens before the first new one and {n_new} new ones pass the decoder's "
            f"max_position_embeddings of {limit}; shorten the text or lower max_new_tokens"
        )
    check_source(config, source, name=name)


def check_source(config: EncoderDecoderConfig, source: Sequence[int], *, name: str) -> None:
    """The same for the encoder alone."""
    check_ids(config, source, name)
    if len(source) > config.encoder.max_position_embeddings:
        raise ValueError(
            f"{name}: source of {len(source)} tokens is longer than the encoder's max_position_embeddings "
            f"({config.encoder.max_position_embeddings}); shorten or split the text"
        )


def check_ids(config: EncoderDecoderConfig, ids: Sequence[int], name: str) -> None:
    """Refuse ids outside the vocabulary with a ValueError."""
    if ids and (min(ids) < 0 or max(ids) >= config.decoder.vocab_size):
        raise ValueError(
            f"{name} has token ids from {min(ids)} to {max(ids)}; the vocabulary is 0 to "
            f"{config.decoder.vocab_size - 1}"
        )
