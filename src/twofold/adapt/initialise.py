"""Carry out a plan: one tensor at a time, from donor files into a model or into a new checkpoint."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from twofold.adapt.plan import Plan, PlannedTensor, Side
from twofold.checkpoint.tensors import TensorSource
from twofold.models.families import DonorConfig, DonorFamily


class Donor:
    """A donor's tensors under our names, every one of them accounted for.

    Args:
        source: the open checkpoint.
        family: maps its names.
        config: what its config.json says; shapes follow from it.

    Raises:
        ValueError: the file has tensors that the family's map does not know; lists them.
    """

    def __init__(self, source: TensorSource, family: DonorFamily, config: DonorConfig) -> None:
        self.source = source
        self.config = config
        self.their_names: dict[str, str] = {}
        unknown = []
        for name in source.names():
            try:
                own = family.tensor_map.to_own(name)
            except KeyError:
                unknown.append(name)
                continue
            if own == "lm_head.out_proj.weight" and config.tie_word_embeddings:
                continue  # some files repeat the tied table
            if own is not None:
                self.their_names[own] = name
        if unknown:
            raise ValueError(
                f"{source.description} has tensors that the {family.model_types[0]} family does not know: "
                f"{', '.join(unknown[:20])}{' ...' if len(unknown) > 20 else ''} ({len(unknown)} in all)"
            )

    def get(self, own_name: str) -> Tensor:
        """Raises:
        ValueError: the file lacks the tensor.
        """
        if own_name not in self.their_names:
            raise ValueError(
                f"{self.source.description} has no tensor for {own_name!r}, which its config asks for"
            )
        return self.source.get(self.their_names[own_name])

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding table; a pair is stored in one dtype."""
        return self.source.dtype(self.their_names["embed_tokens.weight"])


def initialise(
    plan: Plan,
    donors: Mapping[Side, Donor],
    *,
    dtype: torch.dtype,
    seed: int,
    fitted: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[PlannedTensor, Tensor]]:
    """Make the pair's parameters in the plan's order, each when it is asked for.

    Random ones depend on `seed` and their own name alone, so they are the same in any order.

    Args:
        fitted: tensors of the rule `fitted` by name. None: they have not been fitted yet, and are zero.

    Raises:
        ValueError: a donor tensor is missing or has a shape that the plan does not allow.
    """
    for planned in plan.tensors:
        if fitted is not None and planned.rule.kind == "fitted":
            tensor = fitted[planned.name]
        else:
            tensor = _make(planned, donors, seed)
        if tuple(tensor.shape) != planned.shape:
            raise ValueError(
                f"{planned.name}: donor tensor {planned.rule.donor_name} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(planned.shape)}"
            )
        yield planned, tensor.to(dtype)


def _make(planned: PlannedTensor, donors: Mapping[Side, Donor], seed: int) -> Tensor:
    rule = planned.rule
    if rule.kind in ("zeros", "fitted"):
        return torch.zeros(planned.shape)
    if rule.kind == "normal":
        # One number out of both: the CPU generator uses the low 32 bits of its seed only.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {planned.name}".encode()))
        return torch.randn(planned.shape, generator=generator) * rule.factor
    assert rule.side is not None
    assert rule.donor_name is not None
    tensor = donors[rule.side].get(rule.donor_name)
    if rule.kind == "scaled":
        return tensor.float() * rule.factor
    if rule.kind == "shifted_scale":
        return (1.0 + tensor.float()) * rule.factor - 1.0
    if rule.kind == "embedding_row":
        return tensor[rule.row].float() * rule.factor
    if rule.kind == "fit_rows":
        fitted = torch.zeros(planned.shape, dtype=tensor.dtype)
        n_rows = min(len(fitted), len(tensor))
        fitted[:n_rows] = tensor[:n_rows]
        return fitted
    return tensor


def unused_tensors(plan: Plan, donors: Mapping[Side, Donor]) -> dict[Side, list[str]]:
    """For each donor file, its tensors that no parameter of the pair comes from, in the file's naming.

    Cut layers, and what the other side provides (the encoder donor's head, a decoder table that both share).
    """
    used: dict[int, set[str]] = {id(donor.source): set() for donor in donors.values()}
    for planned in plan.tensors:
        rule = planned.rule
        if rule.side is not None and rule.donor_name is not None:
            donor = donors[rule.side]
            used[id(donor.source)].add(donor.their_names[rule.donor_name])
    return {
        side: [name for name in donor.their_names.values() if name not in used[id(donor.source)]]
        for side, donor in donors.items()
    }
