"""Read checkpoints of encoder-decoders: twofold's own, T5Gemma, T5Gemma 2."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch

from twofold.checkpoint.card import read_history
from twofold.checkpoint.resolve import Checkpoint, resolve
from twofold.checkpoint.tensors import TensorSource
from twofold.config import EncoderDecoderConfig
from twofold.models import EncoderDecoder, EncoderModel
from twofold.models.families import DONORS, PAIRS, PairFamily

Kind = TypeVar("Kind", bound=EncoderModel)


def load(
    path_or_name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    skip_vision: bool = False,
) -> EncoderDecoder:
    """Read an encoder-decoder, with its tokenizer where the folder has one (a warning where not).

    Args:
        path_or_name: a folder, or a hub name.
        dtype: of all parameters; default: as stored.
        skip_vision: T5Gemma 2: leave the vision tower and projector out. Without it, a file that has them is refused.

    Returns:
        The model in eval mode.

    Raises:
        ValueError: not an encoder-decoder that twofold knows, unknown config keys, or tensors that do not fit: unknown
            ones, missing ones and wrong shapes are listed.
        FileNotFoundError: nothing is there.
    """
    checkpoint = resolve(path_or_name)
    if checkpoint.config.get("architectures") == ["RewardModel"]:
        raise ValueError(
            f"{checkpoint.name} is a reward model, which writes nothing; load it with "
            "twofold.posttrain.reward.load_reward_model"
        )
    config, family = read_config(checkpoint)
    with torch.device("meta"):
        model = EncoderDecoder(config)
    return fill(model, checkpoint, family, dtype=dtype, device=device, skip_vision=skip_vision)


def fill(
    model: Kind,
    checkpoint: Checkpoint,
    family: PairFamily | None,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device,
    skip_vision: bool = False,
) -> Kind:
    """Give a model on the meta device the weights and the tokenizer of a checkpoint; in eval mode.

    Arguments and errors as for `load`; `family` as from `read_config`.
    """
    with checkpoint.tensors() as source:
        found = match_tensors(model, source, family, skip_vision=skip_vision)
        # Copied: a tensor that stays in the file's memory map keeps all of that map for itself.
        state = {
            own: source.get(theirs).to(torch.device(device), dtype, copy=True)
            for own, theirs in found.items()
        }
    model.load_state_dict(state, assign=True, strict=False)  # shared parameters come under one name
    model.tie_weights()
    model.tokenizer = checkpoint.tokenizer()
    model.history = read_history(checkpoint)
    return model.requires_grad_(True).eval()


def read_config(checkpoint: Checkpoint) -> tuple[EncoderDecoderConfig, PairFamily | None]:
    """The configuration of an encoder-decoder checkpoint, and its family; None for twofold's own format.

    Raises:
        ValueError: see `load`.
    """
    config = dict(checkpoint.config)
    model_type = config.get("model_type")
    if model_type == "twofold":
        config = dict(config.get("pair", config))  # as transformers writes it, or as we do
        config.pop("architectures", None)
        return EncoderDecoderConfig.model_validate(config), None
    if model_type in PAIRS:
        return PAIRS[model_type].read_config(config), PAIRS[model_type]
    if model_type in DONORS:
        raise ValueError(
            f"{checkpoint.name} is a decoder-only model ({model_type}); make an encoder-decoder of it first: "
            f"twofold adapt {checkpoint.name} -o OUT"
        )
    raise ValueError(
        f"{checkpoint.name} has model_type {model_type!r}; twofold loads twofold, {', '.join(PAIRS)}"
    )


def match_tensors(
    model: EncoderModel, source: TensorSource, family: PairFamily | None, *, skip_vision: bool
) -> dict[str, str]:
    """For every parameter its tensor, and for every tensor a parameter; reads names and shapes only.

    Returns:
        Our name to the file's, shared parameters once.

    Raises:
        ValueError: see `load`.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    problems: list[str] = []
    found: dict[str, str] = {}
    vision = []
    for name in source.names():
        if family is not None and family.is_skippable(name):
            vision.append(name)
            continue
        own = _own_name(name, family)
        if own not in shapes:
            problems.append(f"unknown tensor {name}")
        elif source.shape(name) != shapes[own]:
            problems.append(
                f"{name} has shape {list(source.shape(name))}, config.json asks for {list(shapes[own])}"
            )
        else:
            found[own] = name
    if vision and not skip_vision:
        raise ValueError(
            f"{source.description} has {len(vision)} vision tensors, which twofold does not run: "
            f"{', '.join(vision[:8])}{', ...' if len(vision) > 8 else ''}. Pass skip_vision=True (--skip-vision) to "
            "load the text model without them"
        )
    unique = [name for name, _ in model.named_parameters()]
    problems += [f"no tensor for {name}" for name in unique if name not in found]
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(
            f"{source.description} does not fit its config.json:\n  " + "\n  ".join(problems[:20]) + more
        )
    return {name: found[name] for name in unique}


def _own_name(name: str, family: PairFamily | None) -> str | None:
    if family is None:
        return name
    try:
        return family.tensor_map.to_own(name)
    except KeyError:
        return None
