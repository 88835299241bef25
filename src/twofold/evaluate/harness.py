"""A contender as a model of lm-evaluation-harness: likelihoods from PyTorch, answers from the engine.

Encoder-decoders and decoder-only models go through the same code, and a decoder-only model gets the numbers of the
harness's own Hugging Face backend. What differs from that backend for encoder-decoders is in `twofold.evaluate.inputs`
and `TwofoldLM`.
"""

from __future__ import annotations

import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from jinja2 import TemplateError
from tqdm import tqdm

from twofold.evaluate.contender import Contender
from twofold.evaluate.inputs import ChatPrompt, Inputs, Row
from twofold.infer.backends import BackendName, Precision
from twofold.infer.engine import Engine
from twofold.infer.handle import Handle, RequestFailed
from twofold.infer.likelihood import iter_scores
from twofold.infer.request import Delta, Request
from twofold.infer.sampling import Sampling

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError("evaluation needs the package lm_eval; pip install 'twofold[eval]'") from error

T = TypeVar("T")

MAX_GEN_TOKENS = 256
"""Of an answer, where the task does not say; the harness's own number."""

_FILTERS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""Each with what others write where it is off."""
_PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
_BEAMS = ("num_beams", "length_penalty", "early_stopping")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request."""

    source: int
    """Read before the first that is scored or written; of a whole text, what stands before its first window."""
    target: int
    """Scored or written."""
    n_cut: int
    """Of the context, that the model could not read."""


class TwofoldLM(TemplateLM):  # type: ignore[misc]
    """What the harness asks, answered by one model.

    The context goes to the encoder, the continuation to the decoder. Models that go on where their donor would
    (lossless pairs, decoder-only models) are tokenised as the harness tokenises decoder-only models, context and
    continuation as one text that is cut, and their last context token is the decoder's first. Others start from BOS:
    both parts are tokenised apart, as the harness does for encoder-decoders, and trailing spaces of the context belong
    to the continuation.

    An empty context is one BOS, or the end token where the tokenizer has no BOS. Whole texts: see `Inputs.windows`.
    Their sums are comparable between decoder-only models alone.

    Contexts that are too long lose their first tokens; `usage` tells how many.

    Args:
        contender: its model is moved to the engine's device, and converted to `precision` where that is float32 or
            bfloat16. Likelihoods are the model's own in that dtype; int8 and int4 hold for answers alone.
        backend, precision, device, threads, batch_size: of the engine, see there.
        chat: conversations will be asked for.
        count_stop: the end token is scored as the last one of every continuation. The harness scores none, and so does
            its Hugging Face backend.
        show_progress: bars on stderr.

    Raises:
        ValueError: the model has no tokenizer, or `chat` and no chat template.
    """

    def __init__(
        self,
        contender: Contender,
        *,
        backend: BackendName = "auto",
        precision: Precision | None = None,
        device: str | torch.device | None = None,
        threads: int | None = None,
        batch_size: int = 8,
        chat: bool = False,
        count_stop: bool = False,
        show_progress: bool = False,
    ) -> None:
        super().__init__()
        model = contender.model
        self.tokenizer = model.tokenizer
        if self.tokenizer is None:
            raise ValueError(
                f"{contender.path} has no tokenizer, and tasks are text; put tokenizer files into its folder"
            )
        if chat:
            self._refuse_without_template(contender.path)
        if threads is not None:
            torch.set_num_threads(threads)  # for likelihoods, as the engine does for answers
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if precision == "float32" or precision == "bfloat16":
            model.to(getattr(torch, precision))
        self.model = model.to(self._device)
        self.inputs = Inputs(model.config, self.tokenizer, contender.kind, count_stop=count_stop)
        self.backend = "causal" if self.inputs.goes_on else "seq2seq"  # how the harness tokenises pairs
        self._make_engine: Callable[[], Engine] = partial(
            Engine,
            model,
            backend=backend,
            precision=precision,
            device=self._device,
            threads=threads,
            batch_size=batch_size,
        )
        self._engine: Engine | None = None
        if self._device.type == "cuda":
            self._engine = self._make_engine()  # whose weights in int8 or int4 are the model's own there
        self._in_flight = 4 * batch_size
        self._show_progress = show_progress
        self._dropped_system = False

    @property
    def engine(self) -> Engine:
        """Made when the first answer is asked for."""
        if self._engine is None:
            self._engine = self._make_engine()
        return self._engine

    @property
    def eot_token_id(self) -> int:
        """The model's end token."""
        return self.inputs.convention.stop_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """See `Inputs`."""
        return self.inputs.prefix_token_id

    @property
    def max_length(self) -> int:
        """Context tokens at most: the model's own limit."""
        config = self.model.config
        reader = config.decoder if config.decoder_positions == "continue" else config.encoder
        return reader.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of built requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; BOS is the convention's affair, so none is added here."""
        return self.inputs.encode(string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The rendered conversation, which remembers its messages. A system message that the template refuses is left
        out, as the harness's Hugging Face backend does.

        Args:
            chat_history: messages.
            add_generation_prompt: False: the last message is a begun reply.

        Raises:
            ValueError: there is no chat template.
        """
        self._refuse_without_template("this model")
        render = partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return ChatPrompt(render(chat_history), chat_history)
        except TemplateError:
            kept = [message for message in chat_history if message["role"] != "system"]
            if len(kept) == len(chat_history):
                raise
            if not self._dropped_system:
                warnings.warn(
                    "the chat template takes no system message: task descriptions are left out", stacklevel=2
                )
                self._dropped_system = True
            return ChatPrompt(render(kept), kept)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, each token is the most likely one) of each continuation after its context.

        Raises:
            ValueError: naming task and example, before anything is computed.
        """
        rows = [self._checked(request, lambda args: self.row(*args)) for request in requests]
        return self._scores(rows, [request.args for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text. Errors as in `loglikelihood`."""
        windows = [self._checked(request, lambda args: self._windows(*args)) for request in requests]
        rows = [row for rows in windows for row in rows]
        owners = [i for i, rows in enumerate(windows) for _ in rows]
        sums, left = [0.0] * len(requests), [len(rows) for rows in windows]
        for n, (total, _) in self._each(rows, "texts"):
            i = owners[n]
            sums[i] += total
            left[i] -= 1
            if left[i] == 0:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[i].args, sums[i])
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each context, up to the first of its `until` strings; greedy unless the task samples.

        Raises:
            ValueError: naming task and example: an unknown setting of generation, or one that leaves no room for the
                context, before anything is computed.
        """
        seeds: Counter[str] = Counter()
        asked = [self._checked(request, lambda args: self._asked(seeds, *args)) for request in requests]
        texts = [""] * len(requests)
        bar = tqdm(total=len(requests), desc="answers", disable=not self._show_progress)

        def hear(i: int, delta: Delta | None) -> None:
            if delta is None:
                return
            texts[i] += delta.text
            if delta.finish_reason in ("stop", "length"):
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                bar.update()

        waiting: deque[tuple[int, Handle]] = deque()
        try:
            for i in sorted(range(len(asked)), key=lambda i: -len(asked[i].source_ids or ())):
                if len(waiting) == self._in_flight:
                    self._wait(requests, *waiting.popleft())
                handle = self.engine.submit(asked[i])
                handle.listen(partial(hear, i))
                waiting.append((i, handle))
            while waiting:
                self._wait(requests, *waiting.popleft())
        except BaseException:
            for _, handle in waiting:
                handle.cancel()
            raise
        finally:
            bar.close()
        return texts

    def row(self, context: str, continuation: str) -> Row:
        """What is computed for a continuation. Errors as in `Inputs.scored`."""
        if context:
            context_ids, target_ids = self._encode_pair(context, continuation)
        else:
            context_ids, target_ids = [self.prefix_token_id], self.tok_encode(continuation)
            if self.inputs.goes_on and target_ids[:1] == context_ids:  # the harness's rule: BOS is not scored
                target_ids = target_ids[1:]
        return self.inputs.scored(context, continuation, context_ids, target_ids)

    def usage(self, request_type: str, args: tuple[Any, ...], answers: Sequence[str] = ()) -> Usage:
        """What a request reads and writes; computed from its strings, so that answers from a cache count too.

        Args:
            request_type: of the harness.
            args: of the request.
            answers: what was written, for `generate_until`.
        """
        if request_type == "loglikelihood_rolling":
            rows = self._windows(*args)
            tokens = sum(len(row.target) for row in rows)
            source = len(rows[0].source) + len(rows[0].prefix) if rows else 0
            return Usage(source, tokens, 0)
        if request_type == "loglikelihood":
            row = self.row(*args)
            written = len(row.target)
        else:
            row = self.inputs.prompt(args[0], generation_options(args[1])["max_new_tokens"])
            written = round(sum(len(self.inputs.encode(text)) for text in answers) / max(1, len(answers)))
        n_read = len(row.source) + (len(row.prefix) if self.inputs.goes_on else 0)
        return Usage(n_read, written, row.n_cut)

    def flush(self) -> None:
        """Have what was answered so far written into the harness's cache, where there is one."""
        if self.cache_hook.dbdict is not None:
            self.cache_hook.dbdict.commit(blocking=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """For callers of the harness that bring token ids. A context that lacks the BOS of the convention gets it."""
        rows = [self.inputs.scored("", "", context, target) for _, context, target in requests]
        return self._scores(rows, [args for args, *_ in requests])

    def _scores(
        self, rows: Sequence[Row], args: Sequence[tuple[str, str] | None]
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        for i, answer in self._each(rows, "likelihoods"):
            found[i] = answer
            key = args[i]
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return [found[i] for i in range(len(rows))]

    def _each(self, rows: Sequence[Row], name: str) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Numbers of rows with (log-likelihood, is greedy), as they are computed."""
        scores = iter_scores(
            self.model,
            [row.source for row in rows],
            [row.prefix for row in rows],
            [row.target for row in rows],
        )
        with tqdm(total=len(rows), desc=name, disable=not self._show_progress) as bar:
            for i, score in scores:
                bar.update()
                yield i, (score.total, score.is_greedy)

    def _windows(self, text: str) -> list[Row]:
        rolling = get_rolling_token_windows(
            token_list=self.inputs.as_read(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return self.inputs.windows(text, [make_disjoint_window(window) for window in rolling])

    def _asked(self, seeds: Counter[str], context: str, settings: Mapping[str, Any]) -> Request:
        options = generation_options(settings)
        row = self.inputs.prompt(context, options["max_new_tokens"])
        # From the text and how often it came before, so that an answer does not depend on what else is asked.
        seed = zlib.crc32(context.encode()) + seeds[context]
        seeds[context] += 1
        sampling = options.pop("sampling").model_copy(update={"seed": seed})
        return Request(source_ids=row.source, prefix_ids=row.prefix, sampling=sampling, **options)

    def _checked(self, request: Any, make: Callable[[tuple[Any, ...]], T]) -> T:
        """What `make` makes of a request's arguments; errors name the request."""
        try:
            return make(request.args)
        except ValueError as error:
            raise ValueError(f"{_name(request)}: {error}") from error

    def _wait(self, requests: Sequence[Any], i: int, handle: Handle) -> None:
        try:
            handle.result()
        except RequestFailed as error:
            raise RequestFailed(f"{_name(requests[i])}: {error}") from error

    def _refuse_without_template(self, path: str) -> None:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"the tokenizer of {path} has no chat template, so tasks cannot be asked as conversations; evaluate "
                "without chat (--chat), or set the tokenizer's chat_template"
            )


def _name(request: Any) -> str:
    return f"task {request.task_name}, example {request.doc_id}"


def generation_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `Request` from a task's generation settings.

    Raises:
        ValueError: a setting that is unknown here.
    """
    given = dict(normalize_gen_kwargs(dict(settings), MAX_GEN_TOKENS))
    until, max_new_tokens = given.pop("until"), given.pop("max_gen_toks")
    is_drawn = given.pop("do_sample")
    temperature = given.pop("temperature", 1.0) if is_drawn else 0.0
    given.pop("temperature", None)
    allowed = (*_FILTERS, *_PENALTIES, *_BEAMS)
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise ValueError(
            f"unknown settings of generation: {', '.join(unknown)}; known are until, max_gen_toks, do_sample, "
            f"temperature, {', '.join(allowed)}"
        )
    set_filters = {name: given[name] for name in _FILTERS if given.get(name) not in (None, _FILTERS[name])}
    filters = set_filters if is_drawn else {}
    penalties = {name: given[name] for name in _PENALTIES if name in given}
    return {
        "max_new_tokens": max_new_tokens,
        "stop": tuple(text for text in until if text),
        "sampling": Sampling(temperature=temperature, **filters, **penalties),
        **{name: given[name] for name in _BEAMS if name in given},
    }
