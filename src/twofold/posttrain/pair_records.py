"""Records of preferences, in the forms that people publish them in, to one form.

- a prompt (a text or messages), a chosen and a rejected reply;
- LLaMA-Factory's: messages and replies of {"from": "human" | "gpt" | "system", "value"};
- whole conversations that differ in the last reply: lists of messages, or transcripts as in hh-rlhf (arXiv 2204.05862),
  in which turns begin with an empty line and "Human:" or "Assistant:".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any, NamedTuple

from twofold.config.preferences import PairSource
from twofold.data.sources import BadRecord, RawRecord, Record, parse_row

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_TURN = re.compile(r"\n\n(Human|Assistant):")


class PairRecord(NamedTuple):
    """A prompt with two replies."""

    prompt: str | list[dict[str, str]]
    """A text, or {"role", "content"} of each turn."""

    chosen: str
    rejected: str

    margin: float = 0.0
    """By how much the rewards should differ, 0 or more."""

    def with_reply(self, reply: str) -> Record:
        """The prompt and one reply, as the data pipeline takes them."""
        if isinstance(self.prompt, str):
            return {"prompt": self.prompt, "completion": reply}
        return {"messages": [*self.prompt, {"role": "assistant", "content": reply}]}


def parse_pair(raw: RawRecord, source: PairSource) -> PairRecord:
    """Read a record of preferences.

    Raises:
        BadRecord: says where and why; an empty prompt or reply is one of the reasons.
    """
    values = dict(zip(source.columns, parse_row(raw, source.columns), strict=True))
    both = values[source.chosen_field], values[source.rejected_field]
    prompt: str | list[dict[str, str]]
    if source.prompt_field is None:
        conversations = [_conversation(value, raw.where) for value in both]
        prompt = conversations[0][:-1]
        if conversations[1][:-1] != prompt:
            raise BadRecord(
                "two prompts",
                f"{raw.where}: chosen and rejected differ before their last reply; pair replies to one",
            )
        chosen, rejected = (_reply(turns[-1], raw.where) for turns in conversations)
    else:
        value = values[source.prompt_field]
        prompt = value if isinstance(value, str) else read_messages(value, source.prompt_field, raw.where)
        chosen, rejected = (_reply(value, raw.where) for value in both)
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise BadRecord("empty prompt", f"{raw.where}: the prompt is empty")
    if not chosen.strip() or not rejected.strip():
        raise BadRecord("empty reply", f"{raw.where}: a reply is empty")
    margin = 0.0
    if source.margin_field is not None:
        margin = _margin(values[source.margin_field], source.margin_field, raw.where)
    return PairRecord(prompt, chosen, rejected, margin)


def _conversation(value: Any, where: str) -> list[dict[str, str]]:
    """All turns; the last is a reply."""
    turns = (
        _transcript(value, where) if isinstance(value, str) else read_messages(value, "conversation", where)
    )
    if not turns or turns[-1]["role"] != "assistant":
        last = turns[-1]["role"] if turns else "nothing"
        raise BadRecord("no reply", f"{where}: a conversation must end with a reply, got {last}")
    return turns


def _transcript(text: str, where: str) -> list[dict[str, str]]:
    before, *parts = _TURN.split(text)
    if before.strip() or not parts:
        raise BadRecord(
            "no transcript", f"{where}: a transcript starts with '\\n\\nHuman:', got {text[:60]!r}"
        )
    speakers = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": speakers[speaker], "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def read_messages(value: Any, name: str, where: str) -> list[dict[str, str]]:
    """A list of messages in either form, as {"role", "content"}.

    Raises:
        BadRecord: it is none; names the column.
    """
    if not isinstance(value, list):
        raise BadRecord(
            "wrong type",
            f"{where}: column {name!r} must be a text or a list of messages, got {type(value).__name__}",
        )
    return [_message(turn, where) for turn in value]


def _message(turn: Any, where: str) -> dict[str, str]:
    if isinstance(turn, Mapping):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(content, str) and role in _ROLES:
            return {"role": _ROLES[role], "content": content}
    raise BadRecord(
        "wrong type",
        f"{where}: a message is {{role, content}} or {{from, value}} with a role of {', '.join(_ROLES)}, got "
        f"{str(turn)[:80]!r}",
    )


def _reply(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    turns = read_messages(value, "reply", where) if isinstance(value, list) else [_message(value, where)]
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise BadRecord(
            "no reply",
            f"{where}: a reply is one message of the assistant, got roles {[turn['role'] for turn in turns]}; for "
            "whole conversations set prompt_field to null",
        )
    return turns[0]["content"]


def _margin(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value) or value < 0:
        raise BadRecord("no margin", f"{where}: column {name!r} must be a number of 0 or more, got {value!r}")
    return float(value)
