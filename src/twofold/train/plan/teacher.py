"""What a teacher in the loop adds to a run."""

from __future__ import annotations

from dataclasses import dataclass

from twofold.adapt.plan import Choices, plan_adaptation
from twofold.checkpoint.load import read_config
from twofold.checkpoint.resolve import Checkpoint
from twofold.models.counts import parameter_counts
from twofold.models.families import DONORS, donor_family
from twofold.models.flops import Row, decoder_only_flops, forward_flops


@dataclass(frozen=True)
class Teacher:
    """A model that is held whole by every device and runs forward on every row."""

    parameters: int
    flops_per_row: int
    vocab_size: int


def plan_teacher(checkpoint: Checkpoint, row: Row) -> Teacher:
    """The cost of a teacher, from its configuration.

    Args:
        checkpoint: a decoder-only model, which reads source and target as one text, or an encoder-decoder.
        row: of the student; counted as one example that fills it, the most it can cost.

    Raises:
        ValueError: a configuration that is not known.
    """
    source, target = row.source_positions, row.target_positions
    if checkpoint.config.get("model_type") not in DONORS:
        config = read_config(checkpoint)[0]
        flops = forward_flops(config, source, target)
        return Teacher(parameter_counts(config)["total"], flops, config.decoder.vocab_size)
    donor = donor_family(checkpoint.config).read_config(checkpoint.config)
    pair = plan_adaptation(donor, None, Choices(start="lossless")).config
    table = donor.stack.vocab_size * donor.stack.hidden_size
    parameters = parameter_counts(pair)["encoder"] + table * (1 if donor.tie_word_embeddings else 2)
    return Teacher(parameters, decoder_only_flops(donor.stack, source, target), donor.stack.vocab_size)
