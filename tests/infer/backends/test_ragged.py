"""Attention over ragged rows against a plain softmax, and what is stored against what was given."""

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from twofold.infer.backends import ragged
from twofold.infer.backends.ragged import Columns, Layout, attend

N_LAYERS, K, N, H = 3, 2, 6, 10
ROWS = [(13, 9, 8, 2, 1), (200, 40, 17, 0, 0), (0, 3, 2, 0, 2), (7, 5, 0, 7, 0)]
"""Source tokens, columns of the row's own, the new token's, and the first it sees of either: also an empty source, and
one that is out of sight. Heads are 10 wide, which 4 does not divide."""

ERROR = {"float32": 2e-6, "bfloat16": 0.02, "int8": 0.03}


def plain(q_H: Tensor, k_SH: Tensor, v_SH: Tensor, scale: float, softcap: float | None) -> Tensor:
    scores = k_SH.double() @ q_H.double() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.softmax(-1) @ v_SH.double()).float()


def filled(layout: Layout, n_columns: int, layer: int, seed: int) -> tuple[Columns, Tensor, Tensor]:
    """Columns, and what lies in one layer: keys and values [K, C, H]. Other layers hold other numbers."""
    generator = torch.Generator().manual_seed(seed)
    columns = Columns(layout, n_columns)
    found = []
    for i in range(N_LAYERS):
        k, v = (torch.randn(K, n_columns, H, generator=generator) * (1 + 3 * which) for which in (0, 1))
        columns.fill(i, k.transpose(1, 2), v)
        found.append((k, v))
    return columns, *found[layer]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
@pytest.mark.parametrize(("reads_source", "reads_own"), [(True, True), (True, False), (False, True)])
def test_attention_equals_a_plain_softmax(dtype, softcap, together, reads_source, reads_own, monkeypatch):
    monkeypatch.setattr(ragged, "_ALONE", 0 if together else 10**12)
    layout, layer = Layout(N_LAYERS, K, H, dtype), 1
    generator = torch.Generator().manual_seed(3)
    q, k_new, v_new = (torch.randn(len(ROWS), n, H, generator=generator) for n in (N, K, K))
    kept, table, expected = [], [], torch.zeros(len(ROWS), N, H)
    for m, (n_source, n_columns, index, first_source, first_own) in enumerate(ROWS):
        source, k_source, v_source = filled(layout, n_source, layer, m)
        own, k_own, v_own = filled(layout, n_columns, layer, 10 + m)
        kept.append((source, own))
        table.append([*source.addresses, n_source, first_source, *own.addresses, n_columns, first_own, index])
        k_own[:, index], v_own[:, index] = k_new[m], v_new[m]
        seen = [(k_source[:, first_source:], v_source[:, first_source:])] * reads_source
        seen += [(k_own[:, first_own : index + 1], v_own[:, first_own : index + 1])] * reads_own
        k, v = (torch.cat(parts, dim=1) for parts in zip(*seen, strict=True))
        for head in range(N):
            if k.shape[1]:
                expected[m, head] = plain(q[m, head], k[head // 3], v[head // 3], 0.7, softcap)
    out = np.full((len(ROWS), N, H), np.nan, np.float32)
    attend(
        q.numpy(),
        (k_new.numpy(), v_new.numpy()) if reads_own else None,
        np.array(table, np.int64),
        layer,
        layout,
        out,
        reads_source=reads_source,
        scale=0.7,
        softcap=softcap,
    )
    assert (torch.from_numpy(out) - expected).abs().max() < ERROR[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_tokens_of_one_row_see_those_before_them(dtype):
    """Three new tokens at once give what they give one by one."""
    layout = Layout(N_LAYERS, K, H, dtype)
    source, *_ = filled(layout, 5, 0, 0)
    q, k, v = (torch.randn(3, n, H, generator=torch.Generator().manual_seed(n)).numpy() for n in (N, K, K))
    found = []
    for groups in ([slice(0, 3)], [slice(0, 1), slice(1, 2), slice(2, 3)]):
        own = Columns(layout, 4)
        out = np.empty((3, N, H), np.float32)
        table = np.array([[*source.addresses, 5, 0, *own.addresses, 4, 0, i] for i in range(3)], np.int64)
        for group in groups:
            part = np.empty_like(out[group])
            attend(
                q[group],
                (k[group], v[group]),
                table[group],
                2,
                layout,
                part,
                reads_source=True,
                scale=1.0,
                softcap=None,
            )
            out[group] = part
        found.append(out)
    assert np.array_equal(*found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_copied_row_has_the_tokens_that_were_used(dtype):
    layout = Layout(N_LAYERS, K, H, dtype)
    (one, *_), (other, *_) = filled(layout, 6, 0, 1), filled(layout, 6, 0, 2)
    before = other.data.copy(), other.scales.copy()
    other.copy_from(one, 4)

    def parts(data: np.ndarray) -> list[np.ndarray]:
        keys = data[:, 0].reshape(N_LAYERS, K, H, 6)
        values = data[:, 1].reshape(N_LAYERS, K, 6, H).swapaxes(2, 3)
        return [keys, values]

    for mine, theirs, old in zip(parts(other.data), parts(one.data), parts(before[0]), strict=True):
        assert np.array_equal(mine[..., :4], theirs[..., :4])
        assert np.array_equal(mine[..., 4:], old[..., 4:])
    if dtype == "int8":
        shape = (N_LAYERS, 2, K, 6)
        mine, theirs, old = (x.reshape(shape) for x in (other.scales, one.scales, before[1]))
        assert np.array_equal(mine[..., :4], theirs[..., :4])
        assert np.array_equal(mine[..., 4:], old[..., 4:])


def test_bfloat16_is_rounded_to_nearest_even():
    """As torch does it, in the kernel that stores new tokens; also halves, negative and large numbers."""
    layout = Layout(1, 1, 8, "bfloat16")
    own = Columns(layout, 1)
    x = torch.tensor([[[1.0, 1.00390625, 1.01171875, -1.00390625, 3e38, 1e-30, 0.1, -0.0]]])
    table = np.array([[0, 0, 0, 0, *own.addresses, 1, 0, 0]], np.int64)
    q = np.zeros((1, 1, 8), np.float32)
    attend(
        q,
        (x.numpy(), x.numpy()),
        table,
        0,
        layout,
        np.empty_like(q),
        reads_source=False,
        scale=1.0,
        softcap=None,
    )
    for stored in own.data[0]:
        assert torch.equal(
            torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16), x.flatten().bfloat16()
        )


@pytest.mark.parametrize(("dtype", "n_bytes"), [("float32", 40), ("bfloat16", 20), ("int8", 14)])
def test_memory_of_a_token(dtype, n_bytes):
    layout = Layout(N_LAYERS, K, H, dtype)
    assert layout.bytes_per_column == 2 * N_LAYERS * K * n_bytes
    assert Columns(layout, 7).n_bytes == 7 * layout.bytes_per_column


def test_threads_are_limited_and_given_back():
    before = numba.get_num_threads()
    with ragged.limited_threads(1):
        assert numba.get_num_threads() == 1
    with ragged.limited_threads(None):
        assert numba.get_num_threads() == before
    with ragged.limited_threads(10_000):
        assert numba.get_num_threads() == before
    assert numba.get_num_threads() == before
