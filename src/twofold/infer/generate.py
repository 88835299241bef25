"""Plain generation: encode once, then one decoder step per token, with the cache. Slow, and obviously right.

`generate` takes token ids and is the reference that faster engines are held to; `Engine` takes texts.

Letters: B rows, S source tokens, P tokens of decoder prefixes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from twofold.data.chat import Messages, prompt_inputs
from twofold.data.convention import Convention
from twofold.infer.padding import padded
from twofold.infer.sampling import Sampler, Sampling
from twofold.models import DecoderCache, EncoderDecoder


@dataclass(frozen=True)
class Generated:
    """What one row got."""

    token_ids: tuple[int, ...]
    """New tokens, without the decoder prefix, the end token included where one came."""
    finish_reason: Literal["stop", "length"]


@torch.no_grad()
def generate(
    model: EncoderDecoder,
    sources: Sequence[Sequence[int]],
    prefixes: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_token_ids: Sequence[int] | None = None,
) -> list[Generated]:
    """Continue each decoder prefix, given its source. Rows may have unequal lengths.

    Args:
        model: on any device; put into eval mode by the caller.
        sources: encoder token ids of each row; a row may be empty.
        prefixes: decoder token ids that are given, at least one per row (BOS, the last source token, or a chat
            template's assistant header).
        max_new_tokens: at most this many for each row.
        sampling: default greedy.
        stop_token_ids: a row ends after one of these; default the model's `eos_token_ids`.

    Raises:
        ValueError: no rows, unequal numbers of sources and prefixes, an empty prefix, an id outside the vocabulary, or
            a row that would pass `max_position_embeddings`.
    """
    _check(model, sources, prefixes, max_new_tokens)
    stop = set(model.config.eos_token_ids if stop_token_ids is None else stop_token_ids)
    device = next(model.parameters()).device
    source_ids, source_mask = padded(sources, "right", device)
    step_ids, step_mask = padded(prefixes, "left", device)
    sampler = Sampler(sampling or Sampling(), len(sources), device)

    encoder_output = model.encode(source_ids, source_mask)
    cache = DecoderCache()
    produced: list[list[int]] = [[] for _ in sources]
    is_open = [True] * len(sources)
    for _ in range(max_new_tokens):
        output = model(
            decoder_input_ids=step_ids,
            decoder_attention_mask=step_mask,
            encoder_output=encoder_output,
            cache=cache,
        )
        next_B = sampler.choose(output.logits[:, -1])
        for row, token in enumerate(next_B.tolist()):
            if is_open[row]:
                produced[row].append(token)
                is_open[row] = token not in stop
        if not any(is_open):
            break
        step_ids = next_B[:, None]
        step_mask = torch.tensor(is_open, device=device)[:, None]  # finished rows go on as padding
    return [
        Generated(tuple(tokens), "length" if still_open else "stop")
        for tokens, still_open in zip(produced, is_open, strict=True)
    ]


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt."""

    text: str
    """Decoded, without special tokens."""
    token_ids: tuple[int, ...]
    """As generated, the end token included where one came."""
    finish_reason: Literal["stop", "length"]
    num_source_tokens: int


class Engine:
    """Runs a model on texts, in batches of similar length.

    Args:
        model: moved to `device` and put into eval mode.
        device: default: CUDA where there is one, else the CPU.
        batch_size: prompts that are run together.

    Raises:
        ValueError: the model has no tokenizer.
    """

    def __init__(
        self, model: EncoderDecoder, *, device: str | torch.device | None = None, batch_size: int = 8
    ) -> None:
        if model.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer, so it cannot take text; put tokenizer files into its folder and load it "
                "again, or use twofold.infer.generate with token ids"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(chosen)
        self.model = model.to(self.device).eval()
        self.tokenizer: Any = model.tokenizer
        self.convention = Convention.of(model.config)
        self.batch_size = batch_size

    def generate(
        self,
        prompts: Sequence[str | Messages],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> list[Completion]:
        """Answer every prompt; greedy unless a temperature is given.

        Args:
            prompts: texts, taken as they are; or conversations (lists of {"role", "content"}), for which the
                tokenizer's chat template is used.
            max_new_tokens: at most this many tokens for each.
            temperature, top_k, top_p, seed: see `infer.sampling.Sampling`.

        Returns:
            One completion per prompt, in order.

        Raises:
            ValueError: no prompt, an empty one, or one that is too long for the model.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list of texts, got one string; pass [text]")
        if not prompts:
            raise ValueError("no prompts given; pass at least one text")
        inputs = [prompt_inputs(prompt, self.tokenizer, self.convention) for prompt in prompts]
        by_length = sorted(range(len(inputs)), key=lambda i: len(inputs[i][0]))
        completions: dict[int, Completion] = {}
        for start in range(0, len(by_length), self.batch_size):
            rows = by_length[start : start + self.batch_size]
            sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed + start)
            generated = generate(
                self.model,
                [inputs[i][0].tolist() for i in rows],
                [inputs[i][1].tolist() for i in rows],
                max_new_tokens=max_new_tokens,
                sampling=sampling,
            )
            for i, result in zip(rows, generated, strict=True):
                text = self.tokenizer.decode(result.token_ids, skip_special_tokens=True)
                completions[i] = Completion(text, result.token_ids, result.finish_reason, len(inputs[i][0]))
        return [completions[i] for i in range(len(prompts))]


def _check(
    model: EncoderDecoder,
    sources: Sequence[Sequence[int]],
    prefixes: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> None:
    if not sources or len(sources) != len(prefixes):
        raise ValueError(
            f"need at least one source and one decoder prefix for each, got {len(sources)} sources and "
            f"{len(prefixes)} prefixes"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    config = model.config
    for row, (source, prefix) in enumerate(zip(sources, prefixes, strict=True)):
        if len(prefix) == 0:
            raise ValueError(f"row {row} has an empty decoder prefix; it needs at least a start token")
        ids = (*source, *prefix)
        if min(ids) < 0 or max(ids) >= config.decoder.vocab_size:
            raise ValueError(
                f"row {row} has token ids from {min(ids)} to {max(ids)}; the vocabulary is 0 to "
                f"{config.decoder.vocab_size - 1}"
            )
        before = len(prefix) + (len(source) if config.decoder_positions == "continue" else 0)
        limit = config.decoder.max_position_embeddings
        if before + max_new_tokens > limit:
            raise ValueError(
                f"row {row}: {before} tokens before the first new one and {max_new_tokens} new ones pass the decoder's "
                f"max_position_embeddings of {limit}; shorten the text or lower max_new_tokens"
            )
        if len(source) > config.encoder.max_position_embeddings:
            raise ValueError(
                f"row {row}: source of {len(source)} tokens is longer than the encoder's max_position_embeddings "
                f"({config.encoder.max_position_embeddings}); shorten or split the text"
            )
