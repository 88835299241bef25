import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.data.packing import Packer


def packed(lengths, source_length, target_length, lookahead):
    """Rows of (number, lengths), the window kept full as long as there are examples."""
    packer = Packer(source_length, target_length, lookahead=lookahead)
    coming, rows = list(enumerate(lengths)), []
    while True:
        while packer.wants_more and coming:
            number, (source, target) = coming.pop(0)
            packer.add(number, source, target)
        if not packer.waiting:
            return rows
        rows.append(packer.next_row())


def test_a_row_starts_with_the_oldest_and_fills_both_sides():
    # After (6, 1) there is room for (4, 9): both sides full. (4, 1) would fit too, but points the wrong way.
    assert packed([(6, 1), (4, 1), (4, 9), (1, 1)], 10, 10, lookahead=4) == [[0, 2], [1, 3]]


def test_the_window_is_bounded():
    # The example that would complete the first row comes one too late.
    assert packed([(6, 6), (6, 6), (4, 4)], 10, 10, lookahead=2) == [[0], [1, 2]]
    assert packed([(6, 6), (6, 6), (4, 4)], 10, 10, lookahead=3) == [[0, 2], [1]]


def test_without_packing():
    packer = Packer(10, 10, packing=False)
    packer.add("a", 2, 2)
    assert not packer.wants_more
    assert packer.next_row() == ["a"]
    assert packer.wants_more


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("source_len", "target_len"), [(11, 1), (1, 11)])
def test_too_long(packing, source_len, target_len):
    with pytest.raises(ValueError, match=f"{source_len} source and {target_len} target tokens does not fit"):
        Packer(10, 10, packing=packing).add(0, source_len, target_len)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 5)), max_size=60), st.sampled_from([1, 2, 7, 100])
)
def test_every_example_is_in_one_row_within_the_budgets(lengths, lookahead):
    # Very unequal sides: sources of up to 50 tokens, targets of up to 5.
    rows = packed(lengths, 50, 5, lookahead)
    for row in rows:
        assert sum(lengths[number][0] for number in row) <= 50
        assert sum(lengths[number][1] for number in row) <= 5
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    # No row could have taken an example that stood in a later row and was in the window then: the oldest leads.
    leaders = [row[0] for row in rows]
    assert leaders == sorted(leaders)


def test_two_kinds_that_fill_each_other_are_paired():
    # Alone each fills one side of a row only; first come first served would leave a third of the rows half empty.
    lengths = [(80, 10), (80, 10), (80, 10), (20, 90), (20, 90), (20, 90)] * 10
    assert all(
        sorted(lengths[n] for n in row) == [(20, 90), (80, 10)] for row in packed(lengths, 100, 100, 60)
    )
