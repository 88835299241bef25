"""The systems of the inference benchmark, each behind the same three calls.

All decode greedily unless told otherwise, with end tokens disabled, from token ids to token ids.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from inference_cases import Arrival
from torch import Tensor

import twofold
from twofold.infer import Sampling
from twofold.infer.backends import BackendName, Precision, Start
from twofold.infer.timing import Timed, make_engine, request_of, time_batch

Ids = list[list[int]]

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam4": {"num_beams": 4},
    "sampling": {"sampling": Sampling(temperature=0.8, top_k=50, top_p=0.95)},
}
"""Of ours."""

LOAD_ROWS = 8
"""Decoded together under load, in every system."""


class Checked(NamedTuple):
    """Greedy answers, and of each token the log-probabilities of the best two."""

    tokens: Ids
    top: list[list[tuple[float, float]]] | None
    """None where the system does not tell."""


class Contender(Protocol):
    """One system with a model."""

    def answer(self, sources: Ids, new: int, mode: str) -> tuple[Timed, Ids]:
        """Write `new` tokens to each source in one batch."""
        ...

    def check(self, sources: Ids, new: int) -> Checked:
        """The same, greedy and not timed."""
        ...

    def serve(self, arrivals: Sequence[Arrival], sources: Ids) -> list[float]:
        """Answer requests as they arrive; seconds from the start at which each was complete."""
        ...

    def cache_bytes(self, rows: int, source: int, new: int) -> int | None:
        """Keys and values held half-way through; None: unknown."""
        ...


class System(NamedTuple):
    """What is run, and how."""

    kind: str
    """`ours`, `transformers`, `ctranslate2`, or `donor`: transformers with the decoder-only donor."""
    precision: Precision
    backend: BackendName = "auto"
    cache: str | None = None
    compiles: bool = False


SYSTEMS: dict[str, System] = {
    "ours_float32": System("ours", "float32"),
    "ours_bfloat16": System("ours", "bfloat16"),
    "ours_int8": System("ours", "int8"),
    "ours_int4": System("ours", "int4"),
    "ours_torch_float32": System("ours", "float32", "torch"),
    "ours_torch_bfloat16": System("ours", "bfloat16", "torch"),
    "transformers_float32": System("transformers", "float32"),
    "transformers_bfloat16": System("transformers", "bfloat16"),
    "transformers_float32_static": System("transformers", "float32", cache="static"),
    "transformers_float32_compiled": System("transformers", "float32", cache="static", compiles=True),
    "transformers_bfloat16_compiled": System("transformers", "bfloat16", cache="static", compiles=True),
    "ctranslate2_float32": System("ctranslate2", "float32"),
    "ctranslate2_int8": System("ctranslate2", "int8"),
    "donor_float32": System("donor", "float32"),
    "donor_bfloat16": System("donor", "bfloat16"),
}
OPTIONAL = ("ours_torch_float32", "ours_torch_bfloat16", "transformers_float32_static")
"""Only where named."""


def open_contender(spec: Mapping[str, Any]) -> Contender:
    """The contender of a spec: system, folders, threads, batch_size."""
    system = SYSTEMS[spec["system"]]
    torch.set_num_threads(spec["threads"])
    if system.kind == "ours":
        return Ours(Path(spec["pair"]), system, batch_size=spec["batch_size"], threads=spec["threads"])
    if system.kind == "ctranslate2":
        return CTranslate2(Path(spec["ctranslate2"]), system, threads=spec["threads"])
    if system.kind == "donor":
        return Transformers(donor_model(Path(spec["donor"]), system), system)
    return Transformers(seq2seq_model(Path(spec["pair"]), system), system)


class Ours:
    """`twofold.Engine`. Without the tokenizer: the others make no text either."""

    def __init__(self, folder: Path, system: System, *, batch_size: int, threads: int) -> None:
        model = twofold.load(folder, dtype=torch.float32)
        model.tokenizer = None
        self.config = model.config
        self.engine = make_engine(
            model, backend=system.backend, precision=system.precision, batch_size=batch_size, threads=threads
        )

    def answer(self, sources: Ids, new: int, mode: str) -> tuple[Timed, Ids]:
        """See `Contender`; beams of a source count as rows."""
        rows = MODES[mode].get("num_beams", 1)
        requests = [
            request_of(ids, self.config, new, **MODES[mode]) for ids in sources[: len(sources) // rows]
        ]
        timed, answers = time_batch(self.engine, requests)
        return timed, [list(answer.token_ids) for (answer,) in answers]

    def check(self, sources: Ids, new: int) -> Checked:
        """See `Contender`."""
        requests = [request_of(ids, self.config, new, logprobs=2) for ids in sources]
        _, answers = time_batch(self.engine, requests)
        top = []
        for (answer,) in answers:
            assert answer.logprobs is not None
            top.append([(token.top[0][1], token.top[1][1]) for token in answer.logprobs])
        return Checked([list(answer.token_ids) for (answer,) in answers], top)

    def serve(self, arrivals: Sequence[Arrival], sources: Ids) -> list[float]:
        """See `Contender`: requests join and leave at every step."""
        started = time.perf_counter()
        done = [0.0] * len(arrivals)
        open_handles: dict[int, Any] = {}
        following = 0
        while following < len(arrivals) or open_handles:
            now = time.perf_counter() - started
            while (
                following < len(arrivals)
                and arrivals[following].at_s <= now
                and len(open_handles) < LOAD_ROWS
            ):
                request = request_of(sources[following], self.config, arrivals[following].new)
                open_handles[following] = self.engine.submit(request)
                following += 1
            if not open_handles:
                time.sleep(max(0.0, arrivals[following].at_s - now))
                continue
            self.engine.loop.step()
            now = time.perf_counter() - started
            for index in [i for i, handle in open_handles.items() if handle.is_done]:
                open_handles.pop(index).result()
                done[index] = now
        return done

    def cache_bytes(self, rows: int, source: int, new: int) -> int | None:
        """See `Contender`."""
        start = Start(source_ids=(0,) * source, prefix_ids=(0,), n_rows=1, n_tokens=1 + new // 2)
        return rows * self.engine.loop.backend.bytes_needed(start)


class Transformers:
    """`generate` of transformers."""

    def __init__(self, model: Any, system: System) -> None:
        self.model = model.eval()
        self.is_pair = bool(model.config.is_encoder_decoder)
        model.generation_config.eos_token_id = None
        self.settings: dict[str, Any] = {"do_sample": False, "num_beams": 1}
        if system.cache is not None:
            self.settings["cache_implementation"] = system.cache
        if system.compiles:
            from transformers.generation.configuration_utils import CompileConfig

            compile_config = CompileConfig()
            compile_config._compile_all_devices = True  # else only on GPUs
            self.settings["compile_config"] = compile_config

    def answer(self, sources: Ids, new: int, mode: str) -> tuple[Timed, Ids]:
        """See `Contender`."""
        assert mode == "greedy"
        first_s = 0.0

        def note(input_ids: Tensor, _scores: Any, **_options: Any) -> Tensor:
            """Asked after every token whether to stop."""
            nonlocal first_s
            first_s = first_s or time.perf_counter() - started
            return torch.zeros(len(input_ids), dtype=torch.bool)

        started = time.perf_counter()
        output = self.generate(sources, new, stopping_criteria=[note])
        total_s = time.perf_counter() - started
        answers = output[:, -new:].tolist()
        rows = len(sources)
        timed = Timed(first_s=first_s, total_s=total_s, n_tokens=rows * new, n_tokens_at_first=rows)
        return timed, answers

    def check(self, sources: Ids, new: int) -> Checked:
        """See `Contender`."""
        output = self.generate(sources, new, output_logits=True, return_dict_in_generate=True)
        best = [logits_BV.float().log_softmax(-1).topk(2).values.tolist() for logits_BV in output.logits]
        top = [[tuple(step[row]) for step in best] for row in range(len(sources))]
        return Checked(output.sequences[:, -new:].tolist(), top)

    def serve(self, arrivals: Sequence[Arrival], sources: Ids) -> list[float]:
        """See `Contender`: in batches, each as long as its longest answer."""

        def answer(batch: Sequence[int], clock: Callable[[], float]) -> list[float]:
            self.generate([sources[i] for i in batch], max(arrivals[i].new for i in batch))
            return [clock()] * len(batch)

        return serve_in_batches(arrivals, answer, most=LOAD_ROWS)

    def cache_bytes(self, rows: int, source: int, new: int) -> int | None:
        """See `Contender`."""
        return None

    @torch.no_grad()
    def generate(self, sources: Ids, new: int, **options: Any) -> Any:
        """What transformers returns, of sources padded to the longest; `options` are its own."""
        longest = max(map(len, sources))
        pads = [[0] * (longest - len(ids)) for ids in sources]
        # A decoder-only model goes on where its text ends, so its rows are padded in front.
        rows = [ids + pad if self.is_pair else pad + ids for ids, pad in zip(sources, pads, strict=True)]
        ones = [[1] * len(ids) for ids in sources]
        mask = [one + pad if self.is_pair else pad + one for one, pad in zip(ones, pads, strict=True)]
        return self.model.generate(
            input_ids=torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            max_new_tokens=new,
            **self.settings,
            **options,
        )


def seq2seq_model(folder: Path, system: System) -> Any:
    """T5Gemma of transformers, eager: SDPA has no soft-cap, so it would compute another model."""
    from transformers import AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM.from_pretrained(
        folder, dtype=getattr(torch, system.precision), attn_implementation="eager"
    )


def donor_model(file: Path, system: System) -> Any:
    """The decoder-only donor of transformers, weights de-quantised."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=getattr(torch, system.precision)
    )


class CTranslate2:
    """CTranslate2 with its own converter's model, which leaves the soft-caps out: it computes another function."""

    def __init__(self, folder: Path, system: System, *, threads: int) -> None:
        import ctranslate2

        self.translator = ctranslate2.Translator(
            str(folder), compute_type=system.precision, inter_threads=1, intra_threads=threads
        )

    def answer(self, sources: Ids, new: int, mode: str) -> tuple[Timed, Ids]:
        """See `Contender`."""
        assert mode == "greedy"
        first_s = 0.0

        def note(result: Any) -> bool:
            nonlocal first_s
            if result.step == 0:  # of the last row, in the end
                first_s = time.perf_counter() - started
            return False

        started = time.perf_counter()
        results = self._translate(sources, new, callback=note)
        answers = [_numbers(result.hypotheses[0]) for result in results]
        total_s = time.perf_counter() - started
        rows = len(sources)
        timed = Timed(first_s=first_s, total_s=total_s, n_tokens=rows * new, n_tokens_at_first=rows)
        return timed, answers

    def check(self, sources: Ids, new: int) -> Checked:
        """See `Contender`."""
        return Checked([_numbers(r.hypotheses[0]) for r in self._translate(sources, new)], None)

    def serve(self, arrivals: Sequence[Arrival], sources: Ids) -> list[float]:
        """See `Contender`: all that wait are handed over at once, for its own batching; rows end at their lengths."""

        def answer(batch: Sequence[int], clock: Callable[[], float]) -> list[float]:
            done = [0.0] * len(batch)

            def note(result: Any) -> bool:
                is_last: bool = result.step + 1 >= arrivals[batch[result.batch_id]].new
                if is_last:
                    done[result.batch_id] = clock()
                return is_last

            longest = max(arrivals[i].new for i in batch)
            pending = self._translate(
                [sources[i] for i in batch],
                longest,
                callback=note,
                max_batch_size=LOAD_ROWS,
                asynchronous=True,
            )
            for one in pending:
                one.result()
            return done

        return serve_in_batches(arrivals, answer, most=len(arrivals))

    def cache_bytes(self, rows: int, source: int, new: int) -> int | None:
        """See `Contender`."""
        return None

    def _translate(self, sources: Ids, new: int, **options: Any) -> Any:
        words = [[f"t{token}" for token in ids] for ids in sources]
        return self.translator.translate_batch(
            words,
            beam_size=1,
            max_input_length=0,
            max_decoding_length=new,
            min_decoding_length=new,
            **options,
        )


def _numbers(words: Sequence[str]) -> list[int]:
    return [int(word[1:]) if word[0] == "t" else -1 for word in words]


def serve_in_batches(
    arrivals: Sequence[Arrival],
    answer: Callable[[Sequence[int], Callable[[], float]], list[float]],
    *,
    most: int,
) -> list[float]:
    """Whenever the system is idle, it gets what has arrived.

    Args:
        arrivals: by time.
        answer: takes the numbers of a batch's requests and a clock; returns when each was complete.
        most: requests of a batch; the earliest go first.
    """
    started = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - started

    done: list[float] = []
    while len(done) < len(arrivals):
        following = arrivals[len(done)].at_s
        if (now := clock()) < following:
            time.sleep(following - now)
            continue
        arrived = [i for i in range(len(done), len(arrivals)) if arrivals[i].at_s <= now]
        done += answer(arrived[:most], clock)
    return done
