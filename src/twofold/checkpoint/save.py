"""Write checkpoints: twofold's own folder, or a released family's files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor

from twofold.checkpoint.card import write_card
from twofold.checkpoint.writer import SafetensorsWriter, new_folder
from twofold.config import EncoderDecoderConfig
from twofold.config.history import History
from twofold.models import EncoderDecoder
from twofold.models.families import PAIRS

Format = Literal["twofold", "t5gemma", "t5gemma2"]


class CheckpointWriter:
    """A checkpoint folder that appears whole or not at all: everything is written beside it, then renamed.

    Args:
        path: must not exist, unless `overwrite`.
        format: whose config.json and tensor names.

    Raises:
        FileExistsError: on entering, if `path` exists and `overwrite` is off.
        ValueError: what would be overwritten is no checkpoint folder.
    """

    def __init__(self, path: str | Path, *, format: Format = "twofold", overwrite: bool = False) -> None:
        if format not in ("twofold", *PAIRS):
            raise ValueError(f"format must be one of twofold, {', '.join(PAIRS)}, got {format!r}")
        path = Path(path)
        is_checkpoint = (path / "config.json").is_file()
        if overwrite and path.exists() and not is_checkpoint and (path.is_file() or any(path.iterdir())):
            raise ValueError(
                f"{path} is not a checkpoint folder (it has no config.json), so it is not overwritten; "
                "choose another folder"
            )
        self._format = format
        self._stack = ExitStack()
        self._target = new_folder(path, overwrite=overwrite)
        self.folder = path
        """While open: the folder that is being filled."""

    def __enter__(self) -> Self:
        self.folder = self._stack.enter_context(self._target)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def write_config(self, config: EncoderDecoderConfig, architecture: str = "EncoderDecoder") -> None:
        """config.json, and generation_config.json where transformers reads it.

        Args:
            architecture: the class of the model, in twofold's own format.

        Raises:
            ValueError: the model is not one of the format's family; says why.
        """
        if self._format == "twofold":
            written = config.model_dump(mode="json")
            written["architectures"] = [architecture]
        else:
            written = PAIRS[self._format].write_config(config)
            tokens = {key: written[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            self._write_json("generation_config.json", {"use_cache": True, **tokens})
        self._write_json("config.json", written)

    def write_card(
        self, history: History | None, config: EncoderDecoderConfig, architecture: str = "EncoderDecoder"
    ) -> None:
        """README.md and history.json, see `twofold.checkpoint.card`; nothing for a model without a history."""
        if history is not None:
            write_card(self.folder, history, config, architecture=architecture, format=self._format)

    def write_tensors(
        self,
        planned: Sequence[tuple[str, tuple[int, ...], torch.dtype]],
        tensors: Iterable[tuple[str, Tensor]],
        max_shard_bytes: int = 5 * 10**9,
    ) -> None:
        """Tensors under our names, in the planned order, taken one by one."""
        if self._format == "twofold":
            theirs = {name: name for name, _, _ in planned}
        else:
            family = PAIRS[self._format]
            theirs = {name: family.tensor_map.from_own(name) for name, _, _ in planned}
        plan = [(theirs[name], shape, dtype) for name, shape, dtype in planned]
        with SafetensorsWriter(self.folder, plan, max_shard_bytes=max_shard_bytes) as writer:
            for name, tensor in tensors:
                writer.write(theirs[name], tensor)

    def _write_json(self, name: str, content: dict[str, object]) -> None:
        (self.folder / name).write_text(json.dumps(content, indent=2) + "\n")


def save(
    model: EncoderDecoder,
    path: str | Path,
    *,
    format: Format = "twofold",
    overwrite: bool = False,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a model and its tokenizer as a folder with config.json, model.safetensors (or shards) and tokenizer files.

    Shared parameters are stored once. A model with a history gets its card, README.md and history.json.

    Args:
        format: `twofold`; or `t5gemma`, `t5gemma2` for files that transformers loads, where the model is one of these.

    Raises:
        FileExistsError: `path` exists and `overwrite` is off.
        ValueError: the model cannot be written in this format; says why. Nothing is left behind.
    """
    with CheckpointWriter(path, format=format, overwrite=overwrite) as writer:
        writer.write_config(model.config)
        writer.write_card(model.history, model.config)
        parameters = list(model.named_parameters())
        planned = [(name, tuple(p.shape), p.dtype) for name, p in parameters]
        writer.write_tensors(planned, ((name, p.detach()) for name, p in parameters), max_shard_bytes)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(writer.folder)
