"""Beam search against plain loops over whole forward passes, all sequences there are, and transformers."""

from itertools import product

import pytest
import torch

from tests.models.families.test_t5gemma import ours_of, reference
from tests.models.tiny import MEETINGS, build, gemma_stack, meeting_id, pair_config, stack
from twofold.infer import Engine, Request, Sampling
from twofold.infer.beams import Beams
from twofold.infer.prepare import prepare

SOURCE, PREFIX = (5, 6, 7, 8), (2,)


@torch.no_grad()
def logprobs_after(model, source, ids):
    ids = torch.tensor([ids])
    logits = model(torch.tensor([source]), None, ids, torch.ones_like(ids)).logits  # 0 is no padding here
    return logits[0, -1].log_softmax(-1).tolist()


def naive_beams(model, source, prefix, n_beams, max_new, stops, penalty):
    """Finished texts with their scores, best first, without early stopping."""
    beams, finished = [((), 0.0)], []
    for length in range(1, max_new + 1):
        extended = []
        for ids, total in beams:
            after = logprobs_after(model, source, [*prefix, *ids])
            extended += [((*ids, token), total + logprob) for token, logprob in enumerate(after)]
        extended.sort(key=lambda beam: -beam[1])
        is_last = length == max_new
        finished += [
            (ids, total / length**penalty) for ids, total in extended[:n_beams] if is_last or ids[-1] in stops
        ]
        beams = [beam for beam in extended if beam[0][-1] not in stops][:n_beams]
    return sorted(finished, key=lambda beam: -beam[1])[:n_beams]


def searched(engine, n_beams, max_new, stops, penalty, **options):
    options = {"source_ids": SOURCE, "prefix_ids": PREFIX, "n": n_beams, "early_stopping": "never"} | options
    request = Request(
        num_beams=n_beams, max_new_tokens=max_new, stop_token_ids=stops, length_penalty=penalty, **options
    )
    return engine.submit(request)


@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
def test_beams_equal_a_plain_loop(meeting):
    """Beyond the windows of 3, with stop tokens that end some beams early, beside another request."""
    model = build(pair_config(gemma_stack(), **meeting), qk_factor=2.0)
    engine = Engine(model, device="cpu", batch_size=9)
    stops = tuple(range(3, 9))
    engine.submit(Request(source_ids=(9,), prefix_ids=(2, 4), max_new_tokens=20, stop_token_ids=()))
    handles = {p: searched(engine, 4, 7, stops, p) for p in (0.0, 2.0)}
    for penalty, handle in handles.items():
        expected = naive_beams(model, SOURCE, PREFIX, 4, 7, stops, penalty)
        found = handle.result()
        assert [c.token_ids for c in found] == [ids for ids, _ in expected]
        assert [c.score for c in found] == pytest.approx([score for _, score in expected], abs=1e-4)
        for completion in found:
            assert completion.finish_reason == ("stop" if completion.token_ids[-1] in stops else "length")
    assert engine.loop.is_idle or engine.loop.scheduler.n_running == 1


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
def test_enough_beams_find_the_best_of_all_sequences(penalty):
    model = build(pair_config(stack(vocab_size=5), eos_token_ids=(1,)), seed=3)
    source, max_new = (3, 4, 3), 4
    totals = {}
    for ids in product(range(5), repeat=max_new):
        ids = ids[: ids.index(1) + 1] if 1 in ids else ids
        if ids not in totals:
            steps = (logprobs_after(model, source, [2, *ids[:i]])[token] for i, token in enumerate(ids))
            totals[ids] = sum(steps) / len(ids) ** penalty
    best = sorted(totals, key=lambda ids: -totals[ids])[:6]
    engine = Engine(model, device="cpu", batch_size=600)
    found = searched(engine, 600, max_new, (1,), penalty, source_ids=source, n=6).result()
    assert [c.token_ids for c in found] == best
    assert [c.score for c in found] == pytest.approx([totals[ids] for ids in best], abs=1e-4)
    assert engine.loop.scheduler.used_bytes == 0


@torch.no_grad()
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("penalty", [0.5, 1.0, 2.0])
def test_beams_equal_those_of_transformers(early_stopping, penalty):
    """Sources within the window, where their encoder and ours see the same."""
    theirs = reference("balanced")
    engine = Engine(ours_of(theirs), device="cpu")
    stops = list(range(20, 26))
    for source in ([5, 6, 7, 8], [30, 3, 9], [11]):
        expected = theirs.generate(
            torch.tensor([source]),
            decoder_input_ids=torch.tensor([[2]]),
            num_beams=4,
            num_return_sequences=4,
            max_new_tokens=10,
            length_penalty=penalty,
            early_stopping=early_stopping,
            eos_token_id=stops,
            pad_token_id=0,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        options = {"source_ids": source, "early_stopping": early_stopping}
        found = searched(engine, 4, 10, stops, penalty, **options).result()
        for completion, ids, score in zip(
            found, expected.sequences.tolist(), expected.sequences_scores.tolist(), strict=True
        ):
            n_new = len(completion.token_ids)
            assert list(completion.token_ids) == ids[1 : 1 + n_new]
            assert set(ids[1 + n_new :]) <= {0, stops[0]}  # filled up
            assert completion.score == pytest.approx(score, abs=1e-4)


def test_greedy_is_one_beam():
    """And early stopping ends the search early."""
    model = build(pair_config(stack()))
    engine = Engine(model, device="cpu")
    request = {
        "source_ids": SOURCE,
        "prefix_ids": PREFIX,
        "max_new_tokens": 30,
        "stop_token_ids": range(3, 30),
    }
    steps = []
    for early_stopping in (True, "never"):
        handle = engine.submit(Request(**request, num_beams=3, early_stopping=early_stopping))
        n_steps = 0
        while not handle.is_done:
            engine.loop.step()
            n_steps += 1
        steps.append(n_steps)
    assert steps[0] < steps[1]
    best = engine.submit(Request(**request)).result()[0]
    assert best == engine.submit(Request(**request, num_beams=1, sampling=Sampling(seed=4))).result()[0]


def test_a_stop_string_ends_a_beam(text_model):
    """Every text that goes on has no stop string in it, and one that stopped ends before it."""
    engine = Engine(text_model(), device="cpu")
    free = engine.submit(Request(prompt="hello", num_beams=3, n=3, max_new_tokens=8)).result()
    stop = free[0].text[2:4]
    assert len(stop) == 2
    found = engine.submit(Request(prompt="hello", num_beams=3, n=3, max_new_tokens=8, stop=stop)).result()
    for completion in found:
        whole = engine.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert completion.text == whole.split(stop)[0]
    assert any(completion.text == free[0].text[:2] for completion in found)
    assert engine.loop.scheduler.used_bytes == 0


def beams_after(*steps: list[list[float]], **options) -> tuple[Beams, list[bool]]:
    """Two beams over 6 tokens, of which 1 ends unless told otherwise, fed with probabilities row by row; and after
    which steps they go on."""
    options = {"stop_token_ids": (1,)} | options
    request = Request(source_ids=(3,), prefix_ids=(2,), num_beams=2, n=2, **options)
    beams = Beams(prepare(request, pair_config(stack(vocab_size=6)), None))
    return beams, [bool(beams.advance(torch.tensor(step).log()).rows) for step in steps]


def test_a_beam_that_ends_counts_only_among_the_best():
    """Tokens 1 and 3 end, first and third in the first step: the third is too late for two beams, though it would
    be second in the end."""
    first, uniform = [[0.02, 0.4, 0.02, 0.2, 0.3, 0.06]], [[1 / 6] * 6] * 2
    beams, _ = beams_after(first, uniform, max_new_tokens=2, length_penalty=0.0, stop_token_ids=(1, 3))
    assert [c.token_ids[0] for c in beams.completions()] == [1, 4]


@pytest.mark.parametrize(("early_stopping", "goes_on"), [(True, False), (False, False), ("never", True)])
def test_when_no_open_beam_is_good_enough(early_stopping, goes_on):
    """Two have ended at -0.65 and -0.92; the best open one stands at -5.1 / 2, and at -5.1 / 20 it would win."""
    first = [[0.1, 0.4, 0.05, 0.05, 0.3, 0.1]]
    second = [[0.02, 0.9, 0.02, 0.02, 0.02, 0.02], [0.02, 0.9, 0.02, 0.02, 0.02, 0.02]]
    _, going = beams_after(first, second, max_new_tokens=20, early_stopping=early_stopping)
    assert going == [True, goes_on]


@pytest.mark.parametrize(("early_stopping", "goes_on"), [(True, False), (False, True), ("never", True)])
def test_when_an_open_beam_is_better(early_stopping, goes_on):
    """Two have ended at -0.92 and -1.12; the best open one stands at -0.80 / 2."""
    first = [[0.01, 0.4, 0.01, 0.01, 0.56, 0.01]]
    second = [[0.01, 0.19, 0.0, 0.0, 0.8, 0.0], [0.02, 0.9, 0.02, 0.02, 0.02, 0.02]]
    _, going = beams_after(first, second, max_new_tokens=20, early_stopping=early_stopping)
    assert going == [True, goes_on]


def test_only_the_best_finished_beams_are_remembered():
    """Three have ended, and the third no longer keeps the search alive."""
    first = [[0.01, 0.5, 0.01, 0.01, 0.46, 0.01]]
    second = [[0.02, 0.9, 0.02, 0.02, 0.02, 0.02], [0.01, 0.95, 0.01, 0.01, 0.01, 0.01]]
    beams, going = beams_after(first, second, max_new_tokens=20)
    assert going == [True, False]
    assert len(beams._finished) == 2
