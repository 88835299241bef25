"""What the study relies on: likelihoods that are the donor's, and files that are compared piece by piece."""

from pathlib import Path

import pytest
import torch

from benchmarks.study.later_keys import Look, scores, set_looks
from benchmarks.study.likelihood import Question, Task, log_likelihoods, pick
from benchmarks.study.results import differences
from tests.models.hf import donor, gemma3_config, llama_config, lossless_pair
from tests.models.tiny import assert_same, differ, random_ids
from twofold.models.masks import Tokens


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(character) % 20 for character in text]}


@pytest.mark.parametrize("config", [llama_config(), gemma3_config()], ids=["llama", "gemma3"])
def test_log_likelihoods_of_choices_are_the_donors(config):
    theirs = donor(config)
    model = lossless_pair(theirs)
    model.tokenizer = Letters()
    question = Question("What is it? Answer:", ("a", "something longer", "no"), 1)
    expected = []
    for choice in question.choices:
        whole = torch.tensor(
            [Letters()(f"{question.context} {choice}", add_special_tokens=False)["input_ids"]]
        )
        if model.config.source_bos:
            whole = torch.cat([torch.tensor([[model.config.bos_token_id]]), whole], dim=1)
        with torch.no_grad():
            log_p = theirs(whole, use_cache=False).logits.log_softmax(-1)
        n = len(choice) + 1  # the space before it
        expected.append(log_p[0, -n - 1 : -1].gather(1, whole[0, -n:, None]).sum())
    torch.testing.assert_close(
        log_likelihoods(model, question), torch.stack(expected).double(), rtol=0, atol=1e-4
    )


def test_the_longer_choice_wins_per_character():
    question = Question("", ("ab", "abcdefgh"), 1)
    likelihoods = torch.tensor([-4.0, -8.0])
    assert pick(Task("", lambda record: question), question, likelihoods) == 0
    assert pick(Task("", lambda record: question, is_per_character=True), question, likelihoods) == 1


def test_unequal_numbers_of_pieces_are_refused():
    assert differences([3.0, 2.0], [1.0, 2.0], Path("start-sink.json")) == [2.0, 0.0]
    with pytest.raises(
        ValueError, match=r"start-sink\.json was measured on 2 pieces, the donor beside it on 3"
    ):
        differences([3.0, 2.0], [1.0, 2.0, 3.0], Path("start-sink.json"))


@torch.no_grad()
def test_looks_agree_with_the_library_where_it_has_them():
    model = lossless_pair(donor(gemma3_config(sliding_window=40)))
    ids, decoder_ids = random_ids(2, 14), random_ids(2, 5)

    def logits() -> torch.Tensor:
        return model(ids, None, decoder_ids).logits

    causal = logits()
    model.set_encoder_mask("sink", future_weight=0.1)
    faint = logits()
    model.set_encoder_mask("causal")
    assert differ(causal, faint)
    for look, expected in [(Look(weight=0.1), faint), (Look(share=1e-9), causal)]:
        set_looks(model, lambda i, n, look=look: look)
        assert_same(logits(), expected)
    set_looks(model, lambda i, n: None)
    assert_same(logits(), causal)


@torch.no_grad()
def test_mirrored_keys_count_as_if_they_stood_before():
    """With one token repeated, what counts is distance alone: the middle query weighs both sides alike."""
    model = lossless_pair(donor(llama_config()))
    layer = model.encoder.layers[0]
    tokens = Tokens.from_segments(torch.ones(1, 7, dtype=torch.int64))
    read = layer.pre_self_attn_layernorm(model.encoder.embed_tokens(torch.full((1, 7), 5)))
    cos, sin = model.encoder.rope(tokens.positions)["full_attention"]
    before = scores(layer.self_attn, read, (cos, sin))[0, :, 3, :3]
    after = scores(layer.self_attn, read, (cos, -sin))[0, :, 3, 4:]
    assert_same(after, before.flip(-1))
