"""Scores against values computed by hand and, where there is one, another implementation."""

import random

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from twofold.evaluate.tasks import scoring


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("The Sea!", ["sea"], 1, 1),
        (" in 1,972 ", ["1972"], 0, 2 / 3),
        ("red red blue", ["red"], 0, 1 / 2),
        ("red red blue", ["red red"], 0, 4 / 5),
        ("a cat", ["dog", "cat"], 1, 1),
        ("theatre", ["the atre"], 0, 0),
        ("green", ["blue"], 0, 0),
        ("", ["blue"], 0, 0),
        ("the", ["an"], 1, 1),
    ],
)
def test_squad(answer, references, exact, f1):
    assert scoring.squad_exact(answer, references) == exact
    assert scoring.squad_f1(answer, references) == pytest.approx(f1)


def test_rouge_by_hand():
    """Of 3 and 4 words 3 are shared, of 2 and 3 pairs one, and the longest common subsequence has 2."""
    found = scoring.rouge("cats dogs birds", ["dogs cats and birds"])
    assert found == pytest.approx({"rouge1": 600 / 7, "rouge2": 0, "rougeL": 400 / 7})
    assert scoring.rouge("dogs running", ["a dog runs"])["rouge2"] == pytest.approx(100 * 2 / 3)  # stems


def test_rouge_takes_each_metric_s_best_reference():
    references = ["alpha beta gamma delta", "delta gamma beta alpha one", "alpha two"]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    each = [scorer.score(reference, "alpha beta one two") for reference in references]
    found = scoring.rouge("alpha beta one two", references)
    assert found == {name: 100 * max(score[name].fmeasure for score in each) for name in found}


def test_translation_is_scored_over_the_corpus():
    pairs = [
        ("a dog runs in the park today and sleeps", "a dog runs in a park today"),
        ("two men sit in a boat", "two men sit in a boat"),
    ]
    references, answers = [[a for a, _ in pairs]], [b for _, b in pairs]
    assert scoring.bleu(pairs) == pytest.approx(sacrebleu.BLEU().corpus_score(answers, references).score)
    assert scoring.chrf(pairs) == pytest.approx(sacrebleu.CHRF().corpus_score(answers, references).score)
    means = [scoring.bleu([pair]) for pair in pairs]
    assert scoring.bleu(pairs) != pytest.approx(sum(means) / 2)
    assert scoring.bleu([(b, b) for b in answers]) == pytest.approx(100)


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("So it is $\\boxed{\\frac{1}{2}}$.", True),
        ("The answer is $0.5$.", True),
        ("The answer is $\\frac{2}{4}$. I hope it is correct.", True),
        ("The answer is $2$.", False),
        ("", False),
    ],
)
def test_mathematics_is_compared_by_value(answer, is_right):
    assert scoring.math_equal(answer, "We get $x = \\boxed{\\tfrac12}$.") == is_right


def test_f1_is_symmetric():
    rng = random.Random(0)
    for _ in range(200):
        one, other = (" ".join(rng.choices("abcdef", k=rng.randint(0, 5))) for _ in range(2))
        assert scoring.squad_f1(one, [other]) == scoring.squad_f1(other, [one])
