"""Counts of the released models from their published dimensions, on the meta device: no weights needed."""

from typing import Any

import pytest
import torch
from torch import nn

from twofold.models import EncoderDecoder
from twofold.models.families import PAIRS

# hidden_size, intermediate_size, layers, heads, key-value heads, head_dim
T5GEMMA_SIDES = {
    "S": (512, 1024, 8, 8, 8, 64),
    "B": (768, 2048, 12, 12, 12, 64),
    "L": (1024, 2816, 24, 16, 16, 64),
    "ML": (1152, 6912, 26, 4, 4, 256),
    "XL": (2048, 5120, 24, 32, 32, 64),
    "2B": (2304, 9216, 26, 8, 4, 256),
    "9B": (3584, 14336, 42, 16, 8, 256),
}
T5GEMMA2_SIDES = {
    "270M": (640, 2048, 18, 4, 1, 256),
    "1B": (1152, 6912, 26, 4, 1, 256),
    "4B": (2560, 10240, 34, 8, 4, 256),
}
KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def count(modules: list[nn.Module]) -> int:
    """Parameters, each counted once however often it is shared."""
    return sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())


def on_meta(family: str, config: dict[str, Any]) -> EncoderDecoder:
    with torch.device("meta"):
        return EncoderDecoder(PAIRS[family].read_config(config))


@pytest.mark.parametrize(
    ("encoder", "decoder", "embeddings", "encoder_stack", "decoder_stack", "cross", "non_embedding", "total"),
    [
        ("S", "S", 262_144_000, 20_988_416, 20_996_608, 8_388_608, 50_373_632, 312_517_632),
        ("B", "B", 393_216_000, 84_972_288, 84_990_720, 28_311_552, 198_274_560, 591_490_560),
        ("L", "L", 524_288_000, 308_380_672, 308_429_824, 100_663_296, 717_473_792, 1_241_761_792),
        ("ML", "ML", 589_824_000, 743_889_024, 743_948_928, 122_683_392, 1_610_521_344, 2_200_345_344),
        ("XL", "XL", 1_048_576_000, 1_157_826_560, 1_157_924_864, 402_653_184, 2_718_404_608, 3_766_980_608),
        ("2B", "2B", 1_179_648_000, 2_024_517_888, 2_024_637_696, 368_050_176, 4_417_205_760, 5_596_853_760),
        (
            "9B",
            "2B",
            1_507_328_000,
            8_324_201_984,
            2_024_637_696,
            436_207_616,
            10_785_047_296,
            12_292_375_296,
        ),
        (
            "9B",
            "9B",
            1_835_008_000,
            8_324_201_984,
            8_324_503_040,
            1_849_688_064,
            18_498_393_088,
            20_333_401_088,
        ),
    ],
)
def test_t5gemma(
    encoder: str,
    decoder: str,
    embeddings: int,
    encoder_stack: int,
    decoder_stack: int,
    cross: int,
    non_embedding: int,
    total: int,
) -> None:
    """The totals are those of the files; cross-attention norms belong to the decoder's column."""
    sides = {
        side: dict(zip(KEYS, T5GEMMA_SIDES[name], strict=True)) | {"vocab_size": 256_000}
        for side, name in (("encoder", encoder), ("decoder", decoder))
    }
    model = on_meta("t5gemma", {"model_type": "t5gemma", **sides})
    tables = [model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head]
    cross_attention: list[nn.Module] = [layer.cross_attn for layer in model.decoder.layers]  # type: ignore[misc]
    assert count([model]) == total
    assert count(tables) == embeddings
    assert count(cross_attention) == cross
    assert count([model.encoder]) - count(tables[:1]) == encoder_stack
    assert count([model.decoder]) - count(tables[1:2]) - cross == decoder_stack
    assert encoder_stack + decoder_stack + cross == non_embedding == total - embeddings


@pytest.mark.parametrize(
    ("size", "stack", "embedding", "text_total"),
    [
        ("270M", 100_326_016, 167_772_160, 368_424_192),
        ("1B", 697_896_064, 301_989_888, 1_697_782_016),
        ("4B", 3_209_010_688, 671_088_640, 7_089_110_016),
    ],
)
def test_t5gemma2(size: str, stack: int, embedding: int, text_total: int) -> None:
    """The published text totals leave out the one `eoi_embedding` vector, which the model has."""
    side = dict(zip(KEYS, T5GEMMA2_SIDES[size], strict=True)) | {"vocab_size": 262_144}
    config = {"model_type": "t5gemma2", "encoder": {"text_config": side}, "decoder": side}
    model = on_meta("t5gemma2", config)
    width = T5GEMMA2_SIDES[size][0]
    assert count([model]) == text_total + width
    assert count([model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head]) == embedding + width
    for one in (model.encoder, model.decoder):
        assert count([one]) == stack + embedding + width
