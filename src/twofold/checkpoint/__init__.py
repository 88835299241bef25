"""Model folders in and out: safetensors, GGUF donors, hub and local resolution."""

from twofold.checkpoint.gguf import GGUFSource, gguf_config, gguf_tokenizer
from twofold.checkpoint.resolve import Checkpoint, copy_tokenizer, resolve, same_tokenizer
from twofold.checkpoint.tensors import DictSource, SafetensorsSource, TensorSource
from twofold.checkpoint.writer import SafetensorsWriter, new_folder

__all__ = [
    "Checkpoint",
    "DictSource",
    "GGUFSource",
    "SafetensorsSource",
    "SafetensorsWriter",
    "TensorSource",
    "copy_tokenizer",
    "gguf_config",
    "gguf_tokenizer",
    "new_folder",
    "resolve",
    "same_tokenizer",
]
