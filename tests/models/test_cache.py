from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny import (
    MEETINGS,
    assert_same,
    build,
    gemma_stack,
    meeting_id,
    padded,
    pair_config,
    random_ids,
    stack,
)
from twofold.config import StackConfig
from twofold.models import DecoderCache, EncoderDecoder
from twofold.models.cache import KeyValues

LOCAL_FIRST = ("sliding_attention", "full_attention", "sliding_attention")


def key_values(length: int) -> KeyValues:
    keys = torch.arange(float(2 * length)).view(2, 1, length, 1)
    return KeyValues(keys, -keys)


def test_key_values() -> None:
    both = key_values(2).followed_by(key_values(1))
    assert both.length == 3
    assert both.keys.flatten().tolist() == [0, 1, 0, 2, 3, 1]
    assert both.last(2).values.flatten().tolist() == [-1, 0, -3, -1]
    assert both.last(9).length == 3
    assert both.last(0).length == 0
    assert both.rows(torch.tensor([1, 1])).keys.flatten().tolist() == [2, 3, 1, 2, 3, 1]


def side(family: str = "llama", **changes: Any) -> StackConfig:
    changes = {"layer_types": LOCAL_FIRST} | changes
    return gemma_stack(**changes) if family == "gemma" else stack(**changes)


def in_steps(
    model: EncoderDecoder, source: dict[str, Any], target: Tensor, mask: Tensor | None, pieces: list[int]
) -> tuple[Tensor, DecoderCache]:
    cache, encoded, logits, start = DecoderCache(), model.encode(**source), [], 0
    for length in pieces:
        piece = slice(start, start + length)
        given = None if mask is None else mask[:, piece]
        output = model(
            decoder_input_ids=target[:, piece],
            decoder_attention_mask=given,
            encoder_output=encoded,
            cache=cache,
        )
        logits.append(output.logits)
        start += length
    assert start == target.shape[1] == cache.n_tokens
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
@torch.no_grad()
def test_steps_equal_the_full_pass(meeting: dict[str, Any], family: str) -> None:
    """16 tokens of source and 12 of target, windows of 3; the source is padded on the left."""
    model = build(pair_config(side(family), **meeting), qk_factor=2.0 if family == "gemma" else 1.0)
    ids, mask = padded(random_ids(2, 16), [16, 7], "left")
    source = {"input_ids": ids, "attention_mask": mask}
    target = random_ids(2, 12, seed=1)
    whole = model(**source, decoder_input_ids=target).logits
    for pieces in ([1] * 12, [5, 1, 1, 3, 1, 1], [12]):
        assert_same(in_steps(model, source, target, None, pieces)[0], whole)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
@torch.no_grad()
def test_padded_prompts_are_continued(meeting: dict[str, Any], padding: str) -> None:
    model = build(pair_config(side(), **meeting))
    source = {"input_ids": random_ids(3, 8)}
    prompt, prompt_mask = padded(random_ids(3, 7, seed=1), [7, 2, 4], padding)
    later = random_ids(3, 6, seed=2)
    target = torch.cat([prompt, later], dim=1)
    mask = torch.cat([prompt_mask, torch.ones_like(later).bool()], dim=1)
    whole = model(**source, decoder_input_ids=target, decoder_attention_mask=mask).logits
    steps, _ = in_steps(model, source, target, mask, [7, 1, 2, 1, 1, 1])
    assert_same(steps[mask], whole[mask])
    if padding == "left":  # and padding on the left is as if it were not there
        alone = model(source["input_ids"][1:2], decoder_input_ids=target[1:2, 5:]).logits
        assert_same(steps[1:2, 5:], alone)


@torch.no_grad()
def test_rows_are_selected() -> None:
    model = build(pair_config(side()))
    source, target = random_ids(3, 8), random_ids(3, 9, seed=1)
    mask = padded(target, [9, 9, 4], "left")[1]
    encoded = model.encode(source)
    cache = DecoderCache()
    model(
        decoder_input_ids=target[:, :6],
        decoder_attention_mask=mask[:, :6],
        encoder_output=encoded,
        cache=cache,
    )
    rows = torch.tensor([2, 0, 0])
    cache.select(rows)
    selected = encoded.select(rows)
    assert torch.equal(selected.tokens.segments, encoded.tokens.segments[rows])
    after = model(decoder_input_ids=target[rows, 6:], encoder_output=selected, cache=cache).logits
    whole = model(source, decoder_input_ids=target, decoder_attention_mask=mask).logits
    assert_same(after, whole[rows, 6:])


@torch.no_grad()
def test_encoder_output_selects_all_it_holds() -> None:
    model = build(pair_config(side(), reads="aligned"))
    ids, mask = padded(random_ids(2, 6), [6, 3], "left")
    output = model.encode(ids, mask, output_hidden_states=True).select(torch.tensor([1]))
    alone = model.encode(ids[1:], mask[1:], output_hidden_states=True)
    assert_same(output.last_hidden_state, alone.last_hidden_state)
    assert len(output.memory) == len(alone.memory) == 3
    for a, b in zip(
        (*output.memory, *output.hidden_states), (*alone.memory, *alone.hidden_states), strict=True
    ):
        assert_same(a, b)
    assert torch.equal(output.tokens.positions, alone.tokens.positions)


@pytest.mark.parametrize("is_plain", [True, False])
@torch.no_grad()
def test_sliding_layers_keep_no_more_than_the_window(is_plain: bool) -> None:
    window = 3
    model = build(pair_config(side(sliding_window=window), pad_token_id=None if is_plain else 0))
    source, target = random_ids(2, 10), random_ids(2, 12, seed=1)
    _, cache = in_steps(model, {"input_ids": source}, target, None, [4] + [1] * 8)
    assert cache.is_plain == is_plain
    # A later token sees itself and window - 1 before it.
    assert [layer.own.length for layer in cache.layers] == [window - 1, 12, window - 1]
    assert [layer.source.length for layer in cache.layers] == [10, 10, 10]
    # keys and values, 2 rows, 2 key-value heads of width 8, float32
    assert cache.n_bytes == 2 * 2 * 2 * 8 * 4 * (2 + 12 + 2 + 3 * 10)


def test_empty_cache() -> None:
    cache = DecoderCache()
    assert (cache.n_tokens, cache.n_bytes, cache.layers) == (0, 0, [])


@torch.no_grad()
def test_source_keys_are_computed_once() -> None:
    model = build(pair_config(side()))
    encoded, cache = model.encode(random_ids(1, 5)), DecoderCache()
    model(decoder_input_ids=random_ids(1, 2), encoder_output=encoded, cache=cache)
    before = [layer.source.keys for layer in cache.layers]
    model(decoder_input_ids=random_ids(1, 1), encoder_output=encoded, cache=cache)
    assert all(a is layer.source.keys for a, layer in zip(before, cache.layers, strict=True))


@torch.no_grad()
def test_window_of_one_token() -> None:
    model = build(pair_config(side(sliding_window=1)))
    source, target = random_ids(2, 5), random_ids(2, 6, seed=1)
    whole = model(source, decoder_input_ids=target).logits
    steps, cache = in_steps(model, {"input_ids": source}, target, None, [2, 1, 1, 1, 1])
    assert_same(steps, whole)
    assert [layer.own.length for layer in cache.layers] == [0, 6, 0]
