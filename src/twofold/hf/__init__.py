"""A pair as a model of transformers: `AutoModelForSeq2SeqLM` loads it, `generate` and PEFT work on it.

`import twofold` registers it by way of this package, at no cost: the configuration's module is imported with
transformers' own Auto classes, the model's when the first configuration is made.
"""

import importlib
from typing import TYPE_CHECKING, Any

from twofold.hf.registration import register_when_imported

if TYPE_CHECKING:
    from twofold.hf.configuration import TwofoldConfig
    from twofold.hf.modeling import TwofoldForConditionalGeneration

__all__ = ["TwofoldConfig", "TwofoldForConditionalGeneration"]

_MODULES = {"TwofoldConfig": "configuration", "TwofoldForConditionalGeneration": "modeling"}

register_when_imported()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
