"""Texts to token ids, as a model reads them."""

from __future__ import annotations

from dataclasses import dataclass

from twofold.evaluate.superglue.tasks import Example, Text
from twofold.models import EncoderDecoder


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example in token ids."""

    texts: tuple[tuple[int, ...], ...]
    """One, or one for each alternative."""
    label: int
    is_truncated: bool
    """The model does not read everything."""

    @property
    def length(self) -> int:
        """Tokens of the longest text."""
        return max(map(len, self.texts))


class Reader:
    """Text to token ids, as one model reads it.

    Args:
        model: with a tokenizer.
        max_tokens: of a text, BOS included; None: what the encoder takes.

    Raises:
        ValueError: no tokenizer, or more tokens than the encoder takes.
    """

    def __init__(self, model: EncoderDecoder, max_tokens: int | None = None) -> None:
        limit = model.config.encoder.max_position_embeddings
        if model.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer, so it cannot read SuperGLUE; put one into its folder"
            )
        if max_tokens is not None and max_tokens > limit:
            raise ValueError(f"max_tokens is {max_tokens}, and the encoder takes {limit}; lower it")
        self.max_tokens = max_tokens or limit
        self._tokenizer = model.tokenizer
        bos = model.config.bos_token_id
        self._before = (bos,) if model.config.source_bos and bos is not None else ()

    def encode(self, example: Example) -> Encoded:
        """Token ids of an example; of texts that are too long, the body's end is cut off.

        Raises:
            ValueError: head and tail of a text alone are too long.
        """
        found = [self._ids(text) for text in example.texts]
        return Encoded(
            tuple(ids for ids, _ in found), example.label, any(is_truncated for _, is_truncated in found)
        )

    def _ids(self, text: Text) -> tuple[tuple[int, ...], bool]:
        room = self.max_tokens - len(self._before)
        whole = self._tokens(str(text))
        if len(whole) <= room:
            return (*self._before, *whole), False
        tail = self._tokens(text.tail)
        room -= len(tail)
        start = self._tokens(text.head + text.body)[: max(room, 0)]
        if len(start) <= len(self._tokens(text.head)):
            raise ValueError(
                f"max_tokens={self.max_tokens} leaves no room for more than the question in "
                f"{str(text)[:80]!r}...; raise it"
            )
        return (*self._before, *start, *tail), True

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
