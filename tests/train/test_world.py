import pytest
import torch

from tests.train.ranks import on_ranks
from tests.train.tiny_run import settings
from twofold.train.world import ONE_PROCESS, OtherRankError, World, device_of, is_lost_rank, start_world


def test_streams_are_dealt_out_in_turn():
    assert ONE_PROCESS.streams(3) == (0, 1, 2)
    assert World(rank=1, size=2).streams(6) == (1, 3, 5)


def test_batches_that_cannot_be_shared_are_refused():
    World(size=3).check_batches(6)
    with pytest.raises(ValueError, match=r"to 3 ranks equally; set it to a multiple of 3 \(such as 6\)"):
        World(size=3).check_batches(4)


def agreed():
    with start_world(settings(accumulate_batches=3)) as world:
        return (
            world.gather(world.rank * 10),
            world.any(world.rank == 2, False),
            world.sum_(torch.tensor([1.0, world.rank])).tolist(),
            world.from_main(lambda: f"from {world.rank}"),
            world.replicas,
        )


def test_what_ranks_agree_on():
    assert on_ranks(agreed, 3) == [([0, 10, 20], [True, False], [3.0, 3.0], "from 0", 1)] * 3


def main_fails():
    with start_world(settings(accumulate_batches=2)) as world:
        world.from_main(lambda: {}["nothing"])


def test_where_rank_0_fails_it_has_the_error_and_the_others_know():
    main, other = on_ranks(main_fails, 2)
    assert isinstance(main, KeyError)
    assert isinstance(other, OtherRankError)
    assert str(other) == "rank 1 stopped because rank 0 failed"


def test_one_process_needs_no_group():
    with start_world(settings()) as world:
        assert not torch.distributed.is_initialized()
        assert (world.size, world.is_main, world.gather(1), world.from_main(lambda: 2)) == (1, True, [1], 2)


def test_devices_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of(settings(device="auto"), 1) == torch.device("cuda", 1)
    assert device_of(settings(device="cpu"), 5) == torch.device("cpu")
    with pytest.raises(ValueError, match="2 CUDA devices on this machine and a process number 3"):
        device_of(settings(device="auto"), 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="finds no CUDA device"):
        device_of(settings(device="cuda"))


def test_which_errors_are_of_a_lost_rank():
    assert is_lost_rank(torch.distributed.DistBackendError("x"))
    assert is_lost_rank(
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:1] Connection closed")
    )
    assert not is_lost_rank(RuntimeError("CUDA out of memory"))
    assert not is_lost_rank(ValueError("gloo/"))
