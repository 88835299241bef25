import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models.tiny import gemma_stack, stack
from twofold.config import StackConfig
from twofold.models.masks import AttentionMask, Rule, Tokens, decoder_rule, encoder_rule


def tokens(*rows: list[int], is_plain: bool = False) -> Tokens:
    return Tokens.from_segments(torch.tensor(rows), is_plain=is_plain)


def seen(mask: AttentionMask, row: int = 0) -> list[str]:
    """One string per query, # where it sees the key."""
    return ["".join("#" if v else "." for v in query) for query in mask.dense[row].tolist()]


def over(keys: Tokens, rule: Rule) -> list[str]:
    return seen(AttentionMask(keys, (keys, rule)))


FULL, LOCAL = "full_attention", "sliding_attention"


# Positions.


@pytest.mark.parametrize(
    ("segments", "positions"),
    [
        ([1, 1, 1, 1], [0, 1, 2, 3]),
        ([0, 0, 1, 1], [None, None, 0, 1]),
        ([1, 1, 0, 0], [0, 1, None, None]),
        ([1, 0, 0, 1], [0, None, None, 3]),
        ([1, 1, 2, 2, 2, 3], [0, 1, 0, 1, 2, 0]),
        ([0, 1, 1, 0, 2, 2, 0], [None, 0, 1, None, 0, 1, None]),
        ([0, 0, 0], [None, None, None]),
        ([2, 2, 5], [0, 1, 0]),
    ],
)
def test_positions_count_from_the_first_token_of_a_segment(
    segments: list[int], positions: list[int | None]
) -> None:
    found = tokens(segments).positions[0].tolist()
    assert [p if s else None for p, s in zip(found, segments, strict=True)] == positions


def test_continued_positions_follow_the_source() -> None:
    source = tokens([1, 1, 1, 2, 2, 0], [0, 0, 1, 1, 0, 0])
    target = tokens([1, 1, 2, 2], [0, 1, 1, 1])
    later = target.continued_after(source)
    assert later.positions[0].tolist() == [3, 4, 2, 3]
    assert later.positions[1, 1:].tolist() == [2, 3, 4]
    assert torch.equal(later.segments, target.segments)


def test_continued_positions_without_a_source() -> None:
    source = tokens([2, 2, 0])
    target = tokens([1, 1, 2])
    assert target.continued_after(source).positions[0].tolist() == [0, 1, 2]


def test_last_tokens() -> None:
    last = tokens([1, 1, 2, 2, 2], is_plain=True).last(2)
    assert last.positions.tolist() == [[1, 2]]
    assert last.segments.tolist() == [[2, 2]]
    assert last.is_plain


# Rules.


def test_decoder_rules() -> None:
    config = stack(sliding_window=3)
    assert decoder_rule(config, FULL) == Rule(future=0)
    assert decoder_rule(config, LOCAL) == Rule(past=2, future=0)


@pytest.mark.parametrize(
    ("window", "meaning", "past", "future"),
    [
        (5, "each_side", 4, 4),
        (1, "each_side", 0, 0),
        (5, "total", 2, 2),
        (4, "total", 1, 2),
        (1, "total", 0, 0),
    ],
)
def test_encoder_windows(window: int, meaning: str, past: int, future: int) -> None:
    config: StackConfig = gemma_stack(sliding_window=window, bidirectional_window=meaning)
    assert encoder_rule(config, LOCAL, "bidirectional") == Rule(past, future)
    assert encoder_rule(config, LOCAL, "sink") == Rule(past, future, sink=True)
    assert encoder_rule(config, LOCAL, "causal") == Rule(window - 1, 0)
    assert encoder_rule(config, FULL, "bidirectional") == Rule()
    assert encoder_rule(config, FULL, "sink") == Rule(sink=True)
    assert encoder_rule(config, FULL, "causal") == Rule(future=0)


def test_published_encoder_window() -> None:
    """Rule R13: with a window of 5, token 10 sees 6 to 14."""
    keys = tokens([1] * 20)
    rule = encoder_rule(gemma_stack(sliding_window=5), LOCAL, "bidirectional")
    mask = AttentionMask(keys, (keys, rule))
    assert mask.dense[0, 10].nonzero().flatten().tolist() == [6, 7, 8, 9, 10, 11, 12, 13, 14]


# Masks, drawn.

FOUR = tokens([1, 1, 1, 1])


def test_causal() -> None:
    assert over(FOUR, Rule(future=0)) == ["#...", "##..", "###.", "####"]


def test_bidirectional() -> None:
    assert over(FOUR, Rule()) == ["####"] * 4


def test_sink() -> None:
    assert over(FOUR, Rule(sink=True)) == ["#...", "####", "####", "####"]


def test_sink_with_a_window() -> None:
    assert over(FOUR, Rule(past=1, future=1, sink=True)) == ["#...", "###.", ".###", "..##"]


def test_causal_window() -> None:
    assert over(FOUR, Rule(past=1, future=0)) == ["#...", "##..", ".##.", "..##"]


def test_window_to_both_sides() -> None:
    assert over(FOUR, Rule(past=1, future=2)) == ["###.", "####", ".###", "..##"]


def test_packed_segments() -> None:
    keys = tokens([1, 1, 2, 2, 0])
    assert over(keys, Rule()) == ["##...", "##...", "..##.", "..##.", "....."]
    assert over(keys, Rule(future=0)) == ["#....", "##...", "..#..", "..##.", "....."]
    assert over(keys, Rule(sink=True)) == ["#....", "##...", "..#..", "..##.", "....."]


def test_padding_left_right_and_holes() -> None:
    assert over(tokens([0, 1, 1]), Rule()) == ["...", ".##", ".##"]
    assert over(tokens([1, 1, 0]), Rule()) == ["##.", "##.", "..."]
    assert over(tokens([1, 0, 1, 1]), Rule()) == ["#.##", "....", "#.##", "#.##"]
    # A hole counts as a position: the last token is 3 away from the first.
    assert over(tokens([1, 0, 1, 1]), Rule(past=2, future=0)) == ["#...", "....", "#.#.", "..##"]
    # Padding on the left does not, so the sink is the first real token.
    assert over(tokens([0, 1, 1, 1]), Rule(sink=True)) == ["....", ".#..", ".###", ".###"]


def test_one_new_token_gets_its_row_of_the_full_mask() -> None:
    keys = tokens([1] * 7)
    rule = Rule(past=2, future=0)
    whole = AttentionMask(keys, (keys, rule)).dense
    kept = keys.last(4)
    assert torch.equal(AttentionMask(keys.last(1), (kept, rule)).dense, whole[:, -1:, -4:])


def test_cross_mask_pairs_segments() -> None:
    source, target = tokens([1, 1, 2, 0]), tokens([1, 2, 2, 0, 3])
    assert seen(AttentionMask(target, (source, Rule()))) == ["##..", "..#.", "..#.", "....", "...."]


def test_merged_parts_have_their_own_rules() -> None:
    source, target = tokens([1, 1, 1]), tokens([1, 1])
    merged = AttentionMask(target, (source, Rule()), (target, Rule(past=0, future=0)))
    assert seen(merged) == ["####.", "###.#"]


def test_continued_positions_let_a_window_cover_both_parts() -> None:
    source, target = tokens([0, 1, 1, 1]), tokens([1, 1, 1])
    own = target.continued_after(source)
    merged = AttentionMask(own, (source, Rule(past=2)), (own, Rule(past=2, future=0)))
    assert seen(merged) == ["..###..", "...###.", "....###"]


# Shortcuts, and FlexAttention's form.

RULES = st.builds(
    Rule,
    past=st.none() | st.integers(0, 6),
    future=st.none() | st.integers(0, 6),
    sink=st.booleans(),
)


@st.composite
def segment_ids(draw: st.DrawFn, length: int) -> Tensor:
    """One row: padding, ids growing from left to right, holes."""
    steps = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
    padding = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    ids = 1 + torch.tensor(steps).cumsum(0)
    return torch.where(torch.tensor(padding), 0, ids)[None]


@st.composite
def batches(draw: st.DrawFn, length: int) -> Tokens:
    """Plain tokens that are known to be, or any."""
    if draw(st.booleans()):
        return Tokens.from_segments(torch.ones(1, length, dtype=torch.int64), is_plain=draw(st.booleans()))
    return Tokens.from_segments(draw(segment_ids(length)))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_shortcuts_are_taken_only_when_they_hold(data: st.DataObject) -> None:
    queries = data.draw(batches(data.draw(st.integers(1, 6))))
    source = data.draw(batches(data.draw(st.integers(1, 6))))
    parts = data.draw(
        st.sampled_from(
            [
                [(queries, data.draw(RULES))],
                [(source, data.draw(RULES.filter(lambda rule: rule.future is None)))],
                [
                    (source, data.draw(RULES.filter(lambda rule: rule.future is None))),
                    (queries, data.draw(RULES)),
                ],
            ]
        )
    )
    mask = AttentionMask(queries, *parts)
    if mask.hides_nothing:
        assert mask.dense.all()
    if mask.is_plain_causal:
        n = queries.segments.shape[1]
        assert torch.equal(mask.dense[0], torch.ones(n, n, dtype=torch.bool).tril())


def test_shortcuts_are_taken_where_they_pay() -> None:
    plain = tokens([1, 1, 1, 1], is_plain=True)
    other = tokens([1, 1], is_plain=True)
    assert AttentionMask(plain, (plain, Rule())).hides_nothing
    assert AttentionMask(plain, (other, Rule())).hides_nothing
    assert AttentionMask(plain, (plain, Rule(future=0))).is_plain_causal
    assert AttentionMask(plain, (plain, Rule(past=3, future=0))).is_plain_causal
    for rule in (Rule(past=2, future=0), Rule(), Rule(sink=True), Rule(future=1)):
        assert not AttentionMask(plain, (plain, rule)).is_plain_causal
    for rule in (Rule(future=0), Rule(past=1), Rule(sink=True)):
        assert not AttentionMask(plain, (plain, rule)).hides_nothing
    assert not AttentionMask(FOUR, (FOUR, Rule())).hides_nothing
    assert not AttentionMask(FOUR, (FOUR, Rule(future=0))).is_plain_causal
    assert not AttentionMask(plain.last(1), (plain, Rule(future=0))).is_plain_causal
    assert not AttentionMask(plain, (other, Rule()), (plain, Rule(future=0))).is_plain_causal


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_block_mask_is_the_dense_mask(data: st.DataObject) -> None:
    n_queries, n_source = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    rows = [data.draw(segment_ids(n_queries)) for _ in range(2)]
    queries = Tokens.from_segments(torch.cat(rows))
    source = Tokens.from_segments(torch.cat([data.draw(segment_ids(n_source)) for _ in range(2)]))
    queries = queries.continued_after(source) if data.draw(st.booleans()) else queries
    mask = AttentionMask(queries, (source, data.draw(RULES)), (queries, data.draw(RULES)))
    block_mask = mask.block_mask
    for b in range(2):
        for q in range(n_queries):
            for k in range(n_source + n_queries):
                index = [torch.tensor(i) for i in (b, 0, q, k)]
                assert bool(block_mask.mask_mod(*index)) == bool(mask.dense[b, q, k])
    assert block_mask.shape == (2, 1, n_queries, n_source + n_queries)
