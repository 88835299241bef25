"""Text to token ids."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from twofold.objectives.pair import Tokens


class Tokenizer(Protocol):
    """What the data pipeline needs of a tokenizer; those of transformers have it."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]:
        """Returns {"input_ids": [...]}."""
        ...

    def get_vocab(self) -> Mapping[str, int]:
        """All tokens with their ids."""
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
