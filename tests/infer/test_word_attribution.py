"""Words against sums over tokens, written out."""

import pytest
import torch

import twofold
from tests.models.tiny import assert_same
from twofold.infer.attribution import attribute
from twofold.infer.word_attribution import WordAttribution

CHAT = [{"role": "user", "content": "two words"}]


@pytest.fixture
def engine(text_model):
    return twofold.Engine(text_model(), device="cpu", backend="torch")


def ids(engine_or_model, text):
    return engine_or_model.tokenizer(text)["input_ids"]


def test_a_conversation_word_by_word(engine):
    found = engine.attribute(CHAT, "an answer", keep="all")
    text = "<|im_start|>user\ntwo words<|im_end|>\n<|im_start|>assistant\n"
    assert found.source_text == text
    words = [text[a:b] for a, b in found.source_words]
    assert words == ["<|im_start|>", "user", "two", "words", "<|im_end|>", "<|im_start|>", "assistant"]
    assert [found.answer_text[a:b] for a, b in found.answer_words] == ["an", "answer"]

    source = engine.tokenizer("<|im_start|>user\ntwo words<|im_end|>\n")["input_ids"]
    prefix = engine.tokenizer("<|im_start|>assistant\n")["input_ids"]
    tokens = attribute(engine.model, source, prefix, ids(engine, "an answer"), keep="all")
    rows = [tokens.weights[:, :, :2].mean(2), tokens.weights[:, :, 3:].mean(2)]
    places = {"user": (1, 5), "two": (6, 9), "words": (10, 15)}
    for a, row in enumerate(rows):
        for w, word in enumerate(words):
            expected = row[..., slice(*places.get(word, (0, 0)))].sum(-1)
            assert_same(found.weights[:, :, a, w], expected)
        assert_same(found.sink[:, :, a], row[..., 0] + row[..., 15])
        assert_same(found.elsewhere[:, :, a], row[..., 5] + row[..., 9] + row[..., 16])
    whole = found.weights.sum(-1) + found.sink + found.own + found.elsewhere
    assert_same(whole, torch.ones_like(whole))


def test_a_text_whose_first_token_is_a_word_and_whose_last_is_the_decoders(engine):
    found = engine.attribute("ab cd", "x", layers=[1], heads=[0])
    tokens = attribute(
        engine.model, ids(engine, "ab c"), ids(engine, "d"), ids(engine, "x"), layers=[1], heads=[0]
    )
    weights = tokens.weights[0, 0, 0]
    assert_same(found.weights[0, 0, 0], torch.stack([weights[1], weights[3]]))
    assert_same(found.sink[0, 0, 0], weights[0])


def test_a_bos_in_front_or_taken_away_moves_nothing(text_model):
    """A published pair whose encoder starts with BOS, and one whose template's BOS is dropped."""
    with_bos = twofold.Engine(
        text_model(decoder_start="bos", source_bos=True, layout="separate", reads="final"),
        device="cpu",
        backend="torch",
    )
    found = with_bos.attribute("ab cd", "x y")
    tokens = attribute(with_bos.model, [256, *ids(with_bos, "ab cd")], [256], ids(with_bos, "x y"))
    expected = torch.stack([tokens.weights[0, 0, :, 1:3].sum(-1), tokens.weights[0, 0, :, 4:].sum(-1)], -1)
    assert_same(found.weights[0, 0], expected[[0, 2]])
    assert found.own.max() == 0.0

    model = text_model(decoder_start="bos", layout="separate", reads="final")
    model.tokenizer.chat_template, kept = (
        "{{ '<|im_start|>' + messages[0]['content'] }}",
        model.tokenizer.chat_template,
    )
    try:
        found = twofold.Engine(model, device="cpu", backend="torch").attribute(
            [{"role": "user", "content": "ab"}], "x"
        )
    finally:
        model.tokenizer.chat_template = kept
    tokens = attribute(model, ids(model, "ab"), [256], ids(model, "x"))
    assert_same(found.weights[0, 0, 0], torch.tensor([0.0, tokens.weights[0, 0, 0, 1].item()]))
    assert_same(found.sink[0, 0, 0], tokens.weights[0, 0, 0, 0])


def test_generated_tokens_and_their_text_are_the_same_answer(engine):
    """The end token is a row of its own, and of no word."""
    given, generated = (
        engine.attribute(CHAT, "an answer"),
        engine.attribute(CHAT, [*ids(engine, "an answer"), 257]),
    )
    assert generated.answer_text == "an answer"
    assert generated.answer_words == given.answer_words
    assert_same(generated.weights, given.weights)


def test_what_is_shown():
    weights = torch.tensor([[[[0.1, 0.3, 0.0], [0.0, 0.1, 0.1], [0.0, 0.0, 0.0]]]])
    none = torch.zeros(1, 1, 3)
    found = WordAttribution(
        "a b c", [(0, 1), (2, 3), (4, 5)], "x y z", [(0, 1), (2, 3), (4, 5)], weights, none, none, none
    )
    assert_same(found.highlights[0, 0], torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 0.0]]))
    mean = torch.tensor([0.25, 1.25, 0.5]) / 3
    assert_same(found.distinctive[0, 0], (found.highlights[0, 0] - mean).clamp(min=0))


def test_bad_input(engine, word_tokenizer):
    with pytest.raises(ValueError, match="source and an answer, got 5 and 0 tokens"):
        engine.attribute("ab cde", "")
    with pytest.raises(ValueError, match="max_position_embeddings of 256"):
        engine.attribute("ab", "x" * 300)
    engine.model.tokenizer = engine.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        engine.attribute("ab", "x")
