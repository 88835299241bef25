"""`generate` of transformers on a pair against twofold's own generation."""

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from tests.models.tiny import MEETINGS, build, gemma_stack, meeting_id, padded, pair_config, random_ids, stack
from twofold import Engine
from twofold.hf import TwofoldForConditionalGeneration
from twofold.infer import Request, generate

TEXTS = ["the cat sat", "on", "a mat, and then it went away", "x"]


def pad_to(rows, pad=0):
    longest = max(map(len, rows))
    return [row + [pad] * (longest - len(row)) for row in rows]


@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("start", ["bos", "last_source_token"])
def test_greedy_batches(meeting, side, start):
    pair = build(pair_config(gemma_stack(), decoder_start=start, **meeting))
    model = TwofoldForConditionalGeneration.of(pair)
    lengths, ids = [9, 5, 1], random_ids(3, 9)
    sources = [row[:n] for row, n in zip(ids.tolist(), lengths, strict=True)]
    prefixes = [[2]] * 3
    if start == "last_source_token":
        sources, prefixes = [row[:-1] for row in sources], [row[-1:] for row in sources]
    expected = generate(pair, sources, prefixes, max_new_tokens=8)
    rows = [prefix + list(row.token_ids) for prefix, row in zip(prefixes, expected, strict=True)]
    given, mask = padded(ids, lengths, side)
    for use_cache in (True, False):
        found = model.generate(
            input_ids=given, attention_mask=mask.long(), max_new_tokens=8, use_cache=use_cache
        )
        assert found.tolist() == pad_to(rows)


@pytest.mark.parametrize("changes", [{}, {"decoder_start": "bos"}, {"source_bos": True}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_as_the_engine_answers_them(text_model, changes, side, tmp_path):
    from twofold.export import export

    pair = text_model(**changes)
    export(pair, tmp_path / "out", to="hf")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side=side)
    found = model.generate(**inputs, max_new_tokens=12)
    expected = Engine(pair, device="cpu").generate(TEXTS, max_new_tokens=12)
    assert [row[1 : len(c.token_ids) + 1] for row, c in zip(found.tolist(), expected, strict=True)] == [
        list(c.token_ids) for c in expected
    ]


@pytest.mark.parametrize("start", ["bos", "last_source_token"])
def test_a_given_decoder_prefix_leaves_the_source_whole(start):
    pair = build(pair_config(stack(), decoder_start=start))
    model = TwofoldForConditionalGeneration.of(pair)
    ids = random_ids(2, 6)
    prefix = torch.tensor([[2, 9, 7], [2, 5, 3]])
    expected = generate(pair, ids.tolist(), prefix.tolist(), max_new_tokens=5)
    found = model.generate(ids, decoder_input_ids=prefix, max_new_tokens=5)
    assert found[:, 3:].tolist() == pad_to([list(row.token_ids) for row in expected])
    left, mask = padded(prefix, [3, 2], "left")
    expected = generate(pair, ids.tolist(), [[2, 9, 7], [2, 5]], max_new_tokens=5, stop_token_ids=())
    found = model.generate(
        ids, decoder_input_ids=left, decoder_attention_mask=mask.long(), max_new_tokens=5, eos_token_id=None
    )
    if start == "last_source_token":  # else transformers puts another BOS before the padding
        assert found[:, 3:].tolist() == [list(row.token_ids) for row in expected]


@pytest.mark.parametrize("start", ["bos", "last_source_token"])
@pytest.mark.parametrize("index", [0, 5, 15, 17])
def test_beams_as_the_engine_searches(start, index):
    """Beams move in the cache; sources of unequal length."""
    pair = build(pair_config(gemma_stack(), decoder_start=start, **MEETINGS[index]))
    model = TwofoldForConditionalGeneration.of(pair)
    given, mask = padded(random_ids(2, 9), [9, 5], "right")
    found = model.generate(
        given, attention_mask=mask, max_new_tokens=7, num_beams=3, num_return_sequences=2,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    engine = Engine(pair, device="cpu")
    expected = []
    for row, n in zip(given.tolist(), (9, 5), strict=True):
        source, prefix = (row[: n - 1], row[n - 1 : n]) if start == "last_source_token" else (row[:n], [2])
        request = Request(source_ids=source, prefix_ids=prefix, max_new_tokens=7, num_beams=3, n=2)
        expected += engine.submit(request).result()
    rows = [row[1 : len(c.token_ids) + 1] for row, c in zip(found.sequences.tolist(), expected, strict=True)]
    assert rows == [list(c.token_ids) for c in expected]
    assert found.sequences_scores.tolist() == pytest.approx([c.score for c in expected], abs=1e-4)


def test_samples_follow_the_distribution():
    """One step from a uniform draw: 4000 samples of a first token against the model's probabilities."""
    model = TwofoldForConditionalGeneration.of(build(pair_config(stack(), decoder_start="last_source_token")))
    torch.manual_seed(0)
    ids = random_ids(1, 5)
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 4000, "max_new_tokens": 1}
    found = model.generate(ids, **options)[:, 1]
    with torch.no_grad():
        logits = model(ids[:, :-1], decoder_input_ids=ids[:, -1:]).logits[0, -1]
    share = found.bincount(minlength=40) / 4000
    assert (share - logits.softmax(-1)).abs().max() < 0.04


def test_samples_are_reproducible_with_and_without_cache():
    model = TwofoldForConditionalGeneration.of(build(pair_config(stack())))
    ids = random_ids(2, 5)

    def draw(**options):
        torch.manual_seed(3)
        return model.generate(
            ids, do_sample=True, max_new_tokens=9, num_return_sequences=2, **options
        ).tolist()

    assert draw() == draw(use_cache=False)
    assert len({tuple(row) for row in draw()}) == 4


def test_what_generate_refuses():
    model = TwofoldForConditionalGeneration.of(build(pair_config(stack(), decoder_start="last_source_token")))
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match="generate needs input_ids"):
        model.generate(encoder_outputs=model.get_encoder()(ids))
    with pytest.raises(ValueError, match="do not take encoder_outputs"):
        model.generate(ids, encoder_outputs=model.get_encoder()(ids))
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=3)
    with pytest.raises(ValueError, match="a source is empty"):
        model.generate(ids, attention_mask=torch.zeros_like(ids))
