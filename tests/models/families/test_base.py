import pytest

from twofold.config import RopeConfig
from twofold.models.families import DONORS, PAIRS, TensorMap, donor_family
from twofold.models.families.base import ConfigReader, read_rope, write_rope


def test_reader_lists_what_nobody_read() -> None:
    reader = ConfigReader({"a": 1, "c": 3, "b": 2, "torch_dtype": "bfloat16"}, "some config")
    assert reader.take("a") == 1
    with pytest.raises(ValueError, match=r"some config has keys that twofold does not know: b=2, c=3\. "):
        reader.finish()
    assert (reader.take("b"), reader.take("c")) == (2, 3)
    reader.finish()


def test_reader_and_null() -> None:
    block = {"a": None, "b": None, "c": None, "d": 0}
    reader = ConfigReader(block, "some config")
    assert reader.take("a", 5) == 5
    assert reader.take_nullable("b", 5) is None
    assert reader.take_nullable("absent", 5) == 5
    with pytest.raises(ValueError, match="some config has no 'c', which is required"):
        reader.take("c")
    assert reader.take("d", 5) == 0
    assert block == {"a": None, "b": None, "c": None, "d": 0}


def test_reader_expects() -> None:
    reader = ConfigReader({"a": None, "b": 2, "c": 3}, "some config")
    reader.expect("a", 1)
    reader.expect("absent", 1)
    reader.expect("b", 1, 2)
    with pytest.raises(ValueError, match="some config: c=3 is not supported; only 1 or 2 is"):
        reader.expect("c", 1, 2)


@pytest.mark.parametrize(
    ("value", "ids"), [(7, (7,)), ([7, 8], (7, 8)), ((7, 8), (7, 8)), (None, ()), (0, (0,))]
)
def test_reader_tokens(value: object, ids: tuple[int, ...]) -> None:
    assert ConfigReader({"eos_token_id": value}, "some config").take_tokens("eos_token_id") == ids


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(theta=5.0),
        RopeConfig(theta=5.0, scaling="linear", factor=8.0),
        RopeConfig(
            theta=5.0,
            scaling="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ],
)
def test_rope_is_written_as_it_is_read(rope: RopeConfig) -> None:
    assert read_rope(write_rope(rope), "here") == rope


def test_unknown_rope_type() -> None:
    with pytest.raises(
        ValueError, match="here: rope type 'longrope' is not supported; use default, linear or llama3"
    ):
        read_rope({"rope_type": "longrope", "rope_theta": 1.0}, "here")


def test_tensor_map_moves_the_layer_index() -> None:
    tensor_map = TensorMap({"a.layers.{i}.x": "b.layers.{i}.y", "head": "top", "a.layers.{i}.old": None})
    assert tensor_map.to_own("a.layers.12.x") == "b.layers.12.y"
    assert tensor_map.from_own("b.layers.12.y") == "a.layers.12.x"
    assert tensor_map.to_own("head") == "top"
    assert tensor_map.from_own("top") == "head"
    assert tensor_map.to_own("a.layers.3.old") is None
    for name in ("a.layers.x", "a.layers.1.z", "b.layers.1.y"):
        with pytest.raises(KeyError):
            tensor_map.to_own(name)
    with pytest.raises(KeyError, match=r"a\.layers\.1\.x"):
        tensor_map.from_own("a.layers.1.x")


@pytest.mark.parametrize("family", [*DONORS.values(), *PAIRS.values()], ids=[*DONORS, *PAIRS])
def test_names_of_ours_come_back(family: object) -> None:
    tensor_map: TensorMap = family.tensor_map  # type: ignore[attr-defined]
    for own in tensor_map.names.values():
        if own is not None:
            name = own.replace("{i}", "7")
            assert tensor_map.to_own(tensor_map.from_own(name)) == name


def test_rotary_buffers_of_old_files_are_dropped() -> None:
    for family in DONORS.values():
        assert family.tensor_map.to_own("model.layers.3.self_attn.rotary_emb.inv_freq") is None


def test_family_is_found_or_the_reason_said() -> None:
    assert donor_family({"model_type": "mistral"}) is DONORS["llama"]
    assert sorted(DONORS) == ["gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"]
    with pytest.raises(
        ValueError, match="model_type 'bert' cannot be adapted; supported donors are gemma2, gemma3_text"
    ):
        donor_family({"model_type": "bert"})
    with pytest.raises(ValueError, match="None cannot be adapted"):
        donor_family({})
    for model_type in ("t5gemma", "t5gemma2", "twofold"):
        with pytest.raises(ValueError, match=r"it is an encoder-decoder already, load it with twofold\.load"):
            donor_family({"model_type": model_type})
