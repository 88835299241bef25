"""What people call: texts or requests in, completions out, one by one or as a stream."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from twofold.data.chat import Messages, prompt_inputs
from twofold.data.convention import Convention
from twofold.data.tokenize import encode
from twofold.infer.backends import BackendName, Precision, make_backend
from twofold.infer.constraints import Grammars, Schema
from twofold.infer.handle import Handle
from twofold.infer.likelihood import Pooling, Score, embed_sources, score_targets
from twofold.infer.loop import Loop
from twofold.infer.prepare import prepare
from twofold.infer.request import Completion, Constraint, Delta, Request
from twofold.infer.sampling import Sampling
from twofold.infer.scheduler import Job, Scheduler
from twofold.models import EncoderDecoder

_log = logging.getLogger(__name__)


class Engine:
    """Runs a model on any mixture of requests, which join and leave at every step.

    Without a thread of its own the engine works while somebody waits for a result; after `start` it works in the
    background. Any thread may call it.

    Args:
        model: moved to `device` and put into eval mode. Without a tokenizer it takes token ids only.
        backend: what runs it, see `infer.backends.make_backend`. `auto`: PyTorch on CUDA; on the CPU OpenVINO if
            the extra `cpu` is installed, else PyTorch.
        precision: `float32`, `bfloat16`, or weights in `int8` or `int4`. None: the model's own dtype. Likelihoods and
            embeddings (`score`, `embed`) are always computed by the model itself, which PyTorch converts in place.
        device: default: CUDA where there is one, else the CPU.
        threads: of the processor. None: one for each core.
        batch_size: rows (answers, samples, beams) that are decoded together.
        cache_bytes: of keys and values of all running requests together. Default: a quarter of the machine's
            memory, or half of what is free on the GPU.
        encode_tokens: source tokens, padding included, that are encoded together between two decoding steps.

    Raises:
        ValueError: a size below 1, or a backend or precision that cannot be had here.
        ImportError: a backend whose packages are missing.
    """

    def __init__(
        self,
        model: EncoderDecoder,
        *,
        backend: BackendName = "auto",
        precision: Precision | None = None,
        device: str | torch.device | None = None,
        threads: int | None = None,
        batch_size: int = 8,
        cache_bytes: int | None = None,
        encode_tokens: int = 4096,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if cache_bytes is not None and cache_bytes < 1:
            raise ValueError(f"cache_bytes must be at least 1, got {cache_bytes}")
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(chosen)
        self.model = model.to(self.device).eval()
        self.tokenizer: Any = model.tokenizer
        self.convention = Convention.of(model.config)
        self.batch_size = batch_size
        self.cache_bytes = cache_bytes or _default_cache_bytes(self.device)
        scheduler = Scheduler(
            max_bytes=self.cache_bytes, max_rows=batch_size, max_encode_tokens=encode_tokens
        )
        runner = make_backend(
            self.model, backend=backend, precision=precision, threads=threads, cache_bytes=self.cache_bytes
        )
        self.loop = Loop(runner, scheduler, self.device)
        self._made_grammars: Grammars | None = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._is_closed = False

    def generate(
        self,
        prompts: Sequence[str | Messages],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        **options: Any,
    ) -> list[Completion]:
        """Answer every prompt; greedy unless a temperature is given.

        Args:
            prompts: texts, taken as they are; or conversations (lists of {"role", "content"}), for which the
                tokenizer's chat template is used.
            max_new_tokens: at most this many tokens for each.
            temperature, top_k, top_p: see `infer.sampling.Sampling`.
            seed: prompt i draws with `seed + i`.
            options: other fields of `Sampling` and `Request`, except `n`; with `num_beams` the best answer is
                returned.

        Returns:
            One completion per prompt, in order.

        Raises:
            ValueError: no prompt, an empty one, or one that is too long for the model; nothing was run then.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list of texts, got one string; pass [text]")
        if not prompts:
            raise ValueError("no prompts given; pass at least one text")
        if "n" in options:
            raise ValueError(
                "generate returns one completion per prompt; use submit(Request(..., n=...)) for more"
            )
        filters = {name: options.pop(name) for name in list(options) if name in Sampling.model_fields}
        filters |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        requests = [
            Request(
                prompt=prompt,
                max_new_tokens=max_new_tokens,
                sampling=Sampling(seed=seed + i, **filters),
                **options,
            )
            for i, prompt in enumerate(prompts)
        ]
        handles = self._submit_all(requests)
        try:
            return [handle.result()[0] for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    def submit(self, request: Request) -> Handle:
        """Hand a request in and return at once.

        Raises:
            ValueError: the request cannot run on this model or within this engine's bounds.
            RuntimeError: the engine was closed.
        """
        return self._submit_all([request])[0]

    def check(self, request: Request) -> None:
        """Refuse now what `submit` would refuse, and run nothing. Errors as there."""
        self._ready([request])

    def stream(self, request: Request) -> Iterator[Delta]:
        """The deltas of a request as they come; leaving the loop early cancels it. Errors as in `submit`."""
        handle = self.submit(request)

        def deltas() -> Iterator[Delta]:
            try:
                yield from handle
            finally:
                handle.cancel()

        return deltas()

    def score(
        self, prompts: Sequence[str | Messages], targets: Sequence[str], *, ends: bool = True
    ) -> list[Score]:
        """How likely the model finds each target as the answer to its prompt.

        Args:
            prompts: as for `generate`.
            targets: one text per prompt, tokenised on its own.
            ends: the target is followed by the end token, whose likelihood counts too.

        Raises:
            ValueError: unequal numbers, an empty target without end, or texts too long for the model.
        """
        tokenizer = self._tokenizer_for_text()
        if len(prompts) != len(targets) or isinstance(prompts, str) or isinstance(targets, str):
            raise ValueError(
                f"need lists of as many targets as prompts, got {len(prompts)} prompts, {len(targets)} targets"
            )
        if not prompts:
            return []
        inputs = [prompt_inputs(prompt, tokenizer, self.convention) for prompt in prompts]
        end = [self.convention.stop_token_ids[0]] if ends else []
        return score_targets(
            self.model,
            [source.tolist() for source, _ in inputs],
            [prefix.tolist() for _, prefix in inputs],
            [[*encode(tokenizer, target).tolist(), *end] for target in targets],
        )

    def embed(self, texts: Sequence[str], *, pooling: Pooling = "mean") -> Tensor:
        """float32 [texts, width] on the CPU: the encoder's output over a text's tokens, pooled.

        Raises:
            ValueError: an empty text, or one longer than the encoder's limit.
        """
        tokenizer = self._tokenizer_for_text()
        if isinstance(texts, str) or not texts:
            raise ValueError("texts must be a list of at least one text; pass [text]")
        sources = []
        for i, text in enumerate(texts):
            if not text:
                raise ValueError(f"text {i} is empty, so there is nothing to embed; leave it out")
            source, prefix = prompt_inputs(text, tokenizer, self.convention)
            # The lossless start moves the last token to the decoder; here it is read with the others.
            takes_last = self.convention.decoder_start == "last_source_token"
            sources.append((np.concatenate([source, prefix]) if takes_last else source).tolist())
        return embed_sources(self.model, sources, pooling)

    def json_schema(self, schema: Schema) -> Constraint:
        """For `Request(constraint=...)`: answers are JSON that is valid against a schema. See `infer.constraints`.

        Raises:
            ValueError: there is no tokenizer, or the schema cannot be followed.
            ImportError: the extra `grammar` is missing.
        """
        return self._grammars().json_schema(schema)

    def regex(self, pattern: str) -> Constraint:
        """Likewise: answers match a regular expression as a whole. Errors likewise."""
        return self._grammars().regex(pattern)

    def start(self) -> None:
        """Work in a background thread from now on."""
        self._refuse_if_closed()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="twofold-engine", daemon=True)
            self._thread.start()

    @property
    def is_working(self) -> bool:
        """The thread that `start` began is at work."""
        return self._thread is not None and self._thread.is_alive()

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests, and finish those that are open, or cancel them."""
        self._is_closed = True
        if cancel:
            self.loop.cancel_all()
        if self._thread is not None:
            self._wake.set()
            self._thread.join()
            self._thread = None
        while self.loop.step():
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=kind is not None)

    def _submit_all(self, requests: Sequence[Request]) -> list[Handle]:
        """All of them, or none where one cannot run."""
        ready = self._ready(requests)
        for handle, job in ready:
            self.loop.submit(handle, job)
        self._wake.set()
        return [handle for handle, _ in ready]

    def _ready(self, requests: Sequence[Request]) -> list[tuple[Handle, Job]]:
        """Checked, but not handed in."""
        self._refuse_if_closed()
        prepared = [prepare(request, self.model.config, self.tokenizer) for request in requests]
        handles = [Handle(p, self._take_step, self._give_up) for p in prepared]
        return [(handle, self.loop.job_of(handle)) for handle in handles]

    def _take_step(self) -> bool:
        """False where the engine's own thread does it."""
        if self.is_working:
            return False
        self.loop.step()
        return True

    def _give_up(self, handle: Handle) -> None:
        self.loop.cancel(handle)
        self._wake.set()

    def _work(self) -> None:
        while True:
            self._wake.clear()
            try:
                while self.loop.step():
                    pass
            except Exception:
                # Every open request has failed with it; later ones get their chance.
                _log.exception("a step of the engine failed")
            if self._is_closed and self.loop.is_idle:
                return
            self._wake.wait()

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise RuntimeError("the engine was closed; make a new one")

    def _grammars(self) -> Grammars:
        if self._made_grammars is None:
            self._made_grammars = Grammars(
                self._tokenizer_for_text(),
                self.model.config.decoder.vocab_size,
                self.convention.stop_token_ids,
            )
        return self._made_grammars

    def _tokenizer_for_text(self) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer, so it takes no text; put tokenizer files into its folder and load it "
                "again"
            )
        return self.tokenizer


def _default_cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free // 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
