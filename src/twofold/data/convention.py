"""How a pair becomes what the model sees: where BOS goes, what the decoder starts from, where a text stops.

The shift is done here and nowhere else: the decoder's inputs are its prefix and the target without its last
token.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from twofold.config.model import EncoderDecoderConfig
from twofold.objectives.pair import Pair, Tokens

IGNORE_INDEX = -100
"""Label of a position that is not scored."""


class RawText(NamedTuple):
    """The text an example was made of, for a teacher that reads it instead of source and target."""

    tokens: Tokens
    """int64 [R]: what a language model would read, without BOS where the example added one."""

    origins: Tokens
    """int64 [T]: which of these tokens each target token is; NOT_OF_THE_TEXT for sentinels and stop tokens."""

    source: int = 0
    """Number of the corpus in the run."""

    start: int = 0
    """Place of the first token in the corpus's store; `start + origins` are places of target tokens."""


class Example(NamedTuple):
    """One example as the model sees it. S, P, T: tokens of source, decoder prefix, target."""

    source: Tokens
    """int64 [S]: encoder input."""

    decoder_prefix: Tokens
    """int64 [P], P >= 1: decoder inputs that are given, not predicted (BOS, chat header...)."""

    target: Tokens
    """int64 [T], T >= 1: what is predicted."""

    ends: bool
    """The text ends here, so the target ends in a stop token."""

    raw: RawText | None = None
    """Kept where a teacher wants it."""

    @property
    def decoder_input_ids(self) -> Tokens:
        """int64 [P - 1 + T]."""
        return np.concatenate([self.decoder_prefix, self.target[:-1]])

    @property
    def labels(self) -> Tokens:
        """int64 [P - 1 + T]: the token after each decoder input, IGNORE_INDEX inside the prefix."""
        ignored = np.full(len(self.decoder_prefix) - 1, IGNORE_INDEX, dtype=np.int64)
        return np.concatenate([ignored, self.target])

    @property
    def decoder_length(self) -> int:
        """Decoder positions the example takes."""
        return len(self.decoder_prefix) - 1 + len(self.target)


@dataclass(frozen=True, kw_only=True, slots=True)
class Convention:
    """The special tokens of a pair, as its donor or its published family uses them."""

    decoder_start: Literal["bos", "last_source_token"]
    """`bos`: the published designs. `last_source_token`: the lossless start: the decoder goes on reading."""

    bos_token_id: int | None
    source_bos: bool
    """The encoder input starts with BOS (the donor's tokenizer adds one; T5Gemma 2 yes, T5Gemma no)."""

    stop_token_ids: tuple[int, ...]
    """Any of them ends a text; the first is the one to append."""

    pad_token_id: int

    @classmethod
    def of(cls, config: EncoderDecoderConfig) -> "Convention":
        """The convention that a model's config.json states.

        Raises:
            ValueError: it names no end token.
        """
        return cls(
            decoder_start=config.decoder_start,
            bos_token_id=config.bos_token_id,
            source_bos=config.source_bos,
            stop_token_ids=config.eos_token_ids,
            # Padding is told apart by segment, so without a pad token any id will do.
            pad_token_id=config.pad_token_id if config.pad_token_id is not None else 0,
        )

    def __post_init__(self) -> None:
        if not self.stop_token_ids:
            raise ValueError("stop_token_ids must name at least one token, or generation could not end")
        if self.bos_token_id is None and (self.source_bos or self.decoder_start == "bos"):
            raise ValueError(
                f"decoder_start={self.decoder_start!r}, source_bos={self.source_bos} need a bos_token_id, "
                "got None; set it, or use decoder_start='last_source_token' and source_bos=False"
            )


def split_inputs(
    source: Tokens, convention: Convention, header: Tokens | None = None
) -> tuple[Tokens, Tokens]:
    """Encoder input and decoder prefix for a prompt.

    Args:
        source: int64 [S].
        convention: where BOS goes and what the decoder starts from.
        header: int64 [H], the chat template's start of a reply. With `bos` it ends the source, with
            `last_source_token` it is the decoder prefix. None or empty: the prompt has none.

    Returns:
        Source and decoder prefix, int64.

    Raises:
        ValueError: two BOS at the start, or no token to start the decoder from.
    """
    bos = convention.bos_token_id
    if convention.source_bos and source[:1].tolist() != [bos]:
        source = np.concatenate([np.asarray([bos], dtype=np.int64), source])
    _refuse_double_bos(source, bos, "source")
    if convention.decoder_start == "bos":
        if header is not None:
            source = np.concatenate([source, header])
        return source, np.asarray([bos], dtype=np.int64)
    if header is not None and len(header):
        return source, header
    if len(source) == 0:
        raise ValueError(
            "the source is empty, so it has no last token for the decoder to start from; give it text"
        )
    return source[:-1], source[-1:]


def make_example(pair: Pair, convention: Convention, ends: bool, header: Tokens | None = None) -> Example:
    """Apply a convention to a pair.

    Args:
        pair: without BOS (one at the start of the source is accepted) and, usually, without stop token.
        convention: see `Convention`.
        ends: the text ends with the target: a stop token is appended unless the target ends in one.
        header: see `split_inputs`.

    Raises:
        ValueError: an empty target, a negative id, a double BOS, or nothing to start the decoder from.
    """
    if len(pair.target) == 0:
        raise ValueError(
            "the target is empty, so the example would teach nothing; drop it or give it an answer"
        )
    source, prefix = split_inputs(pair.source, convention, header)
    target = pair.target
    if ends and int(target[-1]) not in convention.stop_token_ids:
        target = np.append(target, np.int64(convention.stop_token_ids[0]))
    example = Example(source, prefix, target, ends)
    check_example(example, convention)
    return example


def check_example(example: Example, convention: Convention) -> None:
    """Refuse what fine-tunes most often fail on.

    Only *adjacent* BOS at a start are a double BOS: ChatML donors use `<|im_start|>` as BOS, which opens
    every turn.

    Raises:
        ValueError: double BOS, missing stop token, empty prefix or target, negative ids.
    """
    if len(example.target) == 0 or len(example.decoder_prefix) == 0:
        raise ValueError(
            f"an example needs a decoder prefix and a target, got {len(example.decoder_prefix)} and "
            f"{len(example.target)} tokens"
        )
    for name, ids in zip(("source", "decoder_prefix", "target"), example[:3], strict=True):
        if (ids < 0).any():
            raise ValueError(
                f"{name} holds negative ids ({ids.min()}); ignored positions belong in labels only"
            )
    _refuse_double_bos(example.source, convention.bos_token_id, "source")
    _refuse_double_bos(
        np.concatenate([example.decoder_prefix, example.target]), convention.bos_token_id, "decoder input"
    )
    if example.ends and int(example.target[-1]) not in convention.stop_token_ids:
        raise ValueError(
            f"the text ends, but its target ends in token {int(example.target[-1])} and not in a stop token "
            f"{convention.stop_token_ids}; append one, or generation would not learn to stop"
        )


def _refuse_double_bos(ids: Tokens, bos: int | None, name: str) -> None:
    if bos is not None and ids[:2].tolist() == [bos, bos]:
        raise ValueError(
            f"the {name} starts with two BOS tokens ({bos}); tokenise without special tokens and without BOS "
            "in the template: BOS is added here"
        )


def example_from_prompt(prompt_ids: Tokens, completion_ids: Tokens, convention: Convention) -> Example:
    """A supervised example from a tokenised prompt and its answer; the stop token is appended."""
    return make_example(Pair(prompt_ids, completion_ids), convention, ends=True)
