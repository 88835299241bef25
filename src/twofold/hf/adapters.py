"""What PEFT adapts in a pair unless told otherwise."""

from importlib.util import find_spec

from twofold.config.adapter import ATTENTION_TARGETS
from twofold.hf.configuration import TwofoldConfig


def register_lora_targets() -> None:
    """Tell PEFT, where it is installed: `LoraConfig` then needs no `target_modules`."""
    if find_spec("peft") is not None:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as targets

        targets.setdefault(TwofoldConfig.model_type, list(ATTENTION_TARGETS))
