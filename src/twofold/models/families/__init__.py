"""One file per family: reads its config.json, maps its tensor names, holds its oddities."""

from twofold.models.families.base import DonorConfig, DonorFamily, JsonDict, PairFamily, TensorMap
from twofold.models.families.gemma import GEMMA2, GEMMA3
from twofold.models.families.llama import LLAMA
from twofold.models.families.qwen import QWEN2, QWEN3
from twofold.models.families.t5gemma import T5GEMMA
from twofold.models.families.t5gemma2 import T5GEMMA2

DONORS = {
    model_type: family
    for family in (GEMMA2, GEMMA3, LLAMA, QWEN2, QWEN3)
    for model_type in family.model_types
}
PAIRS = {family.model_type: family for family in (T5GEMMA, T5GEMMA2)}


def donor_family(config: JsonDict) -> DonorFamily:
    """The family of a decoder-only config.json.

    Raises:
        ValueError: `model_type` is missing or names no supported donor.
    """
    model_type = config.get("model_type")
    if model_type not in DONORS:
        hint = (
            "; it is an encoder-decoder already, load it with twofold.load"
            if model_type in (*PAIRS, "twofold")
            else ""
        )
        raise ValueError(
            f"model_type {model_type!r} cannot be adapted{hint}; supported donors are {', '.join(sorted(DONORS))}"
        )
    return DONORS[model_type]


__all__ = [
    "DONORS",
    "PAIRS",
    "DonorConfig",
    "DonorFamily",
    "JsonDict",
    "PairFamily",
    "TensorMap",
    "donor_family",
]
