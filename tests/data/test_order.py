import numpy as np
import pytest

from twofold.data.order import keys_for, mix, permute


def order(size, seed=0, epoch=0):
    return permute(np.arange(size), size, keys_for(seed, np.full(size, epoch)))


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 255, 256, 257, 1000, 4097])
def test_it_is_a_bijection(size):
    for epoch in range(3):
        assert sorted(order(size, epoch=epoch).tolist()) == list(range(size))


def test_a_part_is_computed_without_the_rest():
    assert (
        permute(np.asarray([7, 900]), 1000, keys_for(0, np.zeros(2, int))).tolist()
        == order(1000)[[7, 900]].tolist()
    )
    huge = permute(np.arange(10**12, 10**12 + 5), 10**13, keys_for(0, np.zeros(5, int)))
    assert len(set(huge.tolist())) == 5
    assert huge.min() >= 0
    assert huge.max() < 10**13


def test_seeds_and_epochs_give_other_orders():
    orders = {tuple(order(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert tuple(range(50)) not in orders


def test_keys_of_different_epochs_may_stand_side_by_side():
    keys = keys_for(3, np.asarray([0, 1, 0, 1]))
    both = permute(np.asarray([4, 4, 5, 5]), 20, keys)
    assert both[::2].tolist() == order(20, 3, 0)[[4, 5]].tolist()
    assert both[1::2].tolist() == order(20, 3, 1)[[4, 5]].tolist()


def test_it_looks_random():
    # Of a uniform permutation of 4096, neighbours are 1365 apart on average (n / 3), and one position stays.
    moved = order(4096)
    assert 1300 < np.abs(np.diff(moved)).mean() < 1430
    assert (moved == np.arange(4096)).sum() < 8
    assert abs(np.corrcoef(moved, np.arange(4096))[0, 1]) < 0.05


def test_mix_is_splitmix64():
    # First output of SplitMix64 with seed 0 (the generator of Java 8 and xoshiro's reference).
    assert int(mix(np.asarray([0x9E3779B97F4A7C15], np.uint64))[0]) == 0xE220A8397B1DCDAF
