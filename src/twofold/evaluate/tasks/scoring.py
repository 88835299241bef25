"""Scores of written answers, where a task has no scorer of the harness: pure functions on strings.

GSM8K's extraction, DROP's F1 and the code of BIG-Bench Hard are the harness's own, with their task files.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

ROUGE = ("rouge1", "rouge2", "rougeL")


def squad_exact(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references after SQuAD's normalisation, else 0 (Rajpurkar et al. 2016)."""
    return float(any(_squad_tokens(answer) == _squad_tokens(reference) for reference in references))


def squad_f1(answer: str, references: Sequence[str]) -> float:
    """F1 of the words that answer and reference share, the best over references (Rajpurkar et al. 2016, 6.1).

    Words count as often as they stand there, after normalisation: lower case, without punctuation and articles. Two
    empty strings agree.
    """
    return max(_f1(_squad_tokens(answer), _squad_tokens(reference)) for reference in references)


def rouge(answer: str, references: Sequence[str]) -> dict[str, float]:
    """F1 of ROUGE-1, 2 and L times 100, each the best over references (Lin 2004), with Porter's stemmer.

    Raises:
        ImportError: rouge-score is missing.
    """
    scores = [_rouge_scorer().score(reference, answer) for reference in references]
    return {name: 100 * max(score[name].fmeasure for score in scores) for name in ROUGE}


def bleu(pairs: Sequence[tuple[str, str]]) -> float:
    """Corpus BLEU of (reference, answer) pairs, 0 to 100, by sacrebleu's defaults (Post 2018).

    Raises:
        ImportError: sacrebleu is missing.
    """
    references, answers = zip(*pairs, strict=True)
    return float(_sacrebleu().corpus_bleu(answers, [references]).score)


def chrf(pairs: Sequence[tuple[str, str]]) -> float:
    """Corpus chrF of (reference, answer) pairs, 0 to 100, by sacrebleu's defaults (Popović 2015).

    Raises:
        ImportError: sacrebleu is missing.
    """
    references, answers = zip(*pairs, strict=True)
    return float(_sacrebleu().corpus_chrf(answers, [references]).score)


def math_equal(answer: str, solution: str) -> float:
    """1 if the last result in the answer has the value of the one in the solution, by math-verify; else 0.

    Raises:
        ImportError: math-verify is missing.
    """
    try:
        import math_verify
    except ImportError as error:
        raise ImportError('checking mathematics needs math-verify: pip install "twofold[eval]"') from error
    return float(math_verify.verify(math_verify.parse(solution), math_verify.parse(answer)))


def _squad_tokens(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    shared = (Counter(answer) & Counter(reference)).total()
    return 2 * shared / (len(answer) + len(reference))


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError('ROUGE needs the package rouge-score: pip install "twofold[eval]"') from error
    return RougeScorer(ROUGE, use_stemmer=True)


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError('BLEU and chrF need the package sacrebleu: pip install "twofold[eval]"') from error
    return sacrebleu
