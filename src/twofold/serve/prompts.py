"""From what a client asks to requests of the engine: tokens, room for the answer, constraints. Runs in a thread."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from twofold.data.chat import Messages, prompt_inputs
from twofold.data.convention import split_inputs
from twofold.data.tokenize import encode
from twofold.infer import Constraint, Request, Sampling
from twofold.serve.errors import ApiError, bad_request
from twofold.serve.schemas import Generation, Message, ResponseFormat
from twofold.serve.service import Served
from twofold.serve.settings import ServeSettings

_LOWEST_TEMPERATURE = 1e-4
"""Below it, logits divided by it leave float32's range, and the most likely token is all there is to draw."""
_MAX_SCHEMA = 64 * 1024
_PIECE = 16 * 1024

Prompt = str | Messages | Sequence[int]
"""A text, a conversation, or token ids."""


def conversation(messages: Sequence[Message]) -> Messages:
    """As chat templates take it."""
    return [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        for message in messages
    ]


def read_prompt(served: Served, prompt: Prompt) -> tuple[list[int], list[int]]:
    """Encoder input and decoder prefix.

    Raises:
        ValueError: empty, or the chat template refuses it.
    """
    engine = served.engine
    if isinstance(prompt, str) or isinstance(prompt[0], Mapping):
        source, prefix = prompt_inputs(cast(Messages | str, prompt), engine.tokenizer, engine.convention)
    else:
        source, prefix = split_inputs(np.asarray(prompt, dtype=np.int64), engine.convention)
    return source.tolist(), prefix.tolist()


def refuse_endless(served: Served, settings: ServeSettings, texts: Sequence[str]) -> None:
    """Refuse what is far too long after a look at its beginning, as tokenising a megabyte takes seconds.

    Args:
        served: the model.
        settings: of the server.
        texts: that are read one after another. Cut into pieces they have a few tokens more than whole, so that
            only those with twice as many as are allowed are refused here.

    Raises:
        ApiError: there is no room for them.
    """
    most = served.engine.model.config.encoder.max_position_embeddings
    most = min(most, settings.max_prompt_tokens or most)
    n_characters = sum(map(len, texts))
    if n_characters <= _PIECE:
        return
    n_seen = n_tokens = 0
    for text in texts:
        for start in range(0, len(text), _PIECE):
            piece = text[start : start + _PIECE]
            n_seen += len(piece)
            n_tokens += len(encode(served.engine.tokenizer, piece))
            if n_tokens > 2 * most:
                about = n_tokens * n_characters // n_seen
                raise _too_long(f"the prompt has about {about} tokens, at most {most} are read; shorten it")


def n_free(served: Served, settings: ServeSettings, source: Sequence[int], prefix: Sequence[int]) -> int:
    """Tokens that an answer may have at most.

    Raises:
        ApiError: the prompt leaves no room.
    """
    config = served.engine.model.config
    n_prompt = len(source) + len(prefix)
    limits = {"the encoder's positions": (len(source), config.encoder.max_position_embeddings)}
    if settings.max_prompt_tokens is not None:
        limits["this server's max_prompt_tokens"] = (n_prompt, settings.max_prompt_tokens)
    for name, (n_tokens, most) in limits.items():
        if n_tokens > most:
            raise _too_long(f"the prompt has {n_tokens} tokens, {name} are {most}; shorten it")
    n_before = n_prompt if config.decoder_positions == "continue" else len(prefix)
    free = config.decoder.max_position_embeddings - n_before
    if free < 1:
        raise _too_long(
            f"the prompt has {n_prompt} tokens and leaves no room for an answer among the decoder's "
            f"{config.decoder.max_position_embeddings} positions; shorten it"
        )
    return free


def engine_request(
    served: Served,
    settings: ServeSettings,
    prompt: Prompt,
    asked: Generation,
    *,
    number: int = 0,
    new_tokens: int | None,
    default_new_tokens: int,
    logprobs: int | None,
    seed: int,
    constraint: Constraint | None,
) -> Request:
    """One prompt's.

    Args:
        served: the model.
        settings: of the server.
        prompt: what is read.
        asked: how it is answered.
        number: of the prompt in its request.
        new_tokens: how many were asked for.
        default_new_tokens: taken where none were; less where there is less room.
        logprobs: see `infer.Request`.
        seed: of the first answer to the first prompt.
        constraint: likewise.

    Raises:
        ApiError: too long, or more than this server allows.
        ValueError: settings that contradict each other.
    """
    if isinstance(prompt, str):
        refuse_endless(served, settings, [prompt])
    elif isinstance(prompt[0], Mapping):
        refuse_endless(served, settings, [message["content"] for message in cast(Messages, prompt)])
    source, prefix = read_prompt(served, prompt)
    free = n_free(served, settings, source, prefix)
    most = settings.max_new_tokens or free
    if new_tokens is not None and new_tokens > most and settings.max_new_tokens is not None:
        raise bad_request(
            f"{new_tokens} tokens are asked for, this server writes at most {most}", param="max_tokens"
        )
    if new_tokens is not None and new_tokens > free:
        raise _too_long(
            f"the prompt has {len(source) + len(prefix)} tokens and {new_tokens} are asked for, where the decoder "
            f"has positions for {free} more; shorten the prompt or lower max_tokens",
            param="max_tokens",
        )
    if logprobs is not None and logprobs > settings.max_logprobs:
        raise bad_request(f"at most {settings.max_logprobs} most likely tokens are reported, got {logprobs}")
    n = asked.n or 1
    return Request(
        source_ids=source,
        prefix_ids=prefix,
        max_new_tokens=new_tokens or min(default_new_tokens, most, free),
        sampling=_sampling(asked, seed + number * n),
        n=n,
        num_beams=asked.num_beams or 1,
        length_penalty=1.0 if asked.length_penalty is None else asked.length_penalty,
        early_stopping=asked.early_stopping or False,
        stop=asked.stop or (),
        stop_token_ids=asked.stop_token_ids,
        logprobs=logprobs,
        constraint=constraint,
        lookup=asked.lookup or 0,
    )


def first_seed(asked: Generation) -> int:
    """The one that was given, or one that nobody knows."""
    return secrets.randbits(48) if asked.seed is None else asked.seed


def needs_grammar(asked: Generation, response_format: ResponseFormat | None = None) -> bool:
    """A schema or a pattern is to be followed."""
    return asked.regex is not None or (response_format is not None and response_format.type != "text")


def constraint_of(
    served: Served, asked: Generation, response_format: ResponseFormat | None = None
) -> Constraint | None:
    """What answers are held to.

    Raises:
        ApiError: two things at once, or too large a schema.
        ValueError: it cannot be followed.
        ImportError: the extra `grammar` is missing.
    """
    if not needs_grammar(asked, response_format):
        return None
    if response_format is None or response_format.type == "text":
        assert asked.regex is not None
        return served.engine.regex(asked.regex)
    if asked.regex is not None:
        raise bad_request(
            "regex and response_format each say what answers are; give one of them", param="regex"
        )
    if response_format.json_schema is None:
        return served.engine.json_schema({"type": "object", "additionalProperties": True})
    schema = response_format.json_schema.schema_
    if len(repr(schema)) > _MAX_SCHEMA:
        raise bad_request(f"the schema is longer than {_MAX_SCHEMA:,} characters", param="response_format")
    return served.engine.json_schema(schema)


def _sampling(asked: Generation, seed: int) -> Sampling:
    has_beams = (asked.num_beams or 1) > 1
    temperature = asked.temperature
    if temperature is None:
        temperature = 0.0 if has_beams else 1.0
    return Sampling(
        temperature=0.0 if temperature < _LOWEST_TEMPERATURE else temperature,
        top_k=asked.top_k,
        top_p=None if asked.top_p == 1.0 else asked.top_p,
        min_p=asked.min_p,
        repetition_penalty=asked.repetition_penalty or 1.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        seed=seed,
    )


def _too_long(message: str, param: str = "prompt") -> ApiError:
    return bad_request(message, param=param, code="context_length_exceeded")
