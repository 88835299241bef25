"""Plain, single-device PyTorch: masks, attention, stacks, the encoder-decoder, and its families."""

from twofold.models.cache import DecoderCache
from twofold.models.encoder_decoder import EncoderDecoder, EncoderDecoderOutput, EncoderModel
from twofold.models.heads import EncoderClassifier, embed
from twofold.models.stack import EncoderOutput

__all__ = [
    "DecoderCache",
    "EncoderClassifier",
    "EncoderDecoder",
    "EncoderDecoderOutput",
    "EncoderModel",
    "EncoderOutput",
    "embed",
]
