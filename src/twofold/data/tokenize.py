"""Text to token ids, documents to chunks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from twofold.objectives.pair import Tokens


class Tokenizer(Protocol):
    """What the data pipeline needs of a tokenizer; those of transformers have it."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]:
        """Returns {"input_ids": [...]}."""
        ...


class ChatTokenizer(Tokenizer, Protocol):
    """A tokenizer with a chat template."""

    chat_template: Any

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """Returns the conversation as text."""
        ...


def encode(tokenizer: Tokenizer, text: str) -> Tokens:
    """Token ids of a text, int64 [length], with nothing added: BOS and stop tokens are the convention's."""
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)


class Chunk(NamedTuple):
    """A piece of a document."""

    tokens: Tokens
    """int64 [length], at least 2."""

    ends: bool
    """The document ends with this chunk."""


def chunk_document(token_ids: Tokens, length: int) -> list[Chunk]:
    """Cut a document into consecutive chunks of `length` tokens, the last one shorter.

    A single token that is left over is dropped: a source and a target need one each.

    Raises:
        ValueError: `length` is below 2.
    """
    if length < 2:
        raise ValueError(f"chunks need at least 2 tokens, one to read and one to write, got length {length}")
    chunks = [
        Chunk(token_ids[start : start + length], start + length >= len(token_ids))
        for start in range(0, len(token_ids), length)
    ]
    return [chunk for chunk in chunks if len(chunk.tokens) >= 2]
