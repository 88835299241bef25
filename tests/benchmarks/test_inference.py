"""What the inference benchmark relies on: fair loads, exact checks, figures that follow from runs, resumed results."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def call(monkeypatch, *arguments):
    """The command in this process."""
    import inference

    monkeypatch.setattr(sys, "argv", ["inference.py", *map(str, arguments)])
    inference.main()


class TestCases:
    def test_loads_are_the_same_for_everybody(self):
        from inference_cases import Load

        load = Load(rate=2.0, requests=2000)
        found = load.arrivals()
        assert found == load.arrivals() != load.arrivals(seed=1)
        assert [one.at_s for one in found] == sorted(one.at_s for one in found)
        assert found[-1].at_s == pytest.approx(1000, rel=0.1)
        for values, low, high in (([o.source for o in found], 32, 1024), ([o.new for o in found], 8, 128)):
            assert (min(values), max(values)) == (low, high)
            # Log-uniform: half of them lie below the geometric mean.
            middle = (low * high) ** 0.5
            assert sum(v < middle for v in values) / len(values) == pytest.approx(0.5, abs=0.04)

    def test_what_a_step_reads(self):
        from inference_cases import TINY, decode_reads
        from training_cases import t5gemma_config

        # D 128, F 256, 4 heads and 2 key-value heads of 32, 2 layers, 1000 words.
        own = 128 * 128 + 2 * 128 * 64 + 128 * 128  # q, k and v, o
        cross = 128 * 128 + 128 * 128  # q, o
        layer = own + cross + 3 * 128 * 256 + 6 * 128  # the MLP, norms
        found = decode_reads(t5gemma_config(TINY, 1000))
        assert found == {"weights": 2 * layer + 128 + 1000 * 128, "keys_per_token": 2 * 2 * 2 * 32}

    def test_a_word_for_every_id(self):
        from inference_cases import numbered_tokenizer

        tokenizer = numbered_tokenizer(20)
        assert len(tokenizer) == 20
        assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4, 19]) == [
            "<pad>",
            "<bos>",
            "<eos>",
            "<unk>",
            "t4",
            "t19",
        ]

    def test_bandwidth_is_a_positive_number(self):
        from inference_cases import read_bandwidth

        assert read_bandwidth(1, 1 << 20) > 1e8


class TestFigures:
    def test_exact_answers(self):
        from inference_figures import DisagreementError, compare_exact

        theirs = {"tokens": [[1, 2, 3]], "top": [[(-1.0, -2.0), (-1.0, -1.0005), (-1.0, -9.0)]]}
        assert compare_exact(theirs, theirs) == {"equal_tokens": 3, "near_ties": 0, "largest_difference": 0.0}
        tied = {"tokens": [[1, 9, 7]], "top": [[(-1.0005, -2.0), (-1.0, -1.0), (-3.0, -4.0)]]}
        found = compare_exact(tied, theirs)
        assert (found["equal_tokens"], found["near_ties"]) == (1, 1)
        assert found["largest_difference"] == pytest.approx(5e-4)
        with pytest.raises(DisagreementError, match="row 0, token 0: ours writes 8, transformers 1"):
            compare_exact({"tokens": [[8, 2, 3]], "top": theirs["top"]}, theirs)
        with pytest.raises(DisagreementError, match=r"log-probabilities of row 0, token 2 differ by 0\.5"):
            compare_exact({"tokens": [[1, 2, 3]], "top": [[*theirs["top"][0][:2], (-1.5, -2.0)]]}, theirs)

    def test_agreement(self):
        from inference_figures import agreement

        assert agreement([[1, 2, 3], [4, 9, 6]], [[1, 2, 3], [4, 5, 6]]) == pytest.approx(4 / 6)

    def test_a_loads_figures(self):
        from inference_cases import Arrival
        from inference_figures import load_summary

        found = load_summary([Arrival(1.0, 32, 10), Arrival(2.0, 32, 30)], [3.0, 5.0])
        assert found == pytest.approx(
            {"requests_per_s": 0.5, "tokens_per_s": 10.0, "latency_p50_s": 2.5, "latency_p95_s": 2.95}
        )

    def test_metrics_of_runs(self):
        from inference_figures import metrics

        def entry(*rates, first=0.5, **more):
            runs = [
                {
                    "first_s": first,
                    "total_s": first + 63 / rate,
                    "n_tokens": 64,
                    "n_tokens_at_first": 1,
                    "peak_bytes": 7,
                }
                for rate in rates
            ]
            return {"runs": runs, **more}

        entries = {
            "ours_int8": entry(10, 20, 90, cache_bytes=100),
            "ours_bfloat16": entry(30),
            "ours_float32": {"failed": "no memory"},
            "ctranslate2_int8": entry(16, first=1.0),
            "transformers_bfloat16": entry(5),
            "transformers_bfloat16_compiled": entry(6),
            "transformers_float32": entry(3),
        }
        case = {"model": "b_b_49k", "part": "speed", "rows": 1, "source": 512, "new": 64, "entries": entries}
        details = {
            "cases": {"one": case},
            "facts": {"b_b_49k": {"weights": 900, "keys_per_token": 2}},
            "read_bytes_per_s": 40_000,
        }
        found, reasons = metrics(details)
        assert found["decode_b1_tokens_per_s_ours_int8"] == pytest.approx(20)
        assert found["decode_b1_over_ctranslate2_int8"] == pytest.approx(20 / 16)
        assert found["first_token_over_ctranslate2_int8"] == pytest.approx(0.5)
        assert found["decode_b1_over_transformers_bf16"] == pytest.approx(
            30 / 6
        )  # over the faster of the two
        assert found["decode_b1_share_of_bandwidth"] == pytest.approx((900 + 100) * 20 / 40_000)
        # bfloat16: two bytes for each weight, and for each number kept of 512 + 32 tokens.
        expected = (1800 + 2 * 2 * (512 + 32)) * 30 / 40_000
        assert found["decode_b1_share_of_bandwidth_ours_bfloat16"] == pytest.approx(expected)
        assert found["decode_b1_over_transformers_fp32"] is None
        assert "ours_float32: no memory" in reasons["decode_b1_over_transformers_fp32"]
        assert "decode_b1_over_transformers_bf16" not in reasons
        assert (entries["ours_int8"]["summary"]["decode_tokens_per_s"]["max"]) == pytest.approx(90)

    def test_modes_are_compared_by_steps(self):
        from inference_figures import metrics

        def entry(steps_per_s, first_step_s):
            run = {"n_steps": 11, "first_step_s": first_step_s, "total_s": first_step_s + 10 / steps_per_s}
            return {"runs": [run]}

        entries = {
            "ours_float32 greedy": entry(10, 1.0), "ours_float32 beam4": entry(8, 0.2),
            "ours_float32 sampling": entry(9, 1.0), "ours_int8 greedy": entry(20, 1.0),
            "ours_int8 beam4": entry(14, 0.2), "ours_int8 sampling": {"failed": "no"},
        }  # fmt: skip
        case = {"model": "b_b_49k", "part": "modes", "rows": 8, "source": 512, "new": 64, "entries": entries}
        found, reasons = metrics({"cases": {"one": case}})
        assert found == pytest.approx(
            {
                "beam4_over_greedy": 0.7,
                "beam4_over_greedy_ours_float32": 0.8,
                "beam4_over_greedy_ours_int8": 0.7,
                "sampling_over_greedy": 0.9,
                "sampling_over_greedy_ours_float32": 0.9,
            }
        )
        assert reasons == {}


class TestServing:
    def test_batches_take_what_has_arrived(self):
        from inference_cases import Arrival
        from inference_contenders import serve_in_batches

        arrivals = [Arrival(at, 8, 2) for at in (0.0, 0.0, 0.0, 0.25)]
        batches = []

        def answer(batch, clock):
            batches.append(list(batch))
            return [clock()] * len(batch)

        done = serve_in_batches(arrivals, answer, most=2)
        assert batches == [[0, 1], [2], [3]]
        assert done == sorted(done)
        assert done[3] >= 0.25

    def test_ours_answers_every_request(self, tmp_path):
        import inference_cases
        from inference_contenders import SYSTEMS, Ours

        folders = inference_cases.prepare("tiny", tmp_path, for_ctranslate2=False)
        ours = Ours(folders.pair, SYSTEMS["ours_float32"], batch_size=2, threads=1)
        arrivals = [inference_cases.Arrival(0.0, 8, n) for n in (2, 3, 4)]
        done = ours.serve(arrivals, [[20 + i] * 8 for i in range(3)])
        assert all(one > 0 for one in done)
        assert done[0] <= done[1]
        assert ours.engine.loop.is_idle
        assert ours.cache_bytes(2, 10, 4) == 2 * 4 * (2 * 2 * 2 * 32) * (10 + 3)


class FakeWorker:
    """Answers with its system's name; short of memory where it is told to be."""

    short: set[str]
    started: list[str]

    def __init__(self, spec, _timeout_s):
        from inference_worker import Failed

        self.name = spec["system"]
        self.started.append(self.name)
        if self.name == "z":
            raise Failed("not here")

    def ask(self, command):
        from inference_worker import Failed, OutOfMemoryError

        if command["do"] == "fail":
            raise Failed("cannot")
        if self.name in self.short:
            self.short.discard(self.name)
            raise OutOfMemoryError("too much")
        return {"name": self.name}

    def close(self):
        pass


class TestWorkers:
    @pytest.fixture
    def workers(self, monkeypatch):
        from inference_worker import Workers

        monkeypatch.setattr(FakeWorker, "short", set(), raising=False)
        monkeypatch.setattr(FakeWorker, "started", [], raising=False)
        return Workers({name: {"system": name} for name in "abcz"}, FakeWorker, 1.0)

    def test_each_is_started_once(self, workers):
        assert [workers.ask(name, {"do": "run"})["name"] for name in "abab"] == list("abab")
        assert FakeWorker.started == ["a", "b"]

    def test_where_memory_is_short_one_runs_alone(self, workers):
        from inference_worker import Failed

        assert workers.warm("a", {"do": "warm"}) == {"name": "a"}
        assert workers.warm("a", {"do": "warm"}) == {}
        FakeWorker.short.add("b")
        assert workers.ask("b", {"do": "run"}) == {"name": "b"}
        assert FakeWorker.started == ["a", "b", "b"]
        assert workers.warm("a", {"do": "warm"}) == {"name": "a"}  # started anew, so warmed again
        workers.close()
        FakeWorker.short.add("c")
        with pytest.raises(Failed, match="out of memory: too much"):
            workers.ask("c", {"do": "run"})
        with pytest.raises(Failed, match="cannot"):
            workers.ask("c", {"do": "fail"})

    def test_what_cannot_start_is_not_started_again(self, workers):
        from inference_worker import Failed

        for _ in range(2):
            with pytest.raises(Failed, match="not here"):
                workers.ask("z", {"do": "run"})
        assert FakeWorker.started == ["z"]

    def test_a_process_of_its_own(self, tmp_path):
        import inference_cases
        from inference_worker import Apart, Failed

        folders = inference_cases.prepare("tiny", tmp_path, for_ctranslate2=False)
        spec = {
            "system": "ours_float32", "vocab_size": 4096, "pair": str(folders.pair), "ctranslate2": "", "donor": None,
            "threads": 1, "batch_size": 2,
        }  # fmt: skip
        worker = Apart(spec, 120.0)
        try:
            assert worker.ready["ready_bytes"] > 10**7
            run = {"do": "run", "rows": 2, "source": 8, "new": 3, "mode": "greedy", "seed": 0}
            answer = worker.ask(run)
            assert (answer["n_tokens"], answer["n_tokens_at_first"]) == (6, 2)
            assert 0 < answer["first_s"] < answer["total_s"]
            assert answer["peak_bytes"] > 10**7
            with pytest.raises(Failed, match="KeyError: 'unknown'"):
                worker.ask(run | {"mode": "unknown"})
        finally:
            worker.close()
        with pytest.raises(Failed, match="no such file or folder"):
            Apart(spec | {"pair": str(tmp_path / "nothing")}, 120.0)

    def test_memory_errors_are_told_apart(self):
        from inference_worker import failure

        text = (
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to\nmore"
        )
        assert failure(RuntimeError(text))["memory"]
        assert failure(MemoryError())["memory"]
        assert failure(ValueError("no")) == {"failed": "ValueError: no", "memory": False}


def test_options():
    import inference

    core = inference.parse_options(["--core"])
    assert (core.model, core.part, core.case, core.batch) == (
        ["b_b_49k"],
        ["speed"],
        [(512, 64)],
        [1, 8],
    )
    assert {"ours_int4", "ctranslate2_int8", "transformers_bfloat16_compiled"} <= set(core.system)
    assert "transformers_float32_compiled" not in core.system
    named = inference.parse_options(["--core", "--batch", "2", "--case", "9/3", "--system", "ours_int8"])
    assert (named.case, named.batch, named.system) == ([(9, 3)], [2], ["ours_int8"])
    everything = inference.parse_options([])
    assert everything.model == ["b_b_49k", "b_b_256k", "smollm2"]
    assert everything.case == [(512, 64), (2048, 128)]
    for wrong in (["--case", "512"], ["--runs", "-1"], ["--batch", "0"]):
        with pytest.raises(SystemExit):
            inference.parse_options(wrong)
    assert [inference.fits("ours_int8", m) for m in ("smollm2", "tiny")] == [True, True]
    assert [inference.fits("donor_float32", m) for m in ("smollm2", "tiny")] == [True, False]
    assert [inference.fits("ctranslate2_int8", m) for m in ("smollm2", "tiny")] == [False, True]


def test_quick_run_is_resumed(tmp_path, monkeypatch, capsys):
    """Ours and transformers in this process; what is in the file is not run again."""
    out = tmp_path / "inference.json"
    options = ["--quick", "--threads", 1, "--runs", 1, "--work", tmp_path / "work", "--out", out]
    systems = ["--system", "ours_float32", "--system", "transformers_float32"]
    call(monkeypatch, *options, *systems, "--part", "speed")
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads(out.read_text())
    assert report["metrics"]["read_gb_per_s"] > 0
    check = report["details"]["checks"]["tiny"]
    assert check["ours_float32"] == {
        "equal_tokens": 3 * 16, "near_ties": 0, "largest_difference": pytest.approx(0, abs=1e-4),
    }  # fmt: skip
    assert check["tokens_before_first_difference"]["ours_float32"] == 1.0
    assert report["metrics"]["decode_b1_over_transformers_fp32_tiny"] > 0
    assert {"hardware", "versions", "command", "commit", "date"} <= set(report)

    call(monkeypatch, *options, *systems, "--system", "ours_int8", "--runs", 2)
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    name = "tiny speed 64/8 batch 2"
    before, after = (r["details"]["cases"][name]["entries"]["ours_float32"]["runs"] for r in (report, again))
    assert after[0] == before[0]
    assert len(after) == 2
    modes = again["details"]["cases"]["tiny modes 64/8 batch 8"]["entries"]
    assert {"ours_float32 greedy", "ours_float32 beam4", "ours_float32 sampling"} <= set(modes)
    assert again["metrics"]["beam4_over_greedy_tiny"] > 0
    assert again["metrics"]["load_latency_p95_s_transformers_float32_tiny"] > 0


def test_what_writes_something_else_is_not_timed(tmp_path, monkeypatch):
    import inference_contenders
    from inference_figures import DisagreementError

    check = inference_contenders.Ours.check

    def wrong(self, sources, new):
        return check(self, [source[::-1] for source in sources], new)

    monkeypatch.setattr(inference_contenders.Ours, "check", wrong)
    with pytest.raises(DisagreementError):
        call(monkeypatch, "--quick", "--threads", 1, "--system", "ours_float32", "--work", tmp_path)


def test_ctranslate2_is_asked_for_the_same(tmp_path):
    pytest.importorskip("ctranslate2", reason="a peer of the benchmark only")
    import inference_cases
    from inference_contenders import SYSTEMS, CTranslate2, Ours

    folders = inference_cases.prepare("tiny", tmp_path, for_ctranslate2=True)
    theirs = CTranslate2(folders.ctranslate2, SYSTEMS["ctranslate2_float32"], threads=1)
    sources = [[20, 30, 40, 50], [60, 70]]
    timed, answers = theirs.answer(sources, 5, "greedy")
    assert [len(answer) for answer in answers] == [5, 5]
    assert (timed.n_tokens, timed.n_tokens_at_first) == (10, 2)
    assert 0 < timed.first_s < timed.total_s
    done = theirs.serve([inference_cases.Arrival(0.0, 4, 2), inference_cases.Arrival(0.0, 2, 5)], sources)
    assert all(one > 0 for one in done)
    # Without soft-caps the first tokens of this model are still the same: both decode from the same start.
    ours = Ours(folders.pair, SYSTEMS["ours_float32"], batch_size=2, threads=1)
    assert [row[0] for row in ours.check(sources, 1).tokens] == [row[0] for row in answers]
