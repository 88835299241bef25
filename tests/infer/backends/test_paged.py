"""What is special about steps over pages: shapes, memory, isolation; and graphs where there is a device."""

import random

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.infer.backends.test_backends import SOURCES, paged, start, whole_logits
from tests.infer.test_engine import alone, assert_empty, ids_request, random_request, run_with_arrivals
from tests.models.tiny import MEETINGS, assert_same, build, gemma_stack, meeting_id, pair_config, stack
from twofold.infer import Engine
from twofold.infer.backends import PagedBackend, TorchBackend
from twofold.infer.backends import choose as choose_module
from twofold.infer.backends.paged import Step
from twofold.infer.backends.pages import EMPTY, SCRATCH

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def with_pages(model, backend=None, **options) -> Engine:
    engine = Engine(model, device="cpu", backend="torch", **options)
    engine.loop.backend = backend or paged(model)
    return engine


@pytest.mark.parametrize("meeting", [MEETINGS[i] for i in (0, 5, 15)], ids=meeting_id)
def test_random_arrivals_change_nothing(meeting):
    masks = ("sink", "bidirectional", "causal")
    model = build(pair_config(gemma_stack(), encoder_mask=masks, **meeting), qk_factor=2.0)
    rng = random.Random(meeting_id(meeting))
    requests = [random_request(rng) for _ in range(12)]
    engine = with_pages(model, batch_size=5)
    handles = run_with_arrivals(engine, requests, rng)
    for handle, request in zip(handles, requests, strict=True):
        assert [(c.token_ids, c.finish_reason) for c in handle.result()] == alone(model, request)
    assert engine.loop.backend.pool.n_taken == 0


def test_beams_and_lookup_are_those_of_the_reference():
    model = build(pair_config(stack(), **MEETINGS[15]))
    rng = random.Random(0)
    sources = [[rng.randrange(3, 8) for _ in range(rng.randrange(1, 12))] for _ in range(10)]
    options = [{"num_beams": 4, "n": 2}, {"lookup": 3}]
    requests = [ids_request(source=source, **options[i % 2]) for i, source in enumerate(sources)]
    found, expected = (
        [handle.result() for handle in run_with_arrivals(engine, requests, random.Random(1))]
        for engine in (with_pages(model), with_pages(model, TorchBackend(model)))
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]


def test_ten_thousand_requests_leave_nothing():
    tiny = stack(num_hidden_layers=1, layer_types=("sliding_attention",))
    model = build(pair_config(tiny, layout="merged"))
    rng = random.Random(0)
    engine = with_pages(model, batch_size=64, cache_bytes=200_000)
    pool = engine.loop.backend.pool
    open_handles = []
    for i in range(10_000):
        request = random_request(rng)
        if rng.random() < 0.2:
            request = ids_request(
                source=[5] * rng.randrange(9), num_beams=3, max_new_tokens=rng.randrange(1, 9)
            )
        open_handles.append(engine.submit(request))
        if rng.random() < 0.1:
            rng.choice(open_handles).cancel()
        if i % 20 == 0:
            engine.loop.step()
            assert pool.n_taken * pool.page_bytes == engine.loop.held_bytes <= engine.cache_bytes
            open_handles = [handle for handle in open_handles if not handle.is_done]
    while engine.loop.step():
        pass
    assert_empty(engine)
    assert pool.n_taken == 0
    assert pool.n_pages * pool.page_bytes <= 2 * engine.cache_bytes


def test_memory_is_what_was_announced():
    backend = paged(build(pair_config(stack(), layout="merged")))
    page = 3 * 4 * 2 * 2 * 8 * 4
    for i, n_rows, n_verified, n_pages in ((0, 1, 0, 4), (1, 2, 0, 6), (2, 5, 0, 16), (3, 1, 4, 6)):
        asked = start(i, n_rows, n_verified)
        (held, _), *_ = backend.start([asked])
        assert held.n_bytes == backend.bytes_needed(asked) == n_pages * page


def test_what_is_not_finite_stays_with_its_request():
    """A token whose keys overflow leaves its pages to another request."""
    model = build(pair_config(stack(), layout="merged"))
    backend = paged(model)
    model.decoder.embed_tokens.weight.data[39] = torch.nan  # the head's too: the last logit is never a number
    (bad, _), (good, _) = backend.start([start(0), start(2)])
    ids = [22, 23, 24, 25, 26]
    for token in range(5, 11):
        ids.append(token)
        logits = backend.step([bad, good], [[39], [token]])
        assert torch.isnan(logits[0]).all()
        assert_same(logits[1][0, :-1], whole_logits(model, SOURCES[2], ids)[:-1])
    n_pages = backend.pool.n_pages
    del bad
    (other, _), *_ = backend.start([start(0)])
    assert backend.pool.n_pages == n_pages
    assert_same(backend.step([other], [[6]])[0][0, :-1], whole_logits(model, SOURCES[0], [2, 6])[:-1])


@pytest.mark.parametrize("n_tokens", [1, 2])
def test_what_failed_can_be_repeated(n_tokens, monkeypatch):
    model = build(pair_config(stack()))
    backend = paged(model)
    (held, _), *_ = backend.start([start(0, n_verified=3)])
    backend.step([held], [[5]])
    for n in range(2, 6):  # over the edge of a page
        with monkeypatch.context() as patch:
            patch.setattr(model.lm_head, "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                backend.step([held], [[9]]) if n_tokens == 1 else backend.verify(held, [8, 9])
        ids = [2, 5, *range(6, 4 + n)]
        assert_same(backend.step([held], [[4 + n]])[0][0], whole_logits(model, SOURCES[0], [*ids, 4 + n]))


def test_bfloat16_is_near():
    model = build(pair_config(stack())).to(torch.bfloat16)
    logits = []
    for backend in (paged(model), TorchBackend(model)):
        started = backend.start([start(0, n_rows=2), start(2)])
        logits.append(backend.step([held for held, _ in started], [[5, 6], [7]]))
    assert backend.start([start(0)])[0][0].layers[0].own.keys.dtype == torch.bfloat16
    for ours, theirs in zip(*logits, strict=True):
        assert_same(ours, theirs, tolerance=0.05)


def test_padding_rows_write_where_nobody_reads():
    """A row without a source reads the empty page, whose value is 0."""
    model = build(pair_config(stack()))
    backend = paged(model)
    held = [held for held, _ in backend.start([start(i) for i in (0, 1, 2)])]
    for tokens in ([5], [6]):
        backend.step(held, [tokens] * 3)  # and one of padding
    assert not any(layer[:, :, EMPTY].any() for layer in backend.pool.layers)
    assert all(layer[:, :, SCRATCH].any() for layer in backend.pool.layers)
    expected = whole_logits(model, SOURCES[1], [2, 20, 21, 5, 6, 7])
    assert_same(backend.step(held, [[7]] * 3)[1][0], expected)


class NothingFromPython(TorchFunctionMode):
    """Refuses tensors made from Python data, which lie on the host first."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy), func
        return func(*args, **(kwargs or {}))


class OnDevice(TorchDispatchMode):
    """Refuses tensors from elsewhere, and values that Python asks for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero"), name
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            assert not isinstance(x, torch.Tensor) or x.device.type == "meta", name
        return out


@torch.no_grad()
@pytest.mark.parametrize("meeting", [MEETINGS[0], MEETINGS[15]], ids=meeting_id)
def test_a_step_never_leaves_the_device(meeting):
    """A CUDA graph could not hold it."""
    model = build(pair_config(gemma_stack(), eoi_token_id=39, **meeting)).to("meta")
    step = Step(model, PagedBackend(model).pool)
    with NothingFromPython(), OnDevice():
        shapes = ((4, 3), (4, 2), (4, 8))
        logits_BV = step(*(torch.zeros(size, dtype=torch.int64, device="meta") for size in shapes))
    assert logits_BV.shape == (4, 40)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_a_model_on_cuda_gets(precision):
    """Made here on the CPU: in its dtype, with no more pages than the engine will fill."""
    model = build(pair_config(stack()))
    backend = choose_module._cuda(model, precision, 10**7)
    assert isinstance(backend, PagedBackend)
    assert {layer.dtype for layer in backend.pool.layers} == {getattr(torch, precision)}
    assert model.lm_head.out_proj.weight.dtype == getattr(torch, precision)
    for _ in range(20):
        backend.pool.take(backend.pool.n_pages // 4)
        if backend.pool.n_taken * backend.pool.page_bytes > 6_000_000:
            break
    assert 9_900_000 < backend.pool.n_pages * backend.pool.page_bytes <= 10**7


@pytest.mark.slow
def test_compiled_steps_are_the_same():
    """Rows and pages of several shapes go through few compilations."""
    one_layer = gemma_stack(num_hidden_layers=1, layer_types=("sliding_attention",))
    model = build(pair_config(one_layer, **MEETINGS[15]), qk_factor=2.0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    logits = []
    for backend in (PagedBackend(model, page_tokens=4, compiles=True), TorchBackend(model)):
        held = [held for held, _ in backend.start([start(i, n_new=14) for i in range(4)])]
        groups = [[0], [1], [0, 1], [0, 1, 2], [3], [3, 2], [0, 1, 2, 3], *[[3]] * 9]
        logits.append([backend.step([held[i] for i in group], [[9]] * len(group)) for group in groups])
    for ours, theirs in zip(*logits, strict=True):
        assert_same(torch.cat(ours), torch.cat(theirs))
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5


@pytest.mark.cuda
@needs_cuda
class TestGraphs:
    @pytest.mark.parametrize("meeting", [MEETINGS[0], MEETINGS[15]], ids=meeting_id)
    def test_equal_the_eager_reference_in_every_bucket(self, meeting):
        model = build(pair_config(gemma_stack(), **meeting), qk_factor=2.0).cuda()
        for n_rows in range(1, 18):
            ours, theirs = paged(model), TorchBackend(model)
            started = [backend.start([start(0, n_rows), start(2)]) for backend in (ours, theirs)]
            for i in range(6):
                tokens = [[5 + (i + row) % 30 for row in range(n_rows)], [7 + i]]
                found, expected = (
                    backend.step([held for held, _ in of_backend], tokens)
                    for backend, of_backend in zip((ours, theirs), started, strict=True)
                )
                for a, b in zip(found, expected, strict=True):
                    assert_same(a, b, tolerance=1e-4)

    def test_a_thousand_steps_allocate_nothing(self):
        model = build(pair_config(stack(max_position_embeddings=2048), layout="merged")).cuda()
        backend = PagedBackend(model, cache_bytes=10**7)
        (held, _), *_ = backend.start([start(0, n_new=1400)])
        for _ in range(1030 - 1):  # tables of 64 pages from here on
            backend.step([held], [[5]])
        torch.cuda.synchronize()
        before = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
        n_graphs = len(backend._graphs)
        for _ in range(1000):
            backend.step([held], [[5]])
            held.n_tokens = max(1030, held.n_tokens % 1300)
        torch.cuda.synchronize()
        assert (torch.cuda.memory_reserved(), torch.cuda.memory_allocated()) == before
        assert len(backend._graphs) == n_graphs

    def test_graphs_follow_a_pool_that_grows(self):
        model = build(pair_config(stack())).cuda()
        ours, theirs = paged(model), TorchBackend(model)
        for i in range(4):
            started = [backend.start([start(i)]) for backend in (ours, theirs)]
            found, expected = (
                backend.step([of_backend[0][0]], [[9]])
                for backend, of_backend in zip((ours, theirs), started, strict=True)
            )
            assert_same(found[0], expected[0], tolerance=1e-4)
            ours.pool.take(10)
