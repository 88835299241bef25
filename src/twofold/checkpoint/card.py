"""The card of a checkpoint: history.json, and README.md, which is made of it (`card_text`)."""

from __future__ import annotations

import json
import platform
import re
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import ValidationError

from twofold.checkpoint.card_text import render_card
from twofold.checkpoint.resolve import HISTORY_FILE, Checkpoint
from twofold.config import EncoderDecoderConfig
from twofold.config.history import Donor, History, Origin, is_hub_name, public_name

CARD_FILE = "README.md"


def versions() -> dict[str, str]:
    """Of what computes here, by package."""
    found = {"python": platform.python_version()}
    for name in ("twofold", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a source tree that is not installed
            continue
    return found


def donor_of(checkpoint: Checkpoint, role: str) -> Donor:
    """What a card says of a donor; `role` as in `Donor`."""
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", checkpoint.folder.as_posix())
    name = "/".join(cached.groups()) if cached else checkpoint.name
    is_on_hub = cached is not None or is_hub_name(name)
    return Donor(
        name=name if is_on_hub else public_name(name),
        role=role,  # type: ignore[arg-type]  # checked by pydantic
        license=checkpoint.license,
        is_on_hub=is_on_hub,
    )


def read_history(checkpoint: Checkpoint) -> History:
    """What was done to a checkpoint; where it does not say, the checkpoint itself is where it comes from."""
    stored = stored_history(checkpoint.folder) if checkpoint.gguf_file is None else None
    if stored is not None:
        return stored
    return History(origin=Origin(kind="checkpoint", donors=(donor_of(checkpoint, "both"),)))


def stored_history(folder: Path) -> History | None:
    """The history of a folder's model or adapter; None where there is none.

    A file that cannot be read is no reason not to load weights: it warns.
    """
    file = folder / HISTORY_FILE
    if not file.is_file():
        return None
    try:
        return History.model_validate_json(file.read_bytes())
    except ValidationError as error:
        warnings.warn(
            f"{file} is not a history that this twofold reads ({error.error_count()} problems, the first: "
            f"{error.errors()[0]['msg']}); the card of what is made of it begins anew",
            stacklevel=2,
        )
        return None


def write_card(
    folder: Path,
    history: History,
    config: EncoderDecoderConfig,
    *,
    architecture: str = "EncoderDecoder",
    format: str = "twofold",
) -> None:
    """history.json and README.md into the folder of a checkpoint that is being written.

    Args:
        config: of the pair; a reward model has only the encoder of it.
        architecture: class of the model.
        format: of its files; "adapter" for one in PEFT's.
    """
    content = json.dumps(history.model_dump(mode="json"), indent=1, ensure_ascii=False)
    (folder / HISTORY_FILE).write_text(content + "\n", encoding="utf-8")
    text = render_card(history, config, architecture=architecture, format=format)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")
