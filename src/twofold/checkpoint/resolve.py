"""From what a user names (folder, GGUF file, hub name) to a checkpoint: config, tensors, tokenizer."""

import json
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from twofold.checkpoint.gguf import GGUFSource, gguf_config, gguf_tokenizer, has_tokenizer
from twofold.checkpoint.gguf_header import read_gguf_header
from twofold.checkpoint.shards import PATTERN, ShardsSource
from twofold.checkpoint.tensors import SafetensorsSource, TensorSource, read_json

CONFIG_FILE = "config.json"
HISTORY_FILE = "history.json"
"""What was done to a model, see `twofold.config.history`."""

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder with one of these has a tokenizer."""

TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# "model*": not the second copies some repositories carry, such as consolidated.safetensors.
_HUB_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    *TOKENIZER_FILES,
    HISTORY_FILE,
    "README.md",  # its licence
)
_GEMMA_TYPES = ("gemma", "t5gemma")
"""Beginnings of model types whose terms cover everything that is derived from them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A model on this machine, not yet read."""

    folder: Path
    """The model folder; for a GGUF file the folder it lies in."""

    gguf_file: Path | None
    """The weights where they are a GGUF file. None: safetensors in `folder`."""

    config: dict[str, Any]
    """`config.json`, or what a GGUF file says in its place."""

    name: str
    """For messages: folder name, GGUF file name without suffix, or hub name."""

    def tensors(self) -> TensorSource:
        """The weights, one tensor at a time. Raises as `SafetensorsSource`, `ShardsSource` and `GGUFSource`."""
        if self.gguf_file is None and any(self.folder.glob(PATTERN)):
            return ShardsSource(self.folder)
        return SafetensorsSource(self.folder) if self.gguf_file is None else GGUFSource(self.gguf_file)

    @property
    def has_tokenizer(self) -> bool:
        """Whether it can take text."""
        if self.gguf_file is not None:
            return has_tokenizer(self.gguf_file)
        return any((self.folder / name).is_file() for name in VOCABULARY_FILES)

    @property
    def license(self) -> str | None:
        """As the hub names it: of the model card in the folder, or of a GGUF file; None where they do not say."""
        if self.gguf_file is not None:
            stated = read_gguf_header(self.gguf_file).metadata.get("general.license")
        else:
            stated = _card_license(self.folder / "README.md")
        if stated is None and str(self.config.get("model_type", "")).startswith(_GEMMA_TYPES):
            return "gemma"
        return stated

    def tokenizer(self) -> Any:
        """The `transformers` tokenizer, or None, with a warning, where the checkpoint has none."""
        if not self.has_tokenizer:
            warnings.warn(
                f"{self.name} has no tokenizer files ({', '.join(VOCABULARY_FILES)}): it takes token ids, "
                "not text",
                stacklevel=2,
            )
            return None
        return _load_tokenizer(self)


def resolve(path_or_name: str | Path) -> Checkpoint:
    """Finds a checkpoint; hub names are downloaded (safetensors, config and tokenizer files only).

    Args:
        path_or_name: a model folder with `config.json`; a `.gguf` file; a folder with exactly one `.gguf` and
            no `config.json`; or a hub name, `org/name`. What exists on disk comes before the hub.

    Raises:
        FileNotFoundError: nothing there, no model in the folder, or the hub does not give it (network,
            licence).
        ValueError: several GGUF files in a folder, another kind of file, a broken `config.json` or GGUF file.
    """
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        return _from_folder(path, name=path.resolve().name)
    name = str(path_or_name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name, flags=re.ASCII) or path.suffix == ".gguf":
        raise FileNotFoundError(
            f"no such file or folder: {name}; give a model folder, a .gguf file or a hub name like org/name"
        )
    return _from_folder(_download(name), name=name)


def copy_tokenizer(checkpoint: Checkpoint, out_folder: str | Path, loaded: Any = None) -> list[Path]:
    """Writes the checkpoint's tokenizer files into an existing folder, which must not have them yet.

    Files are copied as they are; the tokenizer of a GGUF file is converted.

    Args:
        loaded: the checkpoint's tokenizer where it is loaded already; converting one from GGUF takes seconds.

    Returns:
        The files written; none where the checkpoint has no tokenizer.

    Raises:
        FileExistsError: one of the files is already in `out_folder`.
    """
    out_folder = Path(out_folder)
    if there := [name for name in TOKENIZER_FILES if (out_folder / name).exists()]:
        raise FileExistsError(
            f"{out_folder} already has {', '.join(there)}; give a folder without tokenizer files"
        )
    if not checkpoint.has_tokenizer:
        return []
    if checkpoint.gguf_file is not None:
        (loaded or _load_tokenizer(checkpoint)).save_pretrained(str(out_folder))
        return [out_folder / name for name in TOKENIZER_FILES if (out_folder / name).is_file()]
    return [
        Path(shutil.copyfile(checkpoint.folder / name, out_folder / name))
        for name in TOKENIZER_FILES
        if (checkpoint.folder / name).is_file()
    ]


def same_tokenizer(a: Checkpoint, b: Checkpoint) -> str | None:
    """Whether two checkpoints split text into the same ids: vocabularies and, where both have them, merges.

    Where neither has tokenizer files only `vocab_size` is compared, with a warning.

    Returns:
        None if they share a tokenizer, otherwise the reason why not, in words.
    """
    if (a.folder, a.gguf_file) == (b.folder, b.gguf_file):
        return None
    has_a, has_b = a.has_tokenizer, b.has_tokenizer
    if not has_a and not has_b:
        warnings.warn(
            f"neither {a.name} nor {b.name} has tokenizer files: only their vocab_size is compared",
            stacklevel=2,
        )
        size_a, size_b = a.config.get("vocab_size"), b.config.get("vocab_size")
        return None if size_a == size_b else f"vocab_size is {size_a} in {a.name}, {size_b} in {b.name}"
    if has_a != has_b:
        with_files, without = (a, b) if has_a else (b, a)
        return (
            f"{without.name} has no tokenizer files to compare with those of {with_files.name}; if it is "
            "the same tokenizer, copy the files there"
        )
    return tokenizer_difference(a.name, _load_tokenizer(a), b.name, _load_tokenizer(b))


def tokenizer_difference(name_a: str, tokenizer_a: Any, name_b: str, tokenizer_b: Any) -> str | None:
    """`same_tokenizer` for tokenizers that are loaded; the names are for the reason."""
    return _vocabulary_difference(name_a, tokenizer_a.get_vocab(), name_b, tokenizer_b.get_vocab()) or (
        _merges_difference(name_a, _merges(tokenizer_a), name_b, _merges(tokenizer_b))
    )


def _from_file(path: Path) -> Checkpoint:
    if path.suffix != ".gguf":
        raise ValueError(f"{path} is a file but not a .gguf file; give a model folder or a .gguf file")
    return Checkpoint(folder=path.parent, gguf_file=path, config=gguf_config(path), name=path.stem)


def _from_folder(folder: Path, *, name: str) -> Checkpoint:
    if (folder / CONFIG_FILE).is_file():
        return Checkpoint(folder=folder, gguf_file=None, config=read_json(folder / CONFIG_FILE), name=name)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} is an adapter, not a model; add it to the model it was trained on first: twofold merge BASE "
            f"{folder} -o OUT"
        )
    gguf_files = sorted(folder.glob("*.gguf"))
    if len(gguf_files) > 1:
        raise ValueError(
            f"{folder} has {len(gguf_files)} GGUF files and no {CONFIG_FILE}; give the path of one of them: "
            f"{', '.join(file.name for file in gguf_files)}"
        )
    if not gguf_files:
        raise FileNotFoundError(
            f"{folder} has neither {CONFIG_FILE} nor a .gguf file; give a folder with {CONFIG_FILE} and "
            "model.safetensors, or the path of one .gguf file"
        )
    return _from_file(gguf_files[0])


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (HFValidationError, OSError) as error:  # the hub's HTTP errors are OSErrors
        raise FileNotFoundError(
            f"{name} is no local folder and the hub does not give it ({type(error).__name__}: {error}). "
            "Download it by hand and give the local path; where the model has a licence, accept it on "
            f"https://huggingface.co/{name} and log in with `hf auth login`; offline, only what was "
            "downloaded before is found"
        ) from error


def _card_license(card: Path) -> str | None:
    """From the front matter of a model card; what is no YAML says nothing."""
    if not card.is_file():
        return None
    parts = re.split(r"^---\s*$", card.read_text(encoding="utf-8", errors="replace"), maxsplit=2, flags=re.M)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        content = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    stated = content.get("license") if isinstance(content, dict) else None
    return stated if isinstance(stated, str) else None


def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    if checkpoint.gguf_file is not None:
        return gguf_tokenizer(checkpoint.gguf_file)
    from transformers import AutoTokenizer, PreTrainedConfig

    # transformers looks into config.json for the tokenizer's class; ours would only make it warn.
    options = {"config": PreTrainedConfig()} if checkpoint.config.get("model_type") == "twofold" else {}
    # trust_remote_code=False: left out, transformers would ask on the terminal.
    return AutoTokenizer.from_pretrained(
        str(checkpoint.folder), local_files_only=True, trust_remote_code=False, **options
    )


def _vocabulary_difference(
    name_a: str, vocab_a: dict[str, int], name_b: str, vocab_b: dict[str, int]
) -> str | None:
    if vocab_a == vocab_b:
        return None
    by_id_a = {number: token for token, number in vocab_a.items()}
    by_id_b = {number: token for token, number in vocab_b.items()}
    differing = sorted(n for n in by_id_a.keys() | by_id_b.keys() if by_id_a.get(n) != by_id_b.get(n))
    first = differing[0]
    return (
        f"the vocabularies differ in {len(differing)} ids ({name_a} has {len(vocab_a)} tokens, {name_b} "
        f"{len(vocab_b)}); the first is id {first}: {by_id_a.get(first)!r} in {name_a}, "
        f"{by_id_b.get(first)!r} in {name_b}"
    )


def _merges(tokenizer: Any) -> list[str] | None:
    """BPE merges in their order, None where the tokenizer has none or does not show them."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges")
    return None if merges is None else [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]


def _merges_difference(
    name_a: str, merges_a: list[str] | None, name_b: str, merges_b: list[str] | None
) -> str | None:
    if merges_a is None or merges_b is None or merges_a == merges_b:
        return None
    shared = zip(merges_a, merges_b, strict=False)
    first = next((rank for rank, (x, y) in enumerate(shared) if x != y), min(len(merges_a), len(merges_b)))
    at_first = [repr(merges[first]) if first < len(merges) else "nothing" for merges in (merges_a, merges_b)]
    return (
        f"the vocabularies are equal, the merges are not ({name_a} has {len(merges_a)}, {name_b} "
        f"{len(merges_b)}); the first difference is merge {first}: {at_first[0]} in {name_a}, {at_first[1]} "
        f"in {name_b}"
    )
