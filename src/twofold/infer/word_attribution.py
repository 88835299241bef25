"""Which words of the source each word of an answer looked at: `infer.attribution`, from tokens to words.

A source word gets the sum of its tokens' weights, an answer word the mean of its tokens' rows; a token that stands for
several words is divided by characters. So a row still tells where all of the attention went.

Most heads put most of their weight on the first token, whatever it says: the attention sink (Xiao et al. 2023, arXiv
2309.17453), where a head that finds nothing parks its weight. Beside it every other weight looks like zero, and it
says nothing about the answer. Special tokens (turn marks of a chat template) serve the same end. So the weight on the
first token and on special tokens is counted apart, as `sink`, and `WordAttribution.highlights` shows the rest.

An encoder that was opened to both directions can make sinks of its own in ordinary words (in a summary written by a
pair made of SmolLM2-135M, three times "the" took a third of `highlights` in every row). They are the same for all
answer words, so `WordAttribution.distinctive` takes away what an answer looks at on average.

Letters: L layers, N heads, A answer words, W source words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twofold.data.chat import Messages, prompt_inputs, prompt_text
from twofold.data.convention import Convention
from twofold.infer.attribution import Keep, attribute
from twofold.infer.words import Span, shares, spans_of_text, spans_of_tokens, words_of
from twofold.models import EncoderDecoder


@dataclass(frozen=True)
class WordAttribution:
    """Where each answer word's attention went: `weights` over all source words, `sink`, `own` and `elsewhere` add up
    to 1. L and N are 1 where they were averaged."""

    source_text: str
    """The whole prompt as the model got it, the chat template included."""
    source_words: list[Span]
    """By characters of `source_text`."""
    answer_text: str
    answer_words: list[Span]
    weights: Tensor
    """float32 [L, N, A, W]."""
    sink: Tensor
    """float32 [L, N, A]: on the first source token and on special tokens."""
    own: Tensor
    """float32 [L, N, A]: on the decoder's own tokens; 0 where cross-attention is a sub-layer of its own."""
    elsewhere: Tensor
    """float32 [L, N, A]: on source tokens that belong to no word, as line breaks."""

    @property
    def highlights(self) -> Tensor:
        """float32 [L, N, A, W]: `weights` scaled so that each row sums to 1, or stays 0 where it was."""
        return self.weights / self.weights.sum(dim=-1, keepdim=True).clamp(min=1e-30)

    @property
    def distinctive(self) -> Tensor:
        """float32 [L, N, A, W]: by how much `highlights` exceed their mean over the answer's words; 0 where they do
        not. All 0 for an answer of one word."""
        highlights = self.highlights
        return (highlights - highlights.mean(dim=-2, keepdim=True)).clamp(min=0.0)


def attribute_words(
    model: EncoderDecoder,
    tokenizer: Any,
    prompt: str | Messages,
    answer: str | Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    keep: Keep = "mean",
) -> WordAttribution:
    """See `Engine.attribute`."""
    convention = Convention.of(model.config)
    source_ids, prefix_ids = (ids.tolist() for ids in prompt_inputs(prompt, tokenizer, convention))
    source_text = prompt_text(prompt, tokenizer)
    text_ids, text_spans = spans_of_text(tokenizer, source_text)
    source_spans = _spans_of_source(source_ids, text_ids, text_spans)
    if isinstance(answer, str):
        answer_text = answer
        answer_ids, answer_spans = spans_of_text(tokenizer, answer)
    else:
        answer_ids = list(answer)
        answer_text, answer_spans = spans_of_tokens(tokenizer, answer_ids)
    special = set(tokenizer.all_special_ids)
    is_special = [span for span, token in zip(text_spans, text_ids, strict=True) if token in special]
    source_words, answer_words = words_of(source_text, is_special), words_of(answer_text)
    found = attribute(model, source_ids, prefix_ids, answer_ids, layers=layers, heads=heads, keep=keep)

    rows_AT = shares(answer_words, answer_spans).T
    rows_AT = rows_AT / rows_AT.sum(dim=1, keepdim=True).clamp(min=1e-30)
    is_apart = torch.tensor([i == 0 or token in special for i, token in enumerate(source_ids)])
    columns_SW = shares(source_words, source_spans) * ~is_apart[:, None]
    in_words, whole = rows_AT @ (found.weights @ columns_SW), found.weights.sum(dim=-1)
    sink = (found.weights * is_apart).sum(dim=-1) @ rows_AT.T
    return WordAttribution(
        source_text,
        source_words,
        answer_text,
        answer_words,
        weights=in_words,
        sink=sink,
        own=found.own @ rows_AT.T,
        elsewhere=(whole @ rows_AT.T - sink - in_words.sum(dim=-1)).clamp(min=0.0),
    )


def _spans_of_source(source: list[int], text_ids: list[int], text_spans: list[Span]) -> list[Span]:
    """The characters of each source token: those of the text's tokens, before which a BOS was put or taken away, and
    of which the last ones may be the decoder's."""
    for n_added, n_dropped in ((0, 0), (1, 0), (0, 1)):
        n_shared = len(source) - n_added
        if source[n_added:] == text_ids[n_dropped : n_dropped + n_shared]:
            return [(0, 0)] * n_added + text_spans[n_dropped : n_dropped + n_shared]
    raise ValueError("the tokens of this prompt cannot be found in its text; is its chat template unusual?")
