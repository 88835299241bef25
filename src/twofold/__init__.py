"""twofold: turn any pretrained decoder-only language model into an encoder-decoder, and use it."""

from twofold import hf
from twofold.adapt import adapt
from twofold.checkpoint.load import load
from twofold.checkpoint.save import save
from twofold.infer import Engine
from twofold.models import EncoderDecoder

__all__ = ["EncoderDecoder", "Engine", "adapt", "hf", "load", "save"]
