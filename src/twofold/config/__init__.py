"""What a model, a pair and a run are: frozen, checked when they are made."""

from twofold.config.model import EncoderDecoderConfig, EncoderMask, LayerType, RopeConfig, StackConfig

__all__ = ["EncoderDecoderConfig", "EncoderMask", "LayerType", "RopeConfig", "StackConfig"]
