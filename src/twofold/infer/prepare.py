"""A request, turned into token ids and checked against the model, before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from twofold.config import EncoderDecoderConfig
from twofold.data.chat import prompt_inputs
from twofold.data.convention import Convention
from twofold.infer.backends import Start
from twofold.infer.limits import check_inputs
from twofold.infer.lookup import Guesser
from twofold.infer.request import Request
from twofold.infer.text_stream import TextStream


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A request that can run."""

    request: Request
    source_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...]
    stop_token_ids: frozenset[int]
    tokenizer: Any
    """Of transformers, or None: no text is made."""

    @property
    def start(self) -> Start:
        """What the backend has to know."""
        n_new = self.request.max_new_tokens
        return Start(
            source_ids=self.source_ids,
            prefix_ids=self.prefix_ids,
            n_rows=self.request.n_rows,
            n_tokens=len(self.prefix_ids) + n_new - 1,
            # The newest token and the guesses; the first comes with the encoding, and the last is not taken in.
            n_verified=min(self.request.lookup + 1, n_new - 1) if self.request.lookup else 0,
        )

    def text_stream(self) -> TextStream | None:
        """A new one, where there is a tokenizer."""
        return None if self.tokenizer is None else TextStream(self.tokenizer, self.request.stop_strings)

    def guesser(self) -> Guesser | None:
        """A new one, where the request asks for guesses."""
        request = self.request
        if not request.lookup:
            return None
        given = (*self.source_ids, *self.prefix_ids)
        return Guesser(given, most=request.lookup, max_new_tokens=request.max_new_tokens)


def prepare(request: Request, config: EncoderDecoderConfig, tokenizer: Any) -> Prepared:
    """Find the token ids of a request, and refuse it now if it cannot run.

    Raises:
        ValueError: a text without tokenizer, an empty or over-long input, ids outside the vocabulary.
    """
    if tokenizer is None and (request.prompt is not None or request.stop_strings):
        raise ValueError(
            "this model has no tokenizer, so it takes no text and no stop strings; put tokenizer files into its "
            "folder and load it again, or use source_ids, prefix_ids and stop_token_ids"
        )
    if request.prompt is not None:
        source, prefix = prompt_inputs(request.prompt, tokenizer, Convention.of(config))
        source_ids, prefix_ids = tuple(source.tolist()), tuple(prefix.tolist())
    else:
        assert request.source_ids is not None
        assert request.prefix_ids is not None
        source_ids, prefix_ids = tuple(request.source_ids), tuple(request.prefix_ids)
    check_inputs(config, source_ids, prefix_ids, request.max_new_tokens, name="the request")
    stop = config.eos_token_ids if request.stop_token_ids is None else tuple(request.stop_token_ids)
    n_vocab = config.decoder.vocab_size
    unknown = [token for token in stop if not 0 <= token < n_vocab]
    if unknown:
        raise ValueError(
            f"stop_token_ids {unknown} are not in the vocabulary of 0 to {n_vocab - 1}; leave them out"
        )
    if request.logprobs is not None and request.logprobs > n_vocab:
        raise ValueError(
            f"logprobs={request.logprobs} asks for more tokens than the vocabulary has ({n_vocab})"
        )
    return Prepared(
        request=request,
        source_ids=source_ids,
        prefix_ids=prefix_ids,
        stop_token_ids=frozenset(stop),
        tokenizer=tokenizer,
    )
