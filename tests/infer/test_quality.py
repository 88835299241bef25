"""Quality against whole forward passes, and the statistics against numbers worked out by hand."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from tests.models.tiny import build, gemma_stack, pair_config
from twofold.infer import Engine
from twofold.infer.quality import (
    Measured,
    Reference,
    compare,
    measure_quality,
    read_texts,
    references,
    shared_tokens,
    target_losses,
)


@torch.no_grad()
def test_losses_are_those_of_a_whole_forward_pass():
    model = build(pair_config(gemma_stack(), layout="merged", reads="aligned"), qk_factor=2.0)
    given = [
        Reference(source_ids=(5, 6, 7), prefix_ids=(2,), target_ids=(9, 10, 11, 12)),
        Reference(source_ids=(8,), prefix_ids=(2, 4), target_ids=(13,)),
        Reference(source_ids=(5, 9, 5, 9, 5), prefix_ids=(2,), target_ids=(7, 3)),
    ]
    found = target_losses(Engine(model, device="cpu").loop.backend, given)
    for loss, one in zip(found, given, strict=True):
        inputs = torch.tensor([[*one.prefix_ids, *one.target_ids[:-1]]])
        logits = model(torch.tensor([one.source_ids]), None, inputs, torch.ones_like(inputs)).logits[0]
        scored = logits[len(one.prefix_ids) - 1 :]
        expected = F.cross_entropy(scored, torch.tensor(one.target_ids), reduction="sum")
        assert loss == pytest.approx(expected.item(), abs=1e-4)


def test_answers_are_the_engines():
    model = build(pair_config(gemma_stack()))
    given = [
        Reference(source_ids=(5, 6, n), prefix_ids=(2,), target_ids=tuple(range(3, 3 + n))) for n in (7, 8, 9)
    ]
    measured = measure_quality(Engine(model, device="cpu", batch_size=2), given)
    assert measured.n_tokens == (7, 8, 9)
    assert measured.losses == pytest.approx(target_losses(Engine(model, device="cpu").loop.backend, given))
    assert all(0 < len(answer) <= n for answer, n in zip(measured.greedy, (7, 8, 9), strict=True))


def test_statistics():
    base = Measured(losses=(2.0, 6.0), n_tokens=(2, 2), greedy=((1, 2, 3, 4), (5, 6)))
    other = Measured(losses=(2.2, 6.6), n_tokens=(2, 2), greedy=((1, 2, 9, 4), (5, 6)))
    quality = compare(other, base)
    assert quality.nats_per_token == pytest.approx(2.2)
    # Of equal lengths: the standard error of the mean of 1.1 and 3.3.
    assert quality.nats_error == pytest.approx(1.1)
    assert quality.perplexity == pytest.approx(math.exp(2.2))
    assert quality.difference == pytest.approx(0.2)
    assert quality.difference_error == pytest.approx(0.1)
    assert quality.equal_tokens == pytest.approx(4 / 6)
    assert quality.identical == 0.5
    same = compare(base, base)
    assert (same.difference, same.difference_error, same.equal_tokens, same.identical) == (0, 0, 1, 1)


def test_tokens_weigh_alike_in_examples_of_unequal_length():
    uneven = Measured(losses=(1.0, 9.0), n_tokens=(1, 3), greedy=((1,), (2, 3, 4)))
    quality = compare(uneven, uneven)
    assert quality.nats_per_token == 2.5
    # Residuals 1 - 2.5 and 9 - 7.5; sqrt(2 * (1.5^2 + 1.5^2)) / 4.
    assert quality.nats_error == pytest.approx(0.75)


def test_shared_tokens():
    assert shared_tokens((1, 2, 3), (1, 2, 4)) == 2
    assert shared_tokens((1, 2), (1, 2, 3)) == 2
    assert shared_tokens((9,), (1,)) == 0


class TestTexts:
    def test_pairs_and_texts(self, tmp_path):
        file = tmp_path / "texts.jsonl"
        records = [{"prompt": "a", "completion": "b", "id": 1}, {"text": "cd"}, {"text": "more"}]
        file.write_text("\n\n".join(map(json.dumps, records)))
        assert read_texts(file, 2) == [{"prompt": "a", "completion": "b"}, {"text": "cd"}]

    def test_default(self):
        texts = read_texts(None, 3)
        assert len(texts) == 3
        assert all(len(record["text"]) > 1500 for record in texts)

    @pytest.mark.parametrize(
        "line", ['{"prompt": "a"}', '{"text": 3}', "[1]", '{"prompt": 1, "completion": ""}']
    )
    def test_other_lines_are_refused(self, tmp_path, line):
        file = tmp_path / "texts.jsonl"
        file.write_text('{"text": "fine"}\n' + line)
        with pytest.raises(ValueError, match=r'line 2: need a JSON object with "prompt" and "completion"'):
            read_texts(file, 9)

    def test_too_few(self, tmp_path):
        file = tmp_path / "texts.jsonl"
        file.write_text('{"text": "fine"}')
        with pytest.raises(ValueError, match="has 1 records"):
            read_texts(file, 9)
        file.write_text('{"text": "fine"}\n{')
        with pytest.raises(ValueError, match="line 2: not JSON"):
            read_texts(file, 9)


def test_references_are_cut(text_model):
    model = text_model()  # a token per byte, starts from the last source token
    records = [
        {"prompt": "abcdef", "completion": "uvwxyz"},
        {"text": "0123456789"},
        {"text": "x"},
        {"prompt": "", "completion": "y"},
    ]
    found = references(model, records, source_tokens=3, target_tokens=2)
    texts = [
        tuple(
            bytes(model.tokenizer.decode(ids), "ascii")
            for ids in (one.source_ids, one.prefix_ids, one.target_ids)
        )
        for one in found
    ]
    # The prompt keeps its end, before the token that the decoder starts from; the text its beginning.
    assert texts == [(b"cde", b"f", b"uv"), (b"01", b"2", b"34")]
    with pytest.raises(ValueError, match="1 of 2 records"):
        references(model, records[1:3], source_tokens=3, target_tokens=2)
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        references(model, records, source_tokens=3, target_tokens=2)
