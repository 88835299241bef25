"""Tokens to examples: the objective of a run, the lengths it allows, and the sentinels it needs."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from twofold.config.data import DataConfig, Denoiser
from twofold.data.convention import Convention, Example, RawText, make_example
from twofold.data.tokenize import Tokenizer, encode
from twofold.objectives.pair import NOT_OF_THE_TEXT, Pair, Tokens
from twofold.objectives.prefix_lm import prefix_lm, prefix_lm_raw_length, split_point
from twofold.objectives.ul2 import (
    PRESETS,
    Mixture,
    denoise,
    draw_denoiser,
    sentinels_needed,
    ul2_raw_lengths,
)

EXAMPLES_PER_UNIT = 4
"""Full examples in a unit of a mixture: more leave fewer short rests, fewer shuffle better."""


def mixture_of(config: DataConfig) -> Mixture:
    """The denoisers of a run; span corruption is a mixture of one, the other objectives have none."""
    objective = config.objective
    if objective.name == "span_corruption":
        span = Denoiser(
            kind="span", noise_density=objective.noise_density, mean_span_length=objective.mean_span_length
        )
        return ((span, 1.0),)
    if objective.name == "ul2":
        return PRESETS[objective.preset] if objective.preset is not None else objective.denoisers
    return ()


def required_sentinels(tokenizer: Tokenizer, config: DataConfig, convention: Convention) -> int:
    """How many sentinels a run needs (0 for objectives without), to find or add them before it starts."""
    mixture = mixture_of(config)
    if not mixture:
        return 0
    return sentinels_needed(mixture, _raw_lengths(config, convention, mixture, _mode_ids(tokenizer, mixture)))


def longest_text(tokenizer: Tokenizer, config: DataConfig, convention: Convention) -> int:
    """Tokens of the longest text that one example is made of, both sides together."""
    if config.objective.name == "supervised":
        return config.source_length + config.target_length
    mixture = mixture_of(config)
    return max(_raw_lengths(config, convention, mixture, _mode_ids(tokenizer, mixture)))


def _mode_ids(tokenizer: Tokenizer, mixture: Mixture) -> dict[str, list[int]]:
    """Mode tokens as the tokenizer writes them: one id if they are in the vocabulary, several if not."""
    tokens = {denoiser.mode_token for denoiser, _ in mixture} - {None}
    return {token: encode(tokenizer, token).tolist() for token in tokens if token is not None}


def _raw_lengths(
    config: DataConfig,
    convention: Convention,
    mixture: Mixture,
    mode_ids: Mapping[str, Sequence[int]],
) -> tuple[int, ...]:
    """Tokens of running text per example: of each denoiser, or one for PrefixLM. Every example fits a row.

    The source gets a BOS where the convention has one, and gives its last token to the decoder where the
    decoder starts from it. The target gets a stop token; the decoder's one given token costs nothing, as the
    last target token is no input.
    """
    source_budget = config.source_length - convention.source_bos
    source_budget += convention.decoder_start == "last_source_token"
    target_budget = config.target_length - 1
    if mixture:
        lengths = ul2_raw_lengths(mixture, source_budget, target_budget, mode_ids)
    else:
        lengths = (prefix_lm_raw_length(source_budget, target_budget, config.objective.split),)
    if config.max_text_length is None:
        return lengths
    return tuple(min(length, config.max_text_length) for length in lengths)


class ExampleMaker:
    """Turns stored tokens into the examples of a run.

    A *unit* is what is shuffled and has randomness of its own: a supervised pair, a chunk of running text that
    makes one PrefixLM example, or a longer one that denoisers share, each taking as much as fills a row.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: DataConfig,
        convention: Convention,
        sentinel_ids: Sequence[int] = (),
        *,
        keeps_raw: bool = False,
    ) -> None:
        """Check lengths and sentinels before anything is read.

        Args:
            tokenizer: writes mode tokens.
            config: objective and lengths.
            convention: of the model.
            sentinel_ids: in order of use.
            keeps_raw: examples carry the text they were made of, for a teacher.

        Raises:
            ValueError: rows too short for the objective, or too few sentinels (naming how many are needed).
        """
        self._config = config
        self._convention = convention
        self._keeps_raw = keeps_raw
        self._sentinel_ids = tuple(dict.fromkeys(sentinel_ids))  # one id can stand for one span only
        self._mixture = mixture_of(config)
        self._mode_ids = _mode_ids(tokenizer, self._mixture)
        self.is_supervised = config.objective.name == "supervised"
        self._is_random = bool(self._mixture) or config.objective.split == "uniform"
        self._raw_lengths: tuple[int, ...] = ()
        self._unit_length = 0
        if self.is_supervised:
            return
        self._raw_lengths = _raw_lengths(config, convention, self._mixture, self._mode_ids)
        self._unit_length = max(self._raw_lengths) * (EXAMPLES_PER_UNIT if len(self._mixture) > 1 else 1)
        needed = sentinels_needed(self._mixture, self._raw_lengths) if self._mixture else 0
        if needed > len(self._sentinel_ids):
            raise ValueError(
                f"objective {config.objective.name!r} needs {needed} sentinels for chunks of up to "
                f"{max(self._raw_lengths)} tokens, got {len(self._sentinel_ids)}; find them with "
                "twofold.objectives.find_sentinels, add them with twofold.adapt.add_sentinels, or lower "
                "source_length and target_length"
            )

    def units_per_document(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Units in documents of so many tokens, int64 [N]: whole ones, and a rest of at least 2 tokens.

        A single token that is left over is dropped: a source and a target need one each.
        """
        if self.is_supervised:
            return np.ones(len(lengths), dtype=np.int64)
        return lengths // self._unit_length + (lengths % self._unit_length >= 2)

    def unit_spans(
        self, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where units lie in the token file.

        Args:
            starts, ends: int64 [n], of the unit's document.
            numbers: int64 [n], of the unit in its document.
        """
        if self.is_supervised:
            return starts, ends
        first = starts + numbers * self._unit_length
        return first, np.minimum(first + self._unit_length, ends)

    def examples(
        self, tokens: Tokens, parts: tuple[int, int] | None, *, ends: bool, seed: Sequence[int]
    ) -> list[Example]:
        """The examples of one unit, in order.

        Args:
            tokens: int64 [length], of the unit.
            parts: of a supervised pair: how many tokens are source, and how many decoder prefix.
            ends: the document ends with the unit.
            seed: of the unit; the only randomness.

        Raises:
            ValueError: see `make_example` and `span_corruption`.
        """
        if parts is not None:
            source_len, prefix_len = parts
            prefix_end = source_len + prefix_len
            return [self._fit(tokens[:source_len], tokens[source_len:prefix_end], tokens[prefix_end:])]
        if not self._is_random:
            return [self._made(prefix_lm(tokens, len(tokens) // 2), tokens, 0, ends)]
        rng = np.random.default_rng(seed)
        if not self._mixture:
            split = split_point(len(tokens), self._config.objective.split, rng)
            return [self._made(prefix_lm(tokens, split), tokens, 0, ends)]
        return self._denoised(tokens, ends, rng)

    def _denoised(self, tokens: Tokens, ends: bool, rng: np.random.Generator) -> list[Example]:
        made, at = [], 0
        while len(tokens) - at >= 2:
            number = draw_denoiser(self._mixture, rng)
            denoiser, rest = self._mixture[number][0], len(tokens) - at
            length = min(self._raw_lengths[number], rest)
            if rest - length == 1 and length > 2:
                length -= 1  # a single token could not be an example
            piece, start = tokens[at : at + length], at
            pair = denoise(piece, denoiser, self._sentinel_ids, rng, self._mode_ids)
            at += length
            # A list of spans is complete wherever the chunk was cut, so it always stops (T5 appends EOS to every
            # target).
            stops = denoiser.kind == "span" or (ends and at == len(tokens))
            made.append(self._made(pair, piece, start, stops))
        return made

    def _made(self, pair: Pair, tokens: Tokens, start: int, ends: bool) -> Example:
        """The example of a pair; `tokens` is the text it was made of, `start` where that is in the unit."""
        example = make_example(pair, self._convention, ends)
        if not self._keeps_raw:
            return example
        assert pair.origins is not None
        # A stop token was appended, which is no token of the text.
        appended = np.full(len(example.target) - len(pair.target), NOT_OF_THE_TEXT)
        origins = np.concatenate([pair.origins, appended])
        return example._replace(raw=RawText(tokens, origins, start=start))

    def oversize(
        self,
        source_lengths: npt.NDArray[np.int64],
        prefix_lengths: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.int64]:
        """Which supervised pairs are longer than a row (0: fits, 1: can be cut, 2: no room for a target); [N]."""
        room = self._config.target_length - (prefix_lengths - 1)
        targets = lengths - source_lengths - prefix_lengths
        is_long = (source_lengths > self._config.source_length) | (targets > room)
        return np.where(is_long, np.where(room < 1, 2, 1), 0)

    def _fit(self, source: Tokens, prefix: Tokens, target: Tokens) -> Example:
        """A supervised example, cut to the row."""
        target_at = len(source) + len(prefix)
        whole = Example(source, prefix, target, True)
        example = cut(whole, self._config.source_length, self._config.target_length, self._convention)
        return example._replace(raw=self._pair_text(example, target_at)) if self._keeps_raw else example

    def _pair_text(self, example: Example, target_at: int) -> RawText:
        """Source, what is given of the reply, and target, as a language model would read them."""
        given = example.decoder_prefix
        if self._convention.decoder_start == "bos":
            given = given[1:]  # a start token, not text
        tokens = np.concatenate([example.source, given, example.target])
        first = len(example.source) + len(given)
        origins = np.arange(first, len(tokens))
        if example.ends:
            origins[-1] = NOT_OF_THE_TEXT
        return RawText(tokens, origins, start=target_at - first)


def cut(example: Example, source_length: int, target_length: int, convention: Convention) -> Example:
    """A supervised example with at most so many tokens on each side: the end of the source and the start of the target
    stay. There must be room for the decoder's prefix and a token."""
    source = example.source
    if len(source) > source_length:
        # The end stays: it holds the question and the header of the reply.
        num_bos = int(convention.source_bos)
        source = np.concatenate([source[:num_bos], source[len(source) - source_length + num_bos :]])
    room = target_length - (len(example.decoder_prefix) - 1)
    ends = example.ends and len(example.target) <= room
    return Example(source, example.decoder_prefix, example.target[:room], ends)
