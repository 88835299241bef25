"""The pages' book-keeping against lists of tokens."""

import random

import pytest
import torch

from twofold.infer.backends import Start
from twofold.infer.backends.pages import EMPTY, SCRATCH, HeldPages, PagePool

SIZE = 4


def pool(n_bytes=None) -> PagePool:
    """Of two layers; a page has 2 * 2 * 1 * 4 * 1 numbers, 64 bytes."""
    return PagePool(
        n_layers=2,
        n_kv_heads=1,
        head_dim=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
        page_tokens=SIZE,
        n_bytes=n_bytes,
    )


def start(n_source=5, n_rows=1, n_tokens=10, n_verified=0) -> Start:
    return Start(
        source_ids=(3,) * n_source, prefix_ids=(2,), n_rows=n_rows, n_tokens=n_tokens, n_verified=n_verified
    )


def hold(pages: PagePool, asked: Start) -> HeldPages:
    held = HeldPages(pages, asked, pages.take(HeldPages.count(pages, asked)))
    held.make_room(1)
    held.accept(1)
    held.arrange([0] * asked.n_rows)
    return held


def write(pages: PagePool, held: HeldPages, tokens: list[float]) -> None:
    """A token of every row, in both layers."""
    held.make_room(1)
    for layer in pages.layers:
        for row, token in enumerate(tokens):
            page = held.table[row, held.n_tokens // SIZE]
            assert page not in (EMPTY, SCRATCH)
            layer[:, :, page, held.n_tokens % SIZE] = token
    held.accept(1)


def texts(pages: PagePool, held: HeldPages) -> list[list[float]]:
    n_pages = pages.pages_for(held.n_tokens)
    last = pages.layers[-1][1, 0, torch.from_numpy(held.table[:, :n_pages]), :, 0]
    return last.flatten(1)[:, 1 : held.n_tokens].tolist()


def test_memory_grows_by_doubling_up_to_what_was_said():
    pages = pool(n_bytes=64 * 40 + 5)
    assert pages.n_pages == 5
    sizes = []
    for _ in range(45):
        pages.take(1)
        sizes.append(pages.n_pages)
    assert sizes == [5] * 5 + [10] * 5 + [20] * 10 + [40] * 20 + [41, 42, 43, 44, 45]
    free = pool()
    free.take(3)
    assert free.n_pages == 3
    free.take(1)
    assert (free.n_pages, free.n_taken) == (6, 4)


def test_growth_keeps_what_is_written():
    pages = pool()
    held = hold(pages, start())
    for token in (7.0, 8.0, 9.0, 10.0):
        write(pages, held, [token])
    pages.take(100)
    assert texts(pages, held) == [[7.0, 8.0, 9.0, 10.0]]


def test_pages_come_empty_and_go_back_with_their_owner():
    pages = pool()
    held = hold(pages, start())
    write(pages, held, [torch.nan])
    assert pages.n_taken == 2 + 3
    assert held.n_bytes == 5 * 64
    del held
    assert pages.n_taken == 0
    again = pages.take(5)
    assert not pages.layers[1][:, :, again].any()
    assert len({*again, EMPTY, SCRATCH}) == 7


@pytest.mark.parametrize(
    ("asked", "n_pages"),
    [
        (start(), 2 + 3),
        (start(n_source=0), 3),
        (start(n_source=4, n_rows=3, n_tokens=8), 1 + 3 * 2),
        (start(n_tokens=10, n_verified=3), 2 + 4),
    ],
)
def test_pages_of_a_request(asked, n_pages):
    pages = pool()
    assert HeldPages.count(pages, asked) == n_pages
    held = hold(pages, asked)
    assert held.n_bytes == n_pages * pages.page_bytes == n_pages * 64


def test_beams_share_what_is_full_and_copy_what_they_write_to():
    pages = pool()
    held = hold(pages, start(n_rows=2, n_tokens=12))
    for i in range(5):
        write(pages, held, [10.0 + i, 20.0 + i])
    before = held.table.copy()
    held.select([1, 0])
    assert held.table.tolist() == before[[1, 0]].tolist()
    held.select([0, 0])
    first, second = held.table.tolist()
    assert first[:2] == before[1, :2].tolist()
    assert second[0] == first[0]
    assert second[1] != first[1]
    write(pages, held, [1.0, 2.0])
    assert texts(pages, held) == [[20.0, 21.0, 22.0, 23.0, 24.0, 1.0], [20.0, 21.0, 22.0, 23.0, 24.0, 2.0]]


@pytest.mark.parametrize("seed", range(20))
def test_any_selection_keeps_every_text(seed):
    """Rows that branch, leave and come back, beside another request; memory is that of the rows at every time."""
    rng = random.Random(seed)
    pages = pool()
    n_rows, n_tokens = rng.randrange(1, 6), rng.randrange(2, 40)
    other = hold(pages, start(n_rows=2, n_tokens=n_tokens))
    held = hold(pages, start(n_rows=n_rows, n_tokens=n_tokens))
    expected = [[] for _ in range(n_rows)]
    unmoved = [[], []]
    for _ in range(n_tokens - 1):
        for _ in range(rng.randrange(3)):
            rows = [rng.randrange(held.n_rows) for _ in range(rng.randrange(1, n_rows + 1))]
            held.select(rows)
            expected = [list(expected[row]) for row in rows]
        if rng.random() < 0.2:
            held.make_room(1)  # a step that failed
        for request, known in ((held, expected), (other, unmoved)):
            new = [rng.random() for _ in known]
            write(pages, request, new)
            for text, token in zip(known, new, strict=True):
                text.append(token)
        assert texts(pages, held) == [[pytest.approx(x) for x in text] for text in expected]
        assert texts(pages, other) == [[pytest.approx(x) for x in text] for text in unmoved]
        assert held.n_bytes == 64 * (2 + held.n_rows * -(-n_tokens // SIZE))
        assert held.n_bytes + other.n_bytes == 64 * pages.n_taken
    del held, other, request
    assert pages.n_taken == 0


def test_pages_need_a_token():
    with pytest.raises(ValueError, match="page_tokens must be at least 1, got 0"):
        PagePool(
            n_layers=1,
            n_kv_heads=1,
            head_dim=1,
            dtype=torch.float32,
            device=torch.device("cpu"),
            page_tokens=0,
        )
