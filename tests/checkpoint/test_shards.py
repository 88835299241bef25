import json

import pytest
import torch
from safetensors.torch import save_file

from twofold.checkpoint.resolve import Checkpoint
from twofold.checkpoint.shards import ShardsSource

ROWS = torch.arange(15.0).reshape(5, 3)
SCALE = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)


def write(folder, number, parts):
    """A file of one rank: name to (first row, tensor)."""
    info = {name: {"saved_offsets": [row] + [0] * (part.ndim - 1)} for name, (row, part) in parts.items()}
    path = folder / f"shard-{number:05d}-model-00001-of-00001.safetensors"
    tensors = {name: part.contiguous() for name, (_, part) in parts.items()}
    save_file(tensors, path, {"DCP_SHARDING_INFO": json.dumps(info), "format": "pt"})
    return path


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, 1, {"rows": (3, ROWS[3:])})  # ranks hold rows in any order
    write(tmp_path, 2, {"rows": (0, ROWS[:3]), "scale": (0, SCALE)})
    return tmp_path


def test_parts_become_whole_tensors(folder):
    with ShardsSource(folder) as source:
        assert sorted(source.names()) == ["rows", "scale"]
        assert (source.shape("rows"), source.dtype("scale")) == ((5, 3), torch.bfloat16)
        assert torch.equal(source.get("rows"), ROWS)
        assert torch.equal(source.get("scale"), SCALE)


def test_a_folder_of_them_is_a_checkpoint(folder):
    source = Checkpoint(folder=folder, gguf_file=None, config={}, name="x").tensors()
    assert torch.equal(source.get("rows"), ROWS)


def test_missing_parts_are_noticed(folder):
    write(folder, 2, {"scale": (0, SCALE)})
    with pytest.raises(ValueError, match="parts of rows are missing"):
        ShardsSource(folder)


def test_a_file_that_is_cut_short_is_noticed(folder):
    path = folder / "shard-00001-model-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="incomplete"):
        ShardsSource(folder)


def test_files_of_something_else_are_refused(folder):
    save_file({"rows": ROWS}, folder / "shard-00003-model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match="does not say which rows"):
        ShardsSource(folder)
    with pytest.raises(FileNotFoundError):
        ShardsSource(folder / "absent")
