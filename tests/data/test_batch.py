from dataclasses import replace

import numpy as np
import pytest
import torch

from twofold.data.batch import collate
from twofold.data.convention import Example


def array(*ids):
    return np.asarray(ids, dtype=np.int64)


TWO = [
    Example(array(10, 11), array(2), array(20, 21, 1), True),
    Example(array(12), array(5, 6), array(22), False),
]
ONE = [Example(array(13), array(2), array(23), False)]


def test_tensors_by_hand():
    batch = collate([TWO, ONE], pad_token_id=0)
    assert batch.input_ids.tolist() == [[10, 11, 12], [13, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 2], [1, 0, 0]]
    assert batch.decoder_input_ids.tolist() == [[2, 20, 21, 5, 6], [2, 0, 0, 0, 0]]
    assert batch.decoder_segment_ids.tolist() == [[1, 1, 1, 2, 2], [1, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[20, 21, 1, -100, 22], [23, -100, -100, -100, -100]]
    assert batch.num_scored_tokens == 5
    assert batch.num_real_tokens == 4 + 6
    tensors = {name: getattr(batch, name) for name in batch.__dataclass_fields__ if name != "documents"}
    assert all((t is None) == name.startswith("teacher_") for name, t in tensors.items())
    assert all(t is None or t.dtype == torch.int64 for t in tensors.values())
    assert batch.to("cpu").teacher_index is None


def test_fixed_lengths():
    batch = collate([ONE], pad_token_id=9, source_length=3, target_length=2)
    assert batch.input_ids.tolist() == [[13, 9, 9]]
    assert batch.decoder_input_ids.tolist() == [[2, 9]]
    assert batch.labels.tolist() == [[23, -100]]
    with pytest.raises(ValueError, match="3 tokens does not fit source_length=2"):
        collate([TWO], 0, source_length=2)
    with pytest.raises(ValueError, match="5 tokens does not fit target_length=4"):
        collate([TWO], 0, target_length=4)


def test_empty_source_gets_a_column_of_padding():
    batch = collate([[Example(array(), array(7), array(8), False)]], pad_token_id=0)
    assert batch.input_ids.tolist() == [[0]]
    assert batch.segment_ids.tolist() == [[0]]


def test_nothing_to_score():
    for rows in ([], [[]], [[Example(array(1), array(2), array(-100), False)]]):
        with pytest.raises(ValueError, match="has no scored token"):
            collate(rows, 0)


def test_to_moves_every_tensor():
    names = [name for name in collate([ONE], 0).__dataclass_fields__ if name != "documents"]
    full = replace(
        collate([ONE], 0), **{name: torch.zeros(1) for name in names if name.startswith("teacher_")}
    )
    moved = full.to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in names)
