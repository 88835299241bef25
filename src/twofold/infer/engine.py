"""`Engine`: text in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from twofold.data.chat import Messages, prompt_inputs
from twofold.data.convention import Convention
from twofold.infer.generate import generate
from twofold.infer.sampling import Sampling
from twofold.models import EncoderDecoder


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
