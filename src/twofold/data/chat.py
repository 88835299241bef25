"""Conversations to examples, through the tokenizer's own chat template.

Everything before the last reply is read; the reply and the token that the template closes it with are
written. The template's start of a reply (the generation header) ends the source, as in T5Gemma, or is what
the decoder is given, in a pair that goes on where its donor would.

Where a template has no system role (Gemma 2, T5Gemma), system text begins the first user's turn, an empty line between
them, as Gemma 3's own template has it.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from jinja2 import TemplateError

from twofold.data.convention import Convention, Example, example_from_prompt, make_example, split_inputs
from twofold.data.sources import Record
from twofold.data.tokenize import ChatTokenizer, Tokenizer, encode
from twofold.objectives.pair import Pair, Tokens

Messages = Sequence[Mapping[str, str]]
"""[{"role": "user", "content": "..."}, ...]"""

_PROBE = "twofold-reply-probe"
"""Stands for a reply when the template is asked what it writes around one."""


class ChatRefused(ValueError):
    """The tokenizer's chat template does not render a conversation."""


def prompt_inputs(
    messages_or_text: Messages | str, tokenizer: ChatTokenizer, convention: Convention
) -> tuple[Tokens, Tokens]:
    """Encoder input and decoder prefix to generate from.

    Args:
        messages_or_text: a conversation that waits for a reply, or plain text that is read as it stands.
        tokenizer: with a chat template, if a conversation is given.
        convention: of the model.

    Returns:
        Source int64 [S] and decoder prefix int64 [P].

    Raises:
        ChatRefused: see there.
        ValueError: no chat template, one that cannot be used (see `messages_to_example`), or empty text for
            a decoder that starts from the last source token.
    """
    if isinstance(messages_or_text, str):
        return split_inputs(encode(tokenizer, messages_or_text), convention)
    tokenizer = _with_template(tokenizer)
    source, header = _source_and_header(_with_system(messages_or_text, tokenizer), tokenizer, convention)
    return split_inputs(source, convention, header)


def messages_to_example(messages: Messages, tokenizer: ChatTokenizer, convention: Convention) -> Example:
    """A supervised example from a conversation that ends with the assistant's reply.

    Raises:
        ChatRefused: see there.
        ValueError: the last message is not a reply; the template changes the prompt once a reply is there,
            or its generation header is not an addition at the end; the token after a reply is no stop token.
    """
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        roles = [message.get("role") for message in messages]
        raise ValueError(
            f"a conversation must end with a reply of the assistant to something, got roles {roles}"
        )
    tokenizer = _with_template(tokenizer)
    messages = [*_with_system(messages[:-1], tokenizer), messages[-1]]
    source, header = _source_and_header(messages[:-1], tokenizer, convention)
    target, stop_token_id = _reply_and_stop(messages, tokenizer, convention)
    pair = Pair(source, _as_tokens([*target, stop_token_id]) if target else _as_tokens([]))
    return make_example(pair, convention, ends=True, header=header)


def record_to_example(record: Record, tokenizer: Tokenizer, convention: Convention) -> Example:
    """A supervised example from a record with messages, or prompt and completion.

    A prompt is a user's turn where the tokenizer has a chat template, and plain text where it has none.
    """
    if "messages" in record:
        return messages_to_example(record["messages"], _with_template(tokenizer), convention)
    if getattr(tokenizer, "chat_template", None) is None:
        prompt, completion = encode(tokenizer, record["prompt"]), encode(tokenizer, record["completion"])
        return example_from_prompt(prompt, completion, convention)
    turns = [
        {"role": "user", "content": record["prompt"]},
        {"role": "assistant", "content": record["completion"]},
    ]
    return messages_to_example(turns, _with_template(tokenizer), convention)


def _as_tokens(ids: list[int]) -> Tokens:
    return np.asarray(ids, dtype=np.int64)


def _with_template(tokenizer: Tokenizer) -> ChatTokenizer:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "the tokenizer has no chat template, so messages cannot be rendered; set "
            "tokenizer.chat_template, or use prompt and completion columns"
        )
    return cast(ChatTokenizer, tokenizer)


def _render(messages: Messages, tokenizer: ChatTokenizer, *, with_header: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=with_header)
    except TemplateError as error:
        roles = [message.get("role") for message in messages]
        raise ChatRefused(f"the chat template refuses a conversation with roles {roles}: {error}") from error


def _source_and_header(
    messages: Messages, tokenizer: ChatTokenizer, convention: Convention
) -> tuple[Tokens, Tokens]:
    """Token ids of the conversation and of the generation header after it."""
    text = _render(messages, tokenizer, with_header=False)
    text_with_header = _render(messages, tokenizer, with_header=True)
    source, source_with_header = encode(tokenizer, text), encode(tokenizer, text_with_header)
    if not text_with_header.startswith(text) or source_with_header[: len(source)].tolist() != source.tolist():
        raise ValueError(
            "the chat template does not add its generation header at the end: the conversation renders as "
            f"{text[-60:]!r} without and {text_with_header[-60:]!r} with it; use a template that does"
        )
    header = source_with_header[len(source) :]
    bos = convention.bos_token_id
    # Decoder-only templates often write BOS themselves. An encoder trained without one must not get it, but
    # where the header has it too it opens a turn (ChatML's <|im_start|>) and is part of the text.
    if not convention.source_bos and source[:1].tolist() == [bos] and bos not in header:
        source = source[1:]
    return source, header


def _with_system(messages: Messages, tokenizer: ChatTokenizer) -> Messages:
    """The same, with system text in the first user's turn where the template refuses or forgets it."""
    if len(messages) < 2 or messages[0].get("role") != "system" or messages[1].get("role") != "user":
        return messages
    system, user = messages[0]["content"], messages[1]["content"]
    try:
        if system.strip() in _render(messages, tokenizer, with_header=True):
            return messages
    except ChatRefused:
        pass  # whatever else it refuses, it refuses again without a system role
    return [{**messages[1], "content": f"{system}\n\n{user}"}, *messages[2:]]


def _reply_and_stop(
    messages: Messages, tokenizer: ChatTokenizer, convention: Convention
) -> tuple[list[int], int]:
    """The tokens the template writes for the last reply, and the one it closes it with."""
    prompt = _render(messages[:-1], tokenizer, with_header=True)
    whole = _render(messages, tokenizer, with_header=False)
    probe = _render([*messages[:-1], {**messages[-1], "content": _PROBE}], tokenizer, with_header=False)
    tail = probe[probe.rfind(_PROBE) + len(_PROBE) :]
    if not whole.startswith(prompt) or _PROBE not in probe or not whole.endswith(tail):
        raise ValueError(
            "the chat template renders a conversation in another way once the reply is there (before: "
            f"...{prompt[-60:]!r}); use a template that only appends"
        )
    tail_ids = encode(tokenizer, tail.lstrip()).tolist()
    if not tail_ids or tail_ids[0] not in convention.stop_token_ids:
        found = tail_ids[0] if tail_ids else None
        raise ValueError(
            f"the chat template closes a reply with {tail!r} (token {found}), which is not a stop token "
            f"{convention.stop_token_ids}; add it to stop_token_ids of the convention"
        )
    reply = whole[len(prompt) : len(whole) - len(tail)]
    return _tokens_between(prompt, reply, tail, tokenizer), tail_ids[0]


def _tokens_between(prompt: str, reply: str, tail: str, tokenizer: ChatTokenizer) -> list[int]:
    """A reply's tokens as they stand in its conversation: SentencePiece tokenizers would put a space in front of a
    reply that stands alone. Where tokens reach over its ends, it is taken alone after all."""
    before, after = encode(tokenizer, prompt).tolist(), encode(tokenizer, tail).tolist()
    whole = encode(tokenizer, prompt + reply + tail).tolist()
    end = len(whole) - len(after)
    if whole[: len(before)] == before and len(before) <= end and whole[end:] == after:
        return whole[len(before) : end]
    return encode(tokenizer, reply).tolist()
