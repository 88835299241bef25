"""What the study relies on: likelihoods that are the donor's, and files that are compared piece by piece."""

from pathlib import Path

import pytest
import torch

from benchmarks.study.likelihood import Question, Task, log_likelihoods, pick
from benchmarks.study.results import differences
from tests.models.hf import donor, gemma3_config, llama_config, lossless_pair


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
