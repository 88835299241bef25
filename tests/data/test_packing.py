import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.data.convention import Example
from twofold.data.packing import MAX_OPEN_ROWS, Packer


def example(source_len, target_len, first=0, prefix_len=1):
    return Example(
        np.arange(first, first + source_len),
        np.full(prefix_len, 2),
        np.arange(first, first + target_len),
        False,
    )


def sizes(rows):
    return [[(len(e.source), e.decoder_length) for e in row] for row in rows]


def test_first_fit_uses_the_oldest_row_with_room_on_both_sides():
    packer = Packer(10, 10)
    assert packer.add(example(6, 2)) == []
    assert packer.add(example(5, 2)) == []  # no room in the first source
    assert packer.add(example(1, 9)) == []  # room in sources, not in targets
    assert packer.add(example(3, 3)) == []  # fits the first
    assert sizes(packer.add(example(1, 5))) == [[(6, 2), (3, 3), (1, 5)]]  # and fills it
    assert sizes(packer.flush()) == [[(5, 2)], [(1, 9)]]
    assert packer.flush() == []


def test_the_given_decoder_tokens_count_too():
    packer = Packer(10, 6)
    assert sizes(packer.add(example(1, 3, prefix_len=4))) == [[(1, 6)]]


def test_open_rows_are_bounded():
    packer = Packer(10, 10)
    done = [row for i in range(MAX_OPEN_ROWS + 2) for row in packer.add(example(6, 6, first=i))]
    assert [row[0].source[0] for row in done] == [0, 1]
    assert len(packer.flush()) == MAX_OPEN_ROWS


def test_without_packing():
    packer = Packer(10, 10, packing=False)
    assert sizes(packer.add(example(2, 2)) + packer.add(example(3, 2))) == [[(2, 2)], [(3, 2)]]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("source_len", "target_len"), [(11, 1), (1, 11)])
def test_too_long(packing, source_len, target_len):
    with pytest.raises(ValueError, match=f"{source_len} source and {target_len} target tokens does not fit"):
        Packer(10, 10, packing=packing).add(example(source_len, target_len))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 5)), max_size=60), st.integers(0, 60))
def test_nothing_is_lost_within_budgets_and_after_a_stop(lengths, stop):
    # Very unequal sides: sources of up to 50 tokens, targets of up to 5.
    examples = [example(s, t, first=100 * i) for i, (s, t) in enumerate(lengths)]
    packer, rows, resumed = Packer(50, 5), [], []
    for i, item in enumerate(examples):
        if i == stop:
            state = json.loads(json.dumps(packer.state_dict()))
            packer = Packer(50, 5)
            packer.load_state_dict(state)
        rows += packer.add(item)
    rows += packer.flush()
    for row in rows:
        assert sum(len(e.source) for e in row) <= 50
        assert sum(e.decoder_length for e in row) <= 5
    assert sorted(int(e.target[0]) for row in rows for e in row) == [100 * i for i in range(len(examples))]
    straight = Packer(50, 5)
    for item in examples:
        resumed += straight.add(item)
    assert sizes(resumed + straight.flush()) == sizes(rows)
