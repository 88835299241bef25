"""From the harness's strings to what a pair reads and writes, within what it can hold.

The published split: the context is the encoder's, the continuation the decoder's. A model that goes on where its donor
would (`decoder_start="last_source_token"`) takes its last context token, or the chat template's start of a reply, as
decoder prefix; one that starts from BOS has nothing else there.

Letters: S source tokens, P prefix tokens, T target tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from twofold.config import EncoderDecoderConfig
from twofold.data.chat import Messages, prompt_inputs
from twofold.data.convention import Convention, split_inputs
from twofold.data.tokenize import encode
from twofold.evaluate.contender import Kind
from twofold.objectives.pair import Tokens

ROLLING_TOKENS = 256
"""Predicted at a time by a model that starts from BOS, when a whole text is scored (see `Inputs.windows`)."""


class ChatPrompt(str):
    """A rendered conversation that still knows its messages, which a string does not."""

    __slots__ = ("messages",)
    messages: Messages
    """The last one may be the begun reply of the assistant."""

    def __new__(cls, text: str, messages: Messages) -> ChatPrompt:
        """Equal to `text` for everybody else."""
        made = super().__new__(cls, text)
        made.messages = messages
        return made

    @property
    def asked(self) -> Messages:
        """The messages before the reply."""
        return self.messages[:-1] if self.begun else self.messages

    @property
    def begun(self) -> str:
        """What is given of the reply."""
        last = self.messages[-1]
        return last["content"] if last["role"] == "assistant" else ""


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of one thing to compute."""

    source: tuple[int, ...]
    prefix: tuple[int, ...]
    target: tuple[int, ...]
    """Empty where it is to be written."""
    n_cut: int = 0
    """Context tokens, the first ones, that the model has no room for."""


class Inputs:
    """Makes rows for one model.

    Args:
        config: of the model.
        tokenizer: of transformers.
        kind: see `Contender`. A decoder-only model is given chat prompts as plain text: where they are split makes no
            difference to it, and the text is what other software gives it.
        count_stop: the end token belongs to every continuation. The harness's own convention has none.
    """

    def __init__(
        self, config: EncoderDecoderConfig, tokenizer: Any, kind: Kind, *, count_stop: bool = False
    ) -> None:
        self.config, self.tokenizer, self.kind = config, tokenizer, kind
        self.convention = Convention.of(config)
        self._end = self.convention.stop_token_ids[:1] if count_stop else ()

    @property
    def goes_on(self) -> bool:
        """The decoder reads on where the source ends, as the donor would."""
        return self.convention.decoder_start == "last_source_token"

    @property
    def prefix_token_id(self) -> int:
        """Stands for a context that is empty: BOS, or the end token where the tokenizer has no BOS."""
        given = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.convention.stop_token_ids[0])
        return int(next(token for token in given if token is not None))

    def encode(self, text: str) -> list[int]:
        """Token ids without any that the convention adds."""
        ids: list[int] = encode(self.tokenizer, text).tolist()
        return ids

    def scored(
        self, context: str, continuation: str, context_ids: Sequence[int], target_ids: Sequence[int]
    ) -> Row:
        """A continuation whose likelihood is asked for.

        Args:
            context: may be empty: one `prefix_token_id` is read then.
            continuation: as the task has it.
            context_ids: of the context, as the harness tokenises it: without its trailing spaces.
            target_ids: of the continuation, with those spaces.

        Raises:
            ValueError: an empty continuation, or one that is longer than the decoder.
        """
        if isinstance(context, ChatPrompt) and self.kind == "encoder-decoder":
            source, prefix = self._chat(context, context_ids)
            if not self.goes_on:
                # The template's last line break is part of the reply's start, which stays in the source whole.
                target_ids = self.encode(continuation)
        else:
            source, prefix = split_inputs(_tokens(context_ids or [self.prefix_token_id]), self.convention)
        if not len(target_ids):
            raise ValueError(
                f"the continuation {continuation!r} has no tokens, so it has no likelihood; correct the example"
            )
        return self._fitted(source, prefix, (*target_ids, *self._end))

    def prompt(self, context: str, max_new_tokens: int) -> Row:
        """A context that is to be answered.

        Raises:
            ValueError: the answer alone is longer than the decoder.
        """
        ids = self.encode(context)
        if isinstance(context, ChatPrompt) and self.kind == "encoder-decoder":
            source, prefix = self._chat(context, ids)
        else:
            source, prefix = split_inputs(_tokens(ids or [self.prefix_token_id]), self.convention)
        return self._fitted(source, prefix, (), max_new_tokens)

    def windows(self, text: str, rolling: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Row]:
        """A whole text, whose every token is predicted once.

        A model that goes on where its donor would is given the harness's windows: the text before a window, at least
        one token, then the window. One that starts from BOS predicts `ROLLING_TOKENS` at a time, each piece from all
        text before it that the encoder holds, the first from one `prefix_token_id`. Its sum depends on that length, and
        must not be compared with the perplexity of decoder-only models.

        Args:
            text: the text.
            rolling: context and predicted tokens of the harness's windows, which do not overlap.
        """
        if self.goes_on:
            return [
                self._fitted(*split_inputs(_tokens(context), self.convention), tuple(predicted))
                for context, predicted in rolling
            ]
        ids = self.encode(text)
        size = min(ROLLING_TOKENS, self.config.decoder.max_position_embeddings)
        rows = []
        for start in range(0, len(ids), size):
            target = tuple(ids[start : start + size])
            room = self._room(1, len(target) - 1) - self.convention.source_bos
            before = ids[max(0, start - room) : start] or [self.prefix_token_id]
            source, prefix = split_inputs(_tokens(before), self.convention)
            rows.append(self._fitted(source, prefix, target))
        return rows

    def as_read(self, text: str) -> list[int]:
        """Token ids of a text as the donor reads it, with BOS where it has one."""
        ids = self.encode(text)
        return np.concatenate(split_inputs(_tokens(ids), self.convention)).tolist() if ids else ids

    def _chat(self, prompt: ChatPrompt, context_ids: Sequence[int]) -> tuple[Tokens, Tokens]:
        """Source and prefix of a conversation as in training: the reply, and its start, are the decoder's."""
        source, prefix = prompt_inputs(prompt.asked, self.tokenizer, self.convention)
        if not self.goes_on:
            return source, np.concatenate([prefix, _tokens(self.encode(prompt.begun))])
        # The whole text is cut where the conversation ends: tokens are those that the donor would read.
        whole = np.concatenate(split_inputs(_tokens(context_ids), self.convention))
        bos = self.convention.bos_token_id
        if bos is not None and whole[0] == bos and source[:1].tolist() != [bos]:
            whole = whole[1:]
        if len(whole) <= len(source) or whole[: len(source)].tolist() != source.tolist():
            raise ValueError(
                f"the chat template renders {prompt[-60:]!r} in another way than the conversation before it; use a "
                "template that only appends"
            )
        return source, whole[len(source) :]

    def _fitted(self, source: Tokens, prefix: Tokens, target: tuple[int, ...], n_new: int = 0) -> Row:
        """With the source cut from the left, as the harness does, to what there is room for."""
        room = self._room(len(prefix), len(target) - 1 if target else n_new)
        n_cut = max(0, len(source) - room)
        return Row(tuple(source[n_cut:].tolist()), tuple(prefix.tolist()), target, n_cut)

    def _room(self, n_prefix: int, n_after: int) -> int:
        """Source tokens that fit before a prefix and what follows it."""
        limit = self.config.decoder.max_position_embeddings
        rest = limit - n_prefix - n_after
        if rest < 0:
            raise ValueError(
                f"{n_prefix} decoder tokens that are given and {n_after} that follow pass the decoder's "
                f"max_position_embeddings of {limit}; shorten the example, or lower max_gen_toks"
            )
        encoder_limit = self.config.encoder.max_position_embeddings
        return min(encoder_limit, rest) if self.config.decoder_positions == "continue" else encoder_limit


def _tokens(ids: Sequence[int]) -> Tokens:
    return np.asarray(ids, dtype=np.int64)
