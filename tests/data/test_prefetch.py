import json
import threading

import pytest

from tests.data.test_loader import as_lists, loader
from twofold.data.prefetch import Prefetcher


def steps(made, num):
    return [[as_lists(batch) for batch in made.next_step()] for _ in range(num)]


def num_threads():
    return sum(thread.name == "twofold-prefetch" for thread in threading.enumerate())


def test_the_same_steps_and_the_state_of_what_was_taken(tokenizer):
    plain = loader(tokenizer, num_streams=2)
    with Prefetcher(loader(tokenizer, num_streams=2)) as ahead:
        for _ in range(6):
            assert ahead.state_dict() == plain.state_dict()
            assert steps(ahead, 1) == steps(plain, 1)
        state = json.loads(json.dumps(ahead.state_dict()))
        rest = steps(ahead, 3)
        ahead.load_state_dict(state)
        assert steps(ahead, 3) == rest
    with Prefetcher(loader(tokenizer, num_streams=2)) as other:
        other.load_state_dict(state)
        assert steps(other, 3) == rest


def test_errors_surface_and_stay(tokenizer):
    class Broken:
        num_streams = 1
        taken = 0

        def next_step(self):
            self.taken += 1
            if self.taken == 3:
                raise ValueError("the third is bad")
            return [self.taken]

        def state_dict(self):
            return {"taken": self.taken}

    with Prefetcher(Broken()) as ahead:
        assert [ahead.next_step(), ahead.next_step()] == [[1], [2]]
        for _ in range(2):
            with pytest.raises(ValueError, match="the third is bad"):
                ahead.next_step()
        assert ahead.state_dict() == {"taken": 2}


def test_closing_ends_the_thread(tokenizer):
    before = num_threads()
    ahead = Prefetcher(loader(tokenizer))
    ahead.next_step()
    assert num_threads() == before + 1
    ahead.close()
    assert num_threads() == before
    with pytest.raises(RuntimeError, match="closed"):
        ahead.next_step()
    Prefetcher(loader(tokenizer)).close()


def test_one_pass_beside_the_thread(tokenizer):
    with Prefetcher(loader(tokenizer)) as ahead:
        ahead.next_step()
        assert [as_lists(b) for b in ahead.one_pass()] == [as_lists(b) for b in loader(tokenizer).one_pass()]
