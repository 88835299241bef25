"""Adapters in a model that trains: put in, switched off, written, merged. The layers are PEFT's.

An adapted layer keeps its own weight under `base_layer`, frozen, and has `lora_A`, `lora_B` and, for DoRA,
`lora_magnitude_vector` beside it. Checkpoints hold the trained tensors alone.

I, O: width of a linear layer's input and output. R: rank.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from twofold.checkpoint.card import stored_history, write_card
from twofold.checkpoint.load import load
from twofold.checkpoint.save import save
from twofold.checkpoint.writer import new_folder
from twofold.config.adapter import TARGETS, AdapterConfig
from twofold.models import EncoderDecoder, EncoderModel
from twofold.train.parallel import whole
from twofold.train.world import World

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"
"""PEFT's name of an adapter that has none."""

_PREFIX = "base_model.model."
"""Of tensor names in PEFT's files."""


def peft(module: str = "peft") -> Any:
    """The library, or a module of it.

    Raises:
        ImportError: it is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            'adapters need PEFT, which is not installed; pip install "twofold[peft]"'
        ) from error


def has_adapter(model: nn.Module) -> bool:
    """Whether PEFT's layers are in a model."""
    return bool(getattr(model, "peft_config", None))


def add_adapter(model: EncoderModel, config: AdapterConfig, *, seed: int, base: str | None = None) -> None:
    """Put an adapter into a model, in place, and freeze all else; what the model computes stays the same.

    Args:
        model: may be on the meta device.
        seed: of A; B is 0.
        base: where the model comes from, for PEFT's file.

    Raises:
        ImportError: PEFT is missing.
        ValueError: the model has an adapter already, or a target that is not there or takes none.
    """
    if has_adapter(model):
        raise ValueError(
            "the model has an adapter already; merge it first, or leave `adapter` out of the settings to train it on"
        )
    lora = peft().LoraConfig(
        task_type="SEQ_2_SEQ_LM" if isinstance(model, EncoderDecoder) else None,
        base_model_name_or_path=base,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_dora=config.kind == "dora",
        target_modules=find_targets(model, config),
        modules_to_save=_trained_whole(model, config) or None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft().inject_adapter_in_model(lora, model, adapter_name=_NAME)


def find_targets(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Which of the targets a model has.

    Raises:
        ValueError: one of a list is no linear layer of it, or is the head.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]

    def matched(target: str) -> list[str]:
        return [name for name in names if name == target or name.endswith(f".{target}")]

    wanted = TARGETS[config.targets] if isinstance(config.targets, str) else config.targets
    if not isinstance(config.targets, str):
        heads = [target for target in wanted if any("head" in name for name in matched(target))]
        if heads:
            raise ValueError(
                f"adapter.targets {', '.join(heads)}: a head takes no low-rank adapter, because its logits are "
                "computed in chunks from its weight; train it whole with adapter.lm_head=true"
            )
        if missing := [target for target in wanted if not matched(target)]:
            known = sorted({name.rpartition(".")[2] for name in names if "head" not in name})
            raise ValueError(
                f"adapter.targets {', '.join(missing)}: no linear layer of this model has such a name; it has "
                f"{', '.join(known)}"
            )
    return [target for target in wanted if matched(target)]


def _trained_whole(model: EncoderModel, config: AdapterConfig) -> list[str]:
    """Modules of which a trained copy is kept beside the frozen one."""
    found = list(model.new_modules)
    if config.lm_head:
        tied = model.config.tie_word_embeddings
        if not isinstance(model, EncoderDecoder) or tied != "none":
            raise ValueError(
                "adapter.lm_head trains the head whole, but this model's is "
                f"{f'tied to its embeddings ({tied!r})' if isinstance(model, EncoderDecoder) else 'trained anyway'}; "
                "set it to false"
            )
        found.append("lm_head")
    return found


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the one from before its adapter, in eval mode."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "enable_adapters")]
    is_trained = [(p, p.requires_grad) for p in model.parameters()]
    was_training = model.training
    model.eval()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in is_trained:
            parameter.requires_grad_(flag)
        model.train(was_training)


@dataclass(frozen=True, slots=True)
class PlainParameter:
    """A parameter that the model would have without an adapter, the adapter added to it."""

    parameter: nn.Parameter
    layer: Any = None
    """The adapted layer whose weight it is."""

    @torch.no_grad()
    def tensor(self) -> Tensor:
        """Gathered from the ranks, all of which must ask."""
        own = whole(self.parameter.detach())
        return own if self.layer is None else merged_weight(self.layer, own)


def plain_parameters(model: nn.Module) -> dict[str, PlainParameter]:
    """Every parameter by the name it has in a model without adapter; shared ones once."""
    found: dict[str, PlainParameter] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".original_module." in name:
            continue
        plain = name.replace(f".modules_to_save.{_NAME}", "").replace(".base_layer", "")
        is_adapted = name.endswith(".base_layer.weight")
        layer = model.get_submodule(name.removesuffix(".base_layer.weight")) if is_adapted else None
        found[plain] = PlainParameter(parameter, layer)
    return found


def merged_weight(layer: Any, own_OI: Tensor) -> Tensor:
    """The weight of a linear layer that computes what the adapted one does, in the dtype of its own.

    LoRA: W + s B A. DoRA (arXiv 2402.09353, equation 5): the same with every row brought to its trained length.

    Args:
        layer: PEFT's.
        own_OI: its weight W, gathered.
    """
    a_RI, b_OR = whole(layer.lora_A[_NAME].weight.detach()), whole(layer.lora_B[_NAME].weight.detach())
    merged_OI = own_OI.float() + layer.scaling[_NAME] * (b_OR.float() @ a_RI.float())
    if layer.use_dora[_NAME]:
        length_O = whole(layer.lora_magnitude_vector[_NAME].weight.detach()).float()
        merged_OI *= (length_O / torch.linalg.vector_norm(merged_OI, dim=1))[:, None]
    in_dtype: Tensor = merged_OI.to(own_OI.dtype)
    return in_dtype


def save_adapter(model: EncoderModel, path: Path, world: World) -> None:
    """The adapter in PEFT's files, as for `twofold.hf.TwofoldForConditionalGeneration`; what is at `path` is replaced.

    All ranks call it, rank 0 writes.
    """
    trained = {name: whole(p.detach()) for name, p in model.named_parameters() if _is_trained(name)}
    if not world.is_main:
        return
    state = peft().get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
    with new_folder(path, overwrite=True) as folder:
        tensors = {f"{_PREFIX}{name}": t.cpu().contiguous() for name, t in state.items()}
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        configs: Any = model.peft_config
        config = configs[_NAME]
        config.inference_mode = True
        config.save_pretrained(folder)
        config.inference_mode = False
        if model.history is not None:
            write_card(
                folder, model.history, model.config, architecture=type(model).__name__, format="adapter"
            )


def _is_trained(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def merge_adapter(base: str | Path, adapter: str | Path, out: str | Path, *, overwrite: bool = False) -> None:
    """Write a model with an adapter added to its weights; by PEFT, so for every kind of adapter that PEFT merges.

    Args:
        base: the encoder-decoder the adapter was trained on.
        adapter: folder of adapter_config.json and adapter_model.safetensors.

    Raises:
        ImportError: PEFT is missing.
        FileNotFoundError: no base, or no adapter.
        FileExistsError: `out` exists and `overwrite` is off.
        ValueError: the adapter is of another model; nothing is written.
    """
    library, folder = peft(), Path(adapter)
    missing = [name for name in (CONFIG, TENSORS) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(missing)}; give the folder of an adapter in PEFT's format"
        )
    if Path(out).exists() and not overwrite:
        raise FileExistsError(
            f"{out} exists; choose another folder, or replace it with overwrite (--overwrite)"
        )
    from twofold.hf import TwofoldForConditionalGeneration

    model = load(base)
    config = library.PeftConfig.from_pretrained(str(folder))
    try:
        wrapped = library.get_peft_model(TwofoldForConditionalGeneration.of(model), config)
        result = library.set_peft_model_state_dict(wrapped, load_file(folder / TENSORS))
    except (RuntimeError, ValueError) as error:  # shapes, or targets, of another model
        raise ValueError(f"the adapter {folder} does not fit {base}: {error}") from error
    # Tied stacks: the file has a shared tensor under its first name alone.
    wanted = {name for name, _ in wrapped.named_parameters() if _is_trained(name)}
    left_over = [*result.unexpected_keys, *sorted(wanted.intersection(result.missing_keys))]
    if left_over:
        raise ValueError(
            f"the adapter {folder} does not fit {base}: {len(left_over)} tensors are on one side only, the first is "
            f"{left_over[0]}; give the model it was trained on"
        )
    plain = wrapped.merge_and_unload()
    model.model, model.lm_head = plain.model, plain.lm_head
    model.history = stored_history(folder) or model.history
    save(model.requires_grad_(True), out, overwrite=overwrite)
