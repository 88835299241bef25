"""Writing model folders: files other readers load, and folders that are complete or absent."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from twofold.checkpoint import SafetensorsSource, SafetensorsWriter, new_folder


def plan_of(tensors):
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def write_all(folder, tensors, **options):
    with SafetensorsWriter(folder, plan_of(tensors), **options) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def test_safetensors_loads_every_dtype(tmp_path, mixed_tensors):
    write_all(tmp_path, mixed_tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert sorted(loaded) == sorted(mixed_tensors)
    for name, tensor in mixed_tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor)


def test_bytes_of_a_small_file(tmp_path):
    write_all(tmp_path, {"w": torch.tensor([1.0, 2.0])})
    header = b'{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    padded = header + b" " * (-len(header) % 8)
    expected = struct.pack("<Q", len(padded)) + padded + struct.pack("<2f", 1, 2)
    assert (tmp_path / "model.safetensors").read_bytes() == expected


def test_header_says_pt_and_is_padded(tmp_path, mixed_tensors):
    write_all(tmp_path, mixed_tensors)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") % 8 == 0


def test_shards_and_index(tmp_path):
    tensors = {"a": torch.ones(4), "b": torch.ones(4) * 2, "big": torch.arange(20.0), "c": torch.ones(1)}
    write_all(tmp_path, tensors, max_shard_bytes=32)
    first, second, third = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        first,
        second,
        third,
        "model.safetensors.index.json",
    ]
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 4 * (4 + 4 + 20 + 1)},
        "weight_map": {"a": first, "b": first, "big": second, "c": third},
    }
    assert load_file(tmp_path / second)["big"].tolist() == list(range(20))
    source = SafetensorsSource(tmp_path)
    assert source.names() == ["a", "b", "big", "c"]
    assert source.get("b").tolist() == [2, 2, 2, 2]


def test_finish_names_the_files_as_often_as_asked(tmp_path):
    with SafetensorsWriter(tmp_path, [(n, (1,), torch.uint8) for n in "ab"], max_shard_bytes=1) as writer:
        for name in "ab":
            writer.write(name, torch.ones(1, dtype=torch.uint8))
        files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        expected = [tmp_path / name for name in [*files, "model.safetensors.index.json"]]
        assert writer.finish() == expected
        assert writer.finish() == expected


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), limit=st.integers(1, 64))
def test_sharding_keeps_order_and_limit(tmp_path_factory, sizes, limit):
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": torch.full((size,), i, dtype=torch.uint8) for i, size in enumerate(sizes)}
    write_all(folder, tensors, max_shard_bytes=limit)
    read = {}
    for path in sorted(folder.glob("*.safetensors")):
        shard = load_file(path)
        assert len(shard) == 1 or sum(tensor.numel() for tensor in shard.values()) <= limit
        read |= shard
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    assert SafetensorsSource(folder).names() == list(tensors)


def test_views_and_parameters_are_written_as_they_look(tmp_path):
    tensors = {
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "sliced": torch.arange(10)[2:8:3],
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    write_all(tmp_path, tensors)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert loaded["sliced"].tolist() == [2, 5]
    assert loaded["parameter"].tolist() == [1, 1]


def test_plan_may_be_empty(tmp_path):
    write_all(tmp_path, {})
    assert load_file(tmp_path / "model.safetensors") == {}


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("second", torch.ones(2), "the next tensor of the plan is 'first', got 'second'"),
        ("first", torch.ones(3), r"planned as torch.float32 \[2\], got torch.float32 \[3\]"),
        ("first", torch.ones(2).half(), r"planned as torch.float32 \[2\], got torch.float16 \[2\]"),
    ],
)
def test_write_refuses_what_was_not_planned(tmp_path, name, tensor, message):
    plan = [("first", (2,), torch.float32), ("second", (2,), torch.float32)]
    with pytest.raises(ValueError, match=message):
        SafetensorsWriter(tmp_path, plan).write(name, tensor)


def test_write_refuses_more_than_planned(tmp_path):
    writer = SafetensorsWriter(tmp_path, [("a", (1,), torch.float32)])
    writer.write("a", torch.ones(1))
    with pytest.raises(ValueError, match="'b' is not one of them"):
        writer.write("b", torch.ones(1))


def test_finish_refuses_missing_tensors(tmp_path):
    plan = [(name, (1,), torch.float32) for name in "abc"]
    with (
        pytest.raises(ValueError, match="2 of 3 planned tensors were not written, the first is 'b'"),
        SafetensorsWriter(tmp_path, plan) as writer,
    ):
        writer.write("a", torch.ones(1))


def test_an_exception_in_the_block_is_not_hidden(tmp_path):
    plan = [(name, (1,), torch.float32) for name in "ab"]

    def fail_midway() -> None:
        with SafetensorsWriter(tmp_path, plan) as writer:
            writer.write("a", torch.ones(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_midway()


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        ([("a", (1,), torch.float32)] * 2, {}, "'a' is in the plan twice"),
        ([("__metadata__", (1,), torch.float32)], {}, "reserved"),
        ([("a", (1,), torch.complex64)], {}, "dtype torch.complex64, safetensors can hold torch.float64"),
        ([], {"max_shard_bytes": 0}, "at least 1, got 0"),
    ],
)
def test_impossible_plans(tmp_path, plan, options, message):
    with pytest.raises(ValueError, match=message):
        SafetensorsWriter(tmp_path, plan, **options)
    assert list(tmp_path.iterdir()) == []


def test_files_are_not_overwritten(tmp_path):
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(FileExistsError):
        write_all(tmp_path, {"a": torch.ones(1)})
    assert (tmp_path / "model.safetensors").read_text() == "precious"


def test_new_folder_appears_when_complete(tmp_path):
    target = tmp_path / "deep" / "er" / "model"
    with new_folder(target) as folder:
        (folder / "config.json").write_text("{}")
        assert not target.exists()
        assert folder.parent == target.parent
        assert folder.name.startswith(".model.partial-")
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_new_folder_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").mkdir()
    with new_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existed", [False, True])
def test_nothing_half_written_remains(tmp_path, error, existed):
    if existed:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "old").write_text("old")

    def fail_midway() -> None:
        with new_folder(tmp_path / "model", overwrite=existed) as folder:
            (folder / "half").write_text("half")
            raise error

    with pytest.raises(error):
        fail_midway()
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == (["model", "model/old"] if existed else [])


def test_existing_folder_is_refused_before_anything_is_done(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    with (
        pytest.raises(FileExistsError, match=r"exists and is not empty.*overwrite"),
        new_folder(tmp_path / "model"),
    ):
        pytest.fail("the block must not run")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_empty_folder_is_taken(tmp_path):
    (tmp_path / "model").mkdir()
    with new_folder(tmp_path / "model") as folder:
        (folder / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new"]


def test_file_in_the_way(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(FileExistsError, match="is a file"), new_folder(tmp_path / "model", overwrite=True):
        pytest.fail("the block must not run")


def test_overwrite_replaces_only_at_the_end(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    with new_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_folder_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "model"

    def meet_another_run() -> None:
        with new_folder(target):
            target.mkdir()
            (target / "other").write_text("other run")

    with pytest.raises(FileExistsError, match="not empty"):
        meet_another_run()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "other"]


def test_old_folder_comes_back_if_the_new_one_cannot_be_renamed(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    rename = Path.rename

    def fail_on_new(self: Path, to: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError("disk gone")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_on_new)
    with pytest.raises(OSError, match="disk gone"), new_folder(target, overwrite=True):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model", "old"]
