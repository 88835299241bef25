"""Sources of tensors: equality with safetensors' own reader, errors, memory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from twofold.checkpoint import DictSource, SafetensorsSource, SafetensorsWriter, TensorSource


def assert_source_equals(source: TensorSource, expected: dict[str, torch.Tensor]) -> None:
    assert sorted(source.names()) == sorted(expected)
    for name, tensor in expected.items():
        got = source.get(name)
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == got.dtype == tensor.dtype
        assert torch.equal(got, tensor)
        assert got.device.type == "cpu"


def save_shards(folder: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": torch.full((4,), 7.0)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00001-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }
    save_index(folder, weight_map)


def save_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_dict_source_gives_what_it_was_given(mixed_tensors):
    with DictSource(mixed_tensors, "a model") as source:
        assert source.description == "a model"
        assert_source_equals(source, mixed_tensors)
    assert source.names() == list(mixed_tensors)


def test_dict_source_gives_no_gradients():
    source = DictSource({"w": torch.nn.Parameter(torch.ones(2))})
    assert not source.get("w").requires_grad


@pytest.mark.parametrize("give_folder", [True, False])
def test_single_file(tmp_path, mixed_tensors, give_folder):
    save_file(mixed_tensors, tmp_path / "model.safetensors")
    path = tmp_path if give_folder else tmp_path / "model.safetensors"
    with SafetensorsSource(path) as source:
        assert source.description == str(path)
        assert_source_equals(source, mixed_tensors)


def test_shards(tmp_path):
    save_shards(tmp_path)
    expected = {"a": torch.ones(2), "b": torch.zeros(3), "c": torch.full((4,), 7.0)}
    assert_source_equals(SafetensorsSource(tmp_path), expected)


def test_tensors_a_shard_has_beyond_the_index_are_named_too(tmp_path):
    save_shards(tmp_path)
    save_index(tmp_path, {"a": "model-00001-of-00002.safetensors"})
    assert SafetensorsSource(tmp_path).names() == ["a", "b"]


def test_names_come_in_the_order_of_the_data(tmp_path):
    plan = [(name, (2,), torch.float32) for name in ("z", "a", "m")]
    with SafetensorsWriter(tmp_path, plan) as writer:
        for name, _, _ in plan:
            writer.write(name, torch.ones(2))
    assert SafetensorsSource(tmp_path).names() == ["z", "a", "m"]


def test_a_single_file_comes_before_an_index(tmp_path):
    save_shards(tmp_path)
    save_file({"only": torch.ones(1)}, tmp_path / "model.safetensors")
    assert SafetensorsSource(tmp_path).names() == ["only"]


def test_changing_a_tensor_leaves_the_file(tmp_path):
    save_file({"w": torch.ones(4)}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    source.get("w").fill_(5)
    assert source.get("w").tolist() == [1, 1, 1, 1]


def test_unknown_name_is_a_key_error(tmp_path):
    save_file({"w": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(KeyError, match="nothing"):
        SafetensorsSource(tmp_path).get("nothing")


def test_every_truncation_is_refused(tmp_path, mixed_tensors):
    path = tmp_path / "model.safetensors"
    save_file(mixed_tensors, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"truncated|incomplete"):
            SafetensorsSource(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=f"has {len(whole) + 1} bytes, its header says {len(whole)}"):
        SafetensorsSource(path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1, 2]",
        b'{"w": {"dtype": "F32"}}',
        b'{"w": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 0]}}',
    ],
)
def test_unreadable_header_is_refused(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"model\.safetensors has no readable safetensors header"):
        SafetensorsSource(path)


def test_git_lfs_pointer_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        SafetensorsSource(tmp_path)


def test_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        SafetensorsSource(tmp_path / "nothing")


def test_folder_without_weights_names_what_is_there(tmp_path):
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"there is other\.safetensors"):
        SafetensorsSource(tmp_path)


def test_index_naming_a_missing_shard(tmp_path):
    save_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        SafetensorsSource(tmp_path)


def test_index_naming_a_tensor_its_shard_lacks(tmp_path):
    save_shards(tmp_path)
    save_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "x": "model-00001-of-00002.safetensors"})
    with pytest.raises(ValueError, match="has 1 tensors it does not have, the first is 'x'"):
        SafetensorsSource(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    save_shards(tmp_path)
    save_file({"c": torch.ones(1), "a": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="'a' is in two shards"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/etc/passwd", ".."])
def test_index_may_not_lead_out_of_the_folder(tmp_path, shard):
    save_index(tmp_path, {"a": shard})
    with pytest.raises(ValueError, match="a file name in the same folder"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}', "{}"])
def test_broken_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_refused_unread(tmp_path, name):
    torch.save({"w": torch.ones(1)}, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=rf"pickle files only \({name}\).*safetensors"):
        SafetensorsSource(tmp_path)
    with pytest.raises(ValueError, match="convert them to safetensors"):
        SafetensorsSource(tmp_path / name)


def resident_mib() -> float:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_copying_a_model_stays_near_its_largest_tensor(tmp_path):
    # 16 tensors of 8 MiB. A handle kept open, or a writer that collects, would reach 128 MiB.
    tensors = {f"t{i}": torch.full((2**21,), float(i)) for i in range(16)}
    save_file(tensors, tmp_path / "model.safetensors")
    names = list(tensors)
    del tensors
    out = tmp_path / "out"
    out.mkdir()
    source = SafetensorsSource(tmp_path)
    plan = [(name, source.shape(name), source.dtype(name)) for name in source.names()]
    start, peak = resident_mib(), 0.0
    with SafetensorsWriter(out, plan) as writer:
        for name, _, _ in plan:
            tensor = source.get(name)
            writer.write(name, tensor)
            peak = max(peak, resident_mib() - start)
            del tensor
    assert peak < 32
    assert load_file(out / "model.safetensors")["t15"][0] == names.index("t15")
