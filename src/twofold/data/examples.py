"""Records to examples: the objective of a run, the lengths it allows, and the sentinels it needs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from twofold.config.data import DataConfig, Denoiser
from twofold.data.chat import record_to_example
from twofold.data.convention import Convention, Example, make_example
from twofold.data.sources import Record
from twofold.data.tokenize import Tokenizer, chunk_document, encode
from twofold.objectives.pair import Tokens
from twofold.objectives.prefix_lm import prefix_lm, prefix_lm_raw_length, split_point
from twofold.objectives.ul2 import PRESETS, Mixture, sentinels_needed, ul2, ul2_raw_length


@dataclass(slots=True)
class ExampleCounts:
    """Supervised pairs that were longer than a row."""

    truncated: int = 0
    skipped: int = 0


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
    mode_ids = _mode_ids(tokenizer, mixture)
    return sentinels_needed(mixture, _raw_length(config, convention, mixture, mode_ids))


def _mode_ids(tokenizer: Tokenizer, mixture: Mixture) -> dict[str, list[int]]:
    """Mode tokens as the tokenizer writes them: one id if they are in the vocabulary, several if not."""
    tokens = {denoiser.mode_token for denoiser, _ in mixture} - {None}
    return {token: encode(tokenizer, token).tolist() for token in tokens if token is not None}


def _raw_length(
    config: DataConfig,
    convention: Convention,
    mixture: Mixture,
    mode_ids: Mapping[str, Sequence[int]],
) -> int:
    """Tokens of a chunk of running text, so that every example fits a row whatever is drawn.

    The source gets a BOS where the convention has one, and gives its last token to the decoder where the
    decoder starts from it. The target gets a stop token; the decoder's one given token costs nothing, as the
    last target token is no input.
    """
    source_budget = config.source_length - convention.source_bos
    source_budget += convention.decoder_start == "last_source_token"
    target_budget = config.target_length - 1
    if mixture:
        return ul2_raw_length(mixture, source_budget, target_budget, mode_ids)
    return prefix_lm_raw_length(source_budget, target_budget, config.objective.split)


class ExampleMaker:
    """Turns records into the examples of a run."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: DataConfig,
        convention: Convention,
        sentinel_ids: Sequence[int] = (),
    ) -> None:
        """Check lengths and sentinels before anything is read.

        Raises:
            ValueError: rows too short for the objective, or too few sentinels (naming how many are needed).
        """
        self._tokenizer = tokenizer
        self._config = config
        self._convention = convention
        self._sentinel_ids = tuple(dict.fromkeys(sentinel_ids))  # one id can stand for one span only
        self._mixture = mixture_of(config)
        self._mode_ids = _mode_ids(tokenizer, self._mixture)
        self._raw_length = 0
        if config.objective.name == "supervised":
            return
        self._raw_length = _raw_length(config, convention, self._mixture, self._mode_ids)
        needed = sentinels_needed(self._mixture, self._raw_length)
        if needed > len(self._sentinel_ids):
            raise ValueError(
                f"objective {config.objective.name!r} needs {needed} sentinels for chunks of "
                f"{self._raw_length} tokens, got {len(self._sentinel_ids)}; find them with "
                "twofold.objectives.find_sentinels, add them with twofold.adapt.add_sentinels, or lower "
                "source_length and target_length"
            )

    def examples(self, record: Record, rng: np.random.Generator, counts: ExampleCounts) -> Iterator[Example]:
        """All examples of one record, in order.

        Args:
            record: as the objective wants it: text, or a supervised pair.
            rng: the only randomness.
            counts: raised for pairs that were truncated or skipped.

        Raises:
            ValueError: a supervised pair that does not fit, unless the config says otherwise; see also
                `make_example` and `span_corruption`.
        """
        if self._config.objective.name == "supervised":
            example = self._fit(record_to_example(record, self._tokenizer, self._convention), counts)
            if example is not None:
                yield example
            return
        for chunk in chunk_document(encode(self._tokenizer, record["text"]), self._raw_length):
            yield self._denoise(chunk.tokens, chunk.ends, rng)

    def _denoise(self, tokens: Tokens, ends: bool, rng: np.random.Generator) -> Example:
        if not self._mixture:
            split = split_point(len(tokens), self._config.objective.split, rng)
            return make_example(prefix_lm(tokens, split), self._convention, ends)
        pair, denoiser = ul2(tokens, self._mixture, self._sentinel_ids, rng, self._mode_ids)
        # A list of spans is complete wherever the chunk was cut, so it always stops (T5 appends EOS to every
        # target).
        return make_example(pair, self._convention, ends or denoiser.kind == "span")

    def _fit(self, example: Example, counts: ExampleCounts) -> Example | None:
        """A supervised example within the row, or None to skip it."""
        config = self._config
        source_len, target_len = len(example.source), example.decoder_length
        if source_len <= config.source_length and target_len <= config.target_length:
            return example
        if config.max_length_action == "skip":
            counts.skipped += 1
            return None
        target_room = config.target_length - (len(example.decoder_prefix) - 1)
        if config.max_length_action == "error" or target_room < 1:
            raise ValueError(
                f"a pair of {source_len} source and {target_len} target tokens does not fit a row of "
                f"{config.source_length} and {config.target_length}; raise source_length or target_length, "
                "or set max_length_action to 'truncate' or 'skip'"
            )
        counts.truncated += 1
        source = example.source
        if source_len > config.source_length:
            # The end stays: it holds the question and the header of the reply.
            num_bos = int(self._convention.source_bos)
            source = np.concatenate([source[:num_bos], source[source_len - config.source_length + num_bos :]])
        fits = target_len <= config.target_length
        return example._replace(
            source=source, target=example.target[:target_room], ends=example.ends and fits
        )
