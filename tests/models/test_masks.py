from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
    listed, found = block_mask.to_dense(), mask.dense.any(2).any(1)  # one block in all
    assert listed.shape == (2, 1, 1, 1)
    assert torch.equal(listed.flatten() > 0, found)


# What backends make of it: the formula, FlexAttention's blocks, runs.


@st.composite
def masks(draw: st.DrawFn, *, with_holes: bool = True) -> AttentionMask:
    """Two rows of up to 12 tokens that attend to a source, to themselves, or to both."""
    n_queries, n_source = draw(st.integers(1, 12)), draw(st.integers(1, 12))

    def row(length: int) -> Tensor:
        ids = draw(segment_ids(length))
        return ids if with_holes else ids.cummax(1).values

    queries = Tokens.from_segments(torch.cat([row(n_queries), row(n_queries)]))
    source = Tokens.from_segments(torch.cat([row(n_source), row(n_source)]))
    if draw(st.booleans()):
        queries = queries.continued_after(source)
    own, other = (queries, draw(RULES)), (source, draw(RULES))
    return AttentionMask(queries, *draw(st.sampled_from([(own,), (other,), (other, own)])))


@settings(max_examples=40, deadline=None)
@given(masks())
def test_dense_follows_the_formula(mask: AttentionMask) -> None:
    """Pair by pair, as the docstring of `models.masks` has it."""
    queries = mask.queries
    for row in range(2):
        for t, (position, segment) in enumerate(
            zip(queries.positions[row], queries.segments[row], strict=True)
        ):
            wanted = []
            for keys, rule in mask.parts:
                for k_position, k_segment in zip(keys.positions[row], keys.segments[row], strict=True):
                    ahead = int(k_position - position)
                    wanted.append(
                        bool(segment == k_segment > 0)
                        and (rule.past is None or -ahead <= rule.past)
                        and (rule.future is None or ahead <= rule.future)
                        and (position > 0 or ahead <= 0 or not rule.sink)
                    )
            assert mask.dense[row, t].tolist() == wanted


def in_blocks(dense: Tensor, size: int) -> Tensor:
    """bool [B, blocks, blocks, size, size]; beyond the ends nothing is visible."""
    _, n_queries, n_keys = dense.shape
    padded = torch.nn.functional.pad(dense, (0, -n_keys % size, 0, -n_queries % size))
    return padded.unflatten(1, (-1, size)).unflatten(3, (-1, size)).transpose(2, 3)


@settings(max_examples=150, deadline=None)
@given(masks(), st.integers(1, 5))
def test_blocks_called_empty_are_and_full_ones_are(mask: AttentionMask, size: int) -> None:
    is_empty, is_full = mask.block_kinds(size)
    blocks = in_blocks(mask.dense, size)
    assert not blocks.any(-1).any(-1)[is_empty].any()
    assert torch.equal(is_full, blocks.all(-1).all(-1))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_empty_block_of_a_packed_row_is_missed(data: st.DataObject) -> None:
    """Without holes: self-attention under any rule, and a source that has every segment of the target."""
    size = data.draw(st.integers(1, 5))
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    source_lengths = [data.draw(st.integers(1, 6)) for _ in lengths]
    own, source = (
        tokens([i for i, n in enumerate(ns, start=1) for _ in range(n)]) for ns in (lengths, source_lengths)
    )
    for mask in (AttentionMask(own, (own, data.draw(RULES))), AttentionMask(own, (source, Rule()))):
        is_empty, _ = mask.block_kinds(size)
        assert torch.equal(is_empty, ~in_blocks(mask.dense, size).any(-1).any(-1))


def packed_row(n_tokens: int, seed: int = 0) -> Tokens:
    """Segments of 20 to 400 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(20, 400, (n_tokens // 20,), generator=generator)
    return Tokens.from_segments((1 + torch.repeat_interleave(lengths))[None, :n_tokens])


def test_block_mask_lists_the_blocks_that_matter() -> None:
    """A packed row of 2000 tokens (not a multiple of 128), causal: the lists against the dense mask."""
    own = packed_row(2000)
    mask = AttentionMask(own, (own, Rule(future=0)))
    block_mask = mask.block_mask
    blocks = in_blocks(mask.dense, 128)
    is_full = blocks.all(-1).all(-1)[0]
    is_partial = blocks.any(-1).any(-1)[0] & ~is_full
    for counts, numbers, wanted in (
        (block_mask.kv_num_blocks, block_mask.kv_indices, is_partial),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, is_full),
    ):
        assert counts is not None
        assert numbers is not None
        for row, (count, order) in enumerate(zip(counts[0, 0].tolist(), numbers[0, 0].tolist(), strict=True)):
            assert order[:count] == wanted[row].nonzero().flatten().tolist()
    assert is_full.any()
    assert int(is_partial.sum()) < 50  # of 256
    assert block_mask.q_num_blocks is not None  # the backward pass reads the lists by key
    assert torch.equal(block_mask.q_num_blocks[0, 0].long(), is_partial.sum(0))


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor):
                self.numel = max(self.numel, one.numel())
        return out


def test_block_mask_makes_no_dense_tensor() -> None:
    own = packed_row(4096)
    with LargestTensor() as largest:
        _ = AttentionMask(own, (own, Rule()), (own, Rule(future=0))).block_mask
    assert 4096 <= largest.numel <= 4 * 4096


@settings(max_examples=150, deadline=None)
@given(masks(), st.integers(1, 5))
def test_runs_hold_exactly_the_visible_pairs(mask: AttentionMask, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("twofold.models.masks._RUN_BLOCK", size)
        runs = mask.runs
    found = torch.zeros_like(mask.dense, dtype=torch.int64)
    for run in runs:
        for block in run.blocks:
            n_queries = block.queries.stop - block.queries.start
            keys = torch.cat([torch.arange(keys.start, keys.stop) for keys in run.keys])[block.keys]
            visible = torch.ones(n_queries, len(keys), dtype=torch.int64)
            if block.hidden is not None:
                visible[:, block.hidden] = (~mask.hidden(run, block)).long()
                hidden = visible[:, block.hidden] == 0
                assert hidden[:, 0].any()
                assert hidden[:, -1].any()
            if block.is_causal:
                assert torch.equal(visible, torch.ones_like(visible).tril())
            queries = torch.arange(run.queries.start, run.queries.stop)[block.queries]
            found[run.rows, queries[:, None], keys] += visible
    assert torch.equal(found, mask.dense.long())


def test_runs_skip_what_is_hidden() -> None:
    own = tokens([1] * 600 + [2] * 100)
    (long, short) = AttentionMask(own, (own, Rule(future=0))).runs
    assert [(b.queries, b.keys, b.hidden, b.is_causal) for b in long.blocks] == [
        (slice(0, 256), slice(0, 256), slice(1, 256), True),
        (slice(256, 512), slice(0, 512), slice(257, 512), False),
        (slice(512, 600), slice(0, 600), slice(513, 600), False),
    ]
    assert (short.queries, short.keys) == (slice(600, 700), (slice(600, 700),))
    window = AttentionMask(own, (own, Rule(past=10, future=10))).runs[0]
    assert [b.keys for b in window.blocks] == [slice(0, 266), slice(246, 522), slice(502, 600)]


def test_rows_alike_are_one_run() -> None:
    plain = tokens([1] * 5, [1] * 5)
    (run,) = AttentionMask(plain, (plain, Rule())).runs
    assert run.rows == slice(0, 2)
    assert run.blocks[0].hidden is None
    padded = tokens([1] * 5, [1] * 4 + [0])
    assert [run.rows for run in AttentionMask(padded, (padded, Rule())).runs] == [slice(0, 1), slice(1, 2)]


def test_layers_share_what_a_mask_has_worked_out() -> None:
    mask = AttentionMask(FOUR, (FOUR, Rule()))
    assert mask.runs is mask.runs
    assert mask.block_mask is mask.block_mask
    assert mask.dense is mask.dense
