"""The scheduler without a model: jobs are numbers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.infer.scheduler import Job, Scheduler


def job(n_bytes: int = 1, n_rows: int = 1, n_source: int = 1, priority: int = 0) -> Job:
    return Job(n_bytes=n_bytes, n_rows=n_rows, n_source=n_source, priority=priority)


def scheduler(**changes: int) -> Scheduler:
    return Scheduler(**({"max_bytes": 100, "max_rows": 8, "max_encode_tokens": 1000} | changes))


def submitted(s: Scheduler, *jobs: Job) -> list[Job]:
    for j in jobs:
        s.submit(j)
    return list(jobs)


def test_priority_then_arrival():
    s = scheduler(max_rows=1)
    a, b, c, d = submitted(s, job(), job(priority=1), job(), job(priority=1))
    order = []
    while group := s.admit():
        order += group
        s.leave(group[0])
    assert order == [b, d, a, c]


def test_admission_is_bounded_by_bytes_and_rows():
    s = scheduler(max_bytes=10, max_rows=4)
    a, b, c, d = submitted(s, job(4), job(4), job(4), job(2))
    assert s.admit() == [a, b, d]  # c would make 12 bytes
    assert (s.used_bytes, s.used_rows) == (10, 3)
    s.leave(a)
    assert s.admit() == [c]
    e, f = submitted(s, job(0, n_rows=2), job(0))
    assert s.admit() == [f]  # 3 rows run, e would make 5
    s.leave(b)
    assert s.admit() == []
    s.leave(d)
    assert s.admit() == [e]


def test_what_never_fits_is_refused():
    s = scheduler()
    with pytest.raises(ValueError, match="needs 101 bytes of keys and values, the engine keeps at most 100"):
        s.submit(job(101))
    with pytest.raises(ValueError, match=r"needs 9 rows .* at most 8 together; .* batch_size"):
        s.submit(job(n_rows=9))
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        scheduler(max_rows=0)
    assert s.n_waiting == 0


def test_a_group_has_similar_lengths_within_the_padded_budget():
    s = scheduler(max_encode_tokens=60)
    a, long, b, c = submitted(s, *(job(n_source=n) for n in (20, 50, 18, 15)))
    assert s.admit() == [c, b, a]  # 3 x 20; sorted by length
    assert s.admit() == [long]
    (huge,) = submitted(s, job(n_source=500))
    assert s.admit() == [huge]  # longer than the budget: alone


def test_a_large_job_is_not_overtaken_forever():
    """Small jobs keep coming and would always fit; the large one needs all the space."""
    s = scheduler(max_bytes=10, max_overtaken=5)
    running = submitted(s, job(5))
    assert s.admit() == running
    (large,) = submitted(s, job(10))
    n_passed = 0
    for _ in range(20):
        submitted(s, job(5))
        group = s.admit()
        if large in group:
            break
        n_passed += len(group)
        running += group
        s.leave(running.pop(0))
    else:
        pytest.fail("the large job starved")
    assert n_passed == 5


def test_a_low_priority_is_not_overtaken_forever():
    s = scheduler(max_rows=1, max_overtaken=3)
    (low,) = submitted(s, job(priority=-5))
    admitted = []
    for _ in range(6):
        submitted(s, job(priority=5))
        (chosen,) = s.admit()
        admitted.append(chosen)
        s.leave(chosen)
    assert admitted.index(low) == 3


def test_an_odd_length_is_not_overtaken_forever():
    s = scheduler(max_encode_tokens=10)
    submitted(s, job(n_source=5), job(n_source=9))
    for _ in range(4):
        submitted(s, job(n_source=5))
    lengths = []
    while group := s.admit():
        lengths.append([j.n_source for j in group])
        for j in group:
            s.leave(j)
    assert lengths[:2] == [[5, 5], [9]]


def test_rows_that_end_make_room():
    s = scheduler(max_rows=4)
    (best_of_four,) = submitted(s, job(50, n_rows=4))
    assert s.admit() == [best_of_four]
    (next_one,) = submitted(s, job(60))
    assert s.admit() == []
    s.shrink(best_of_four, n_rows=1, n_bytes=30)
    assert s.admit() == [next_one]
    s.leave(best_of_four)
    s.leave(next_one)
    assert (s.used_bytes, s.used_rows, s.n_waiting, s.n_running) == (0, 0, 0, 0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_accounts_are_right_at_every_moment_and_end_at_zero(data):
    """Random arrivals, ends, shrinking rows and cancelled jobs; at the end everything has run."""
    s = scheduler(max_bytes=50, max_rows=6, max_encode_tokens=40, max_overtaken=4)
    waiting: set[Job] = set()
    running: set[Job] = set()

    def one_of(jobs: set[Job]) -> Job:
        return data.draw(st.sampled_from(sorted(jobs, key=lambda j: j.arrival)))

    def admit() -> None:
        group = s.admit()
        assert len(set(group)) == len(group)
        assert set(group) <= waiting
        waiting.difference_update(group)
        running.update(group)

    for _ in range(data.draw(st.integers(0, 60))):
        action = data.draw(st.sampled_from(["submit", "submit", "admit", "end", "cancel", "shrink"]))
        if action == "submit":
            sizes = (st.integers(0, 50), st.integers(1, 6), st.integers(0, 60), st.integers(-1, 1))
            waiting.update(submitted(s, job(*(data.draw(size) for size in sizes))))
        elif action == "admit":
            admit()
        elif action == "cancel" and waiting:
            s.leave(cancelled := one_of(waiting))
            waiting.remove(cancelled)
        elif action == "shrink" and running:
            chosen = one_of(running)
            n_rows = data.draw(st.integers(1, chosen.n_rows))
            s.shrink(chosen, n_rows=n_rows, n_bytes=data.draw(st.integers(0, chosen.n_bytes)))
        elif action == "end" and running:
            s.leave(ended := one_of(running))
            running.remove(ended)
        assert s.used_bytes == sum(j.n_bytes for j in running) <= s.max_bytes
        assert s.used_rows == sum(j.n_rows for j in running) <= s.max_rows
        assert (s.n_waiting, s.n_running) == (len(waiting), len(running))
    while waiting or running:
        for ended in running:
            s.leave(ended)
        running.clear()
        admit()
        assert running or not waiting
    assert (s.used_bytes, s.used_rows, s.n_waiting, s.n_running) == (0, 0, 0, 0)
