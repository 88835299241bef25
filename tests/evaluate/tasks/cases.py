"""For each local task a few lines of its files, and what a model is asked then, both written by hand."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """Files below the data folder, and the questions that they make, in order, without few-shot examples."""

    files: dict[str, list[dict[str, Any]] | str]
    """Lines of JSON, or a text."""
    choices: list[tuple[list[tuple[str, str]], int]] = field(default_factory=list)
    """(context, continuation) of each choice, and which one is right."""
    written: list[tuple[str, str]] = field(default_factory=list)
    """Prompt and right answer."""
    hub: dict[str, Any] | None = None
    """The first example in the fields of the hub's data set, where the harness renders it with templates alone."""
    wrong: float = 0.0
    """What a model scores that always gives a wrong answer."""
    right: float = 1.0


def write(data: Path, case: Case) -> Path:
    for name, content in case.files.items():
        text = content if isinstance(content, str) else "".join(json.dumps(line) + "\n" for line in content)
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(gzip.compress(text.encode("utf-8")))
    return data


def asked(prompt: str, *answers: str, right: int) -> tuple[list[tuple[str, str]], int]:
    return [(prompt, answer) for answer in answers], right


def _lettered(question: str, *texts: str, gold: int) -> dict[str, Any]:
    letters = "ABCDE"[: len(texts)]
    listed = "".join(f"\n {letter}. {text}" for letter, text in zip(letters, texts, strict=True))
    return {
        "id": "x",
        "query": f"Question: {question}{listed}\nAnswer:",
        "choices": list(letters),
        "gold": gold,
    }


def _arc(name: str) -> Case:
    return Case(
        files={
            f"benchmarks/{name}-test.jsonl.gz": [
                _lettered("What is wet?\nChoose.", "stone", "A. water", "air", gold=1),
                _lettered("Which is 4?", "2 + 2", "2 + 3", gold=0),
            ],
            f"benchmarks/{name}-train.jsonl.gz": [_lettered("What is hot?", "ice", "fire", gold=1)],
        },
        choices=[
            asked("Question: What is wet?\nChoose.\nAnswer:", " stone", " A. water", " air", right=1),
            asked("Question: Which is 4?\nAnswer:", " 2 + 2", " 2 + 3", right=0),
        ],
        hub={
            "question": "What is wet?\nChoose.",
            "choices": {"text": ["stone", "A. water", "air"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
    )


def _glue(file: str, ask: str, labels: tuple[str, str], lines: list[dict[str, Any]]) -> Case:
    return Case(
        files={file: [{**line, "idx": 3} for line in lines]},
        choices=[
            asked(ask.format(**line), *(f" {x}" for x in labels), right=line["label"]) for line in lines
        ],
        hub=lines[0],
    )


_ENTAILS = [
    {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0},
    {"sentence1": "It {{rains}}.", "sentence2": "It is dry.", "label": 1},
]
_RTE = _glue(
    "benchmarks/glue-rte-validation.jsonl.gz",
    "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:",
    ("True", "False"),
    _ENTAILS,
)


def _gsm8k(number: int) -> dict[str, str]:
    return {
        "question": f"What is {number} + 1?",
        "answer": f"It is <<{number}+1={number + 1}>>so.\n#### {number + 1}",
    }


def _math(number: int) -> dict[str, str]:
    return {"problem": f"Halve ${number}$.", "solution": f"It is $\\boxed{{\\frac{{{number}}}{{2}}}}$."}


def _multi30k(source: str, target: str, languages: tuple[str, str]) -> Case:
    texts = {
        "de": "Ein Hund läuft über die Wiese.\nZwei Männer sitzen in einem Boot.\n",
        "en": "A dog runs across the meadow.\nTwo men sit in a small boat.\n",
        "fr": "Un chien court dans le pré.\nDeux hommes sont assis dans un bateau.\n",
    }
    return Case(
        files={
            f"translation/multi30k/{split}.{language}.gz": texts[language]
            for split in ("test_2016_flickr", "val")
            for language in (source, target)
        },
        written=[
            (f"{languages[0]} phrase: {a}\n{languages[1]} phrase:", b)
            for a, b in zip(texts[source].splitlines(), texts[target].splitlines(), strict=True)
        ],
        right=100.0,
    )


CASES: dict[str, Case] = {
    "arc_easy": _arc("arc_easy"),
    "arc_challenge": _arc("arc_challenge"),
    "boolq": Case(
        files={
            "benchmarks/boolq-validation.jsonl.gz": [
                {"question": "is ice cold", "answer": True, "passage": "Ice is cold."},
                {"question": "is fire cold", "answer": False, "passage": "Fire is hot."},
            ],
            "benchmarks/boolq-train.jsonl.gz": [
                {
                    "query": "Sun -- It shines -- by day.\nQuestion: is it dark?\nAnswer:",
                    "choices": ["yes", "no"],
                    "gold": 1,
                }
            ],
        },
        choices=[
            asked("Ice is cold.\nQuestion: is ice cold?\nAnswer:", " no", " yes", right=1),
            asked("Fire is hot.\nQuestion: is fire cold?\nAnswer:", " no", " yes", right=0),
        ],
        hub={"question": "is ice cold", "label": 1, "passage": "Ice is cold."},
    ),
    "piqa": Case(
        files={
            "benchmarks/piqa-validation.jsonl.gz": [
                {"goal": "Open a door", "sol1": "push it", "sol2": "eat it", "label": 0},
                {"goal": "Boil water", "sol1": "cool it", "sol2": "heat it", "label": 1},
            ],
            "benchmarks/piqa-train.jsonl.gz": [
                {"goal": "Sit", "sol1": "on a chair", "sol2": "on air", "label": 0}
            ],
        },
        choices=[
            asked("Question: Open a door\nAnswer:", " push it", " eat it", right=0),
            asked("Question: Boil water\nAnswer:", " cool it", " heat it", right=1),
        ],
        hub={"goal": "Open a door", "sol1": "push it", "sol2": "eat it", "label": 0},
    ),
    "hellaswag": Case(
        files={
            "benchmarks/hellaswag-validation.jsonl.gz": [
                {
                    "activity_label": "Baking",
                    "ctx_a": "A man mixes [step] dough.",
                    "ctx_b": "he",
                    "ctx": "-",
                    "label": "2",
                    "endings": ["flies away.", "sings [title] Opera", "bakes  it.", "is a cat."],
                },
                {
                    "activity_label": "Running",
                    "ctx_a": "A dog runs.",
                    "ctx_b": "",
                    "ctx": "-",
                    "label": "0",
                    "endings": ["It barks.", "It reads.", "It votes.", "It sews."],
                },
            ]
        },
        choices=[
            asked(
                "Baking: A man mixes dough. He",
                " flies away.",
                " sings. Opera",
                " bakes it.",
                " is a cat.",
                right=2,
            ),
            asked("Running: A dog runs.", " It barks.", " It reads.", " It votes.", " It sews.", right=0),
        ],
    ),
    "winogrande": Case(
        files={
            "benchmarks/winogrande-winogrande_xl-validation.jsonl.gz": [
                {
                    "sentence": "Ann beat Bea as _ was fast.",
                    "option1": "Ann",
                    "option2": "Bea",
                    "answer": "1",
                },
                {
                    "sentence": "The ball hit the glass so the _ broke.",
                    "option1": "ball",
                    "option2": "glass",
                    "answer": "2",
                },
            ]
        },
        choices=[
            ([("Ann beat Bea as Ann", " was fast."), ("Ann beat Bea as Bea", " was fast.")], 0),
            (
                [
                    ("The ball hit the glass so the ball", " broke."),
                    ("The ball hit the glass so the glass", " broke."),
                ],
                1,
            ),
        ],
    ),
    "openbookqa": Case(
        files={
            "benchmarks/openbookqa-test.jsonl.gz": [
                _lettered("The sun is", "cold", "hot", "wet", "blue", gold=1),
                _lettered("Ice is", "cold", "hot", "loud", "old", gold=0),
            ],
            "benchmarks/openbookqa-train.jsonl.gz": [
                _lettered("Fire is", "hot", "cold", "wet", "new", gold=0)
            ],
        },
        choices=[
            asked("The sun is", " cold", " hot", " wet", " blue", right=1),
            asked("Ice is", " cold", " hot", " loud", " old", right=0),
        ],
        hub={
            "question_stem": "The sun is",
            "choices": {"text": ["cold", "hot", "wet", "blue"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        },
    ),
    "social_iqa": Case(
        files={
            "benchmarks/social_i_qa-validation.jsonl.gz": [
                {
                    "context": "Al fell.",
                    "question": "How is Al?",
                    "answerA": "hurt",
                    "answerB": "gone",
                    "answerC": "rich",
                    "label": "1",
                },
                {
                    "context": "Al won.",
                    "question": "How is Al?",
                    "answerA": "sad",
                    "answerB": "lost",
                    "answerC": "glad",
                    "label": "3",
                },
            ]
        },
        choices=[
            asked("Q: Al fell. How is Al?\nA:", " hurt", " gone", " rich", right=0),
            asked("Q: Al won. How is Al?\nA:", " sad", " lost", " glad", right=2),
        ],
        hub={
            "context": "Al fell.",
            "question": "How is Al?",
            "answerA": "hurt",
            "answerB": "gone",
            "answerC": "rich",
            "label": "1",
        },
    ),
    "commonsense_qa": Case(
        files={
            "benchmarks/tau-commonsense_qa-validation.jsonl.gz": [
                {
                    "question": " What barks? ",
                    "choices": {"label": list("ABCDE"), "text": ["cat", "dog", "cow", "hen", "pig"]},
                    "answerKey": "B",
                },
                {
                    "question": "What flies?",
                    "choices": {"label": list("ABCDE"), "text": ["cat", "dog", "cow", "jet", "pig"]},
                    "answerKey": "D",
                },
            ]
        },
        choices=[
            asked(
                "Question: What barks?\nA. cat\nB. dog\nC. cow\nD. hen\nE. pig\nAnswer:",
                " A",
                " B",
                " C",
                " D",
                " E",
                right=1,
            ),
            asked(
                "Question: What flies?\nA. cat\nB. dog\nC. cow\nD. jet\nE. pig\nAnswer:",
                " A",
                " B",
                " C",
                " D",
                " E",
                right=3,
            ),
        ],
        hub={
            "question": " What barks? ",
            "choices": {"label": list("ABCDE"), "text": ["cat", "dog", "cow", "hen", "pig"]},
            "answerKey": "B",
        },
    ),
    "lambada_openai": Case(
        files={
            "benchmarks/lambada_openai.jsonl.gz": [
                {"context": 'He said "go.\n\nI saw the', "continuation": "sea"},
                {"context": "We ate  the", "continuation": "cake"},
            ]
        },
        choices=[([('He said "go.\n\nI saw the', " sea")], 0), ([("We ate  the", " cake")], 0)],
        hub={"text": 'He said "go.\n\nI saw the sea'},
    ),
    "mmlu": Case(
        files={
            "benchmarks/mmlu-test.jsonl.gz": [
                {
                    "question": " What is pi? ",
                    "subject": "abstract_algebra",
                    "choices": ["1", "2", "3.14", "4"],
                    "answer": 2,
                },
                {
                    "question": "What is e?",
                    "subject": "abstract_algebra",
                    "choices": ["2.72", "2", "3", "4"],
                    "answer": 0,
                },
                {
                    "question": "Where is the heart?",
                    "subject": "high_school_biology",
                    "choices": ["leg", "arm", "ear", "chest"],
                    "answer": 3,
                },
            ],
            "benchmarks/mmlu-dev.jsonl.gz": [
                {
                    "question": f"Dev {number} of {subject}?",
                    "subject": subject,
                    "choices": list("wxyz"),
                    "answer": number % 4,
                }
                for subject in ("abstract_algebra", "high_school_biology")
                for number in range(6)
            ],
        },
        choices=[
            asked("What is pi?\nA. 1\nB. 2\nC. 3.14\nD. 4\nAnswer:", " A", " B", " C", " D", right=2),
            asked(
                "Where is the heart?\nA. leg\nB. arm\nC. ear\nD. chest\nAnswer:",
                " A",
                " B",
                " C",
                " D",
                right=3,
            ),
            asked("What is e?\nA. 2.72\nB. 2\nC. 3\nD. 4\nAnswer:", " A", " B", " C", " D", right=0),
        ],
        hub={"question": " What is pi? ", "choices": ["1", "2", "3.14", "4"], "answer": 2},
    ),
    "gsm8k": Case(
        files={
            "benchmarks/gsm8k-test.jsonl.gz": [_gsm8k(1), _gsm8k(1233)],
            "benchmarks/gsm8k-train.jsonl.gz": [_gsm8k(number) for number in range(10, 17)],
        },
        written=[
            ("Question: What is 1 + 1?\nAnswer:", " So 1 + 1 = 2.\n#### 2"),
            ("Question: What is 1233 + 1?\nAnswer:", " #### 1,234"),
        ],
        hub=_gsm8k(1),
    ),
    "drop": Case(
        files={
            "benchmarks/drop.jsonl.gz": [
                {"passage": "Ann has 3 cats.", "question": "How many cats?", "answers": [["3"], ["three"]]},
                {"passage": "Bo saw Al and Di.", "question": "Who was seen?", "answers": [["Al", "Di"]]},
            ]
        },
        written=[("Ann has 3 cats. How many cats?", " 3"), ("Bo saw Al and Di. Who was seen?", " Al Di")],
        hub={"passage": "Ann has 3 cats.", "question": "How many cats?", "answer": []},
        # The whole answer is one span: two spans in it share a half at best, (2/3 + 0) / 2 rounded.
        right=0.665,
    ),
    "squad": Case(
        files={
            "benchmarks/squad.jsonl.gz": [
                {
                    "title": "Sea",
                    "query": "Title: Sea\nBackground: The sea is deep.\nQuestion: What is deep?\nAnswer:",
                    "answers_text": ["The sea", "sea"],
                },
                {
                    "title": "Sky",
                    "query": "Title: Sky\nBackground: It is blue.\nQuestion: Which colour?\nAnswer:",
                    "answers_text": ["blue"],
                },
            ]
        },
        written=[
            ("Background: The sea is deep.\nQuestion: What is deep?\nAnswer:", " The sea"),
            ("Background: It is blue.\nQuestion: Which colour?\nAnswer:", " Blue."),
        ],
    ),
    "nq_open": Case(
        files={
            "benchmarks/nq_open-validation.jsonl.gz": [
                {"question": "who sang it", "answer": ["Bob Scott", "Al"]},
                {"question": "when", "answer": ["1972"]},
            ]
        },
        written=[
            ("Answer these questions:\n\nQ: who sang it?\nA:", " al"),
            ("Answer these questions:\n\nQ: when?\nA:", " 1972"),
        ],
        hub={"question": "who sang it", "answer": ["Bob Scott", "Al"]},
    ),
    "math_500": Case(
        files={"benchmarks/minerva_math_500.jsonl.gz": [_math(number) for number in (3, 5, 7, 9, 11, 13)]},
        written=[
            (f"Problem:\nHalve ${number}$.\n\nSolution:", f" It is $\\boxed{{{number / 2}}}$.")
            for number in (3, 5, 7, 9, 11, 13)
        ],
    ),
    "humaneval_bpb": Case(
        files={
            "benchmarks/codex_humaneval.jsonl.gz": [
                {"prompt": "def f():\n", "canonical_solution": "    return 'é'\n"}
            ]
        },
        choices=[([("def f():\n", "    return 'é'\n")], 0)],
        right=0.0,
        wrong=50 / 16 / 0.6931471805599453,  # bits of e**-50 over 16 bytes
    ),
    "mbpp_bpb": Case(
        files={
            "benchmarks/codex_mbpp.jsonl.gz": [
                {
                    "text": "Add one.",
                    "code": "def f(x):\r\n    return x + 1",
                    "test_list": ["assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 4"],
                }
            ]
        },
        choices=[
            (
                [
                    (
                        "You are an expert Python programmer, and here is your task: Add one. Your code should pass "
                        "these tests:\n\nassert f(1) == 2\nassert f(2) == 3\nassert f(3) == 4\n[BEGIN]\n",
                        "def f(x):\n    return x + 1",
                    )
                ],
                0,
            )
        ],
        right=0.0,
        wrong=50 / 26 / 0.6931471805599453,
    ),
    "rte": _RTE,
    "sglue_rte": Case(
        files=_RTE.files,
        choices=_RTE.choices,
        hub={"premise": "It rains.", "hypothesis": "It is wet.", "label": 0},
    ),
    "mrpc": _glue(
        "benchmarks/glue-mrpc-validation.jsonl.gz",
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nQuestion: Do both sentences mean the same thing?\nAnswer:",
        ("no", "yes"),
        _ENTAILS,
    ),
    "sst2": _glue(
        "benchmarks/glue-sst2-validation.jsonl.gz",
        "{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:",
        ("negative", "positive"),
        [{"sentence": "a joy . ", "label": 1}, {"sentence": "so dull", "label": 0}],
    ),
    "wic": Case(
        files={
            "benchmarks/wic/dev.data.txt.gz": "board\tN\t2-1\tRoom and board .\tHe nailed boards .\n"
            "run\tV\t0-1\tRun fast .\tI run .\n",
            "benchmarks/wic/dev.gold.txt.gz": "F\nT\n",
            "benchmarks/wic/train.data.txt.gz": "dog\tN\t0-0\tDogs bark .\tDogs run .\n",
            "benchmarks/wic/train.gold.txt.gz": "T\n",
        },
        choices=[
            asked(
                "Sentence 1: Room and board .\nSentence 2: He nailed boards .\nQuestion: Is the word 'board' used in "
                "the same way in the two sentences above?\nAnswer:",
                " no",
                " yes",
                right=0,
            ),
            asked(
                "Sentence 1: Run fast .\nSentence 2: I run .\nQuestion: Is the word 'Run' used in the same way in the "
                "two sentences above?\nAnswer:",
                " no",
                " yes",
                right=1,
            ),
        ],
        hub={
            "sentence1": "Room and board .",
            "sentence2": "He nailed boards .",
            "start1": 9,
            "end1": 14,
            "label": 0,
        },
    ),
    "cb": Case(
        files={
            "benchmarks/super_glue-cb-validation.jsonl.gz": [
                {"premise": "Did he go?", "hypothesis": "he went", "label": 2},
                {"premise": "He did not go.", "hypothesis": "he went", "label": 1},
            ]
        },
        choices=[
            asked(
                "Did he go?\nQuestion: he went. True, False, or Neither?\nAnswer:",
                " True",
                " False",
                " Neither",
                right=2,
            ),
            asked(
                "He did not go.\nQuestion: he went. True, False, or Neither?\nAnswer:",
                " True",
                " False",
                " Neither",
                right=1,
            ),
        ],
        hub={"premise": "Did he go?", "hypothesis": "he went", "label": 2},
    ),
    "copa": Case(
        files={
            "benchmarks/super_glue-copa-validation.jsonl.gz": [
                {
                    "premise": "He turned the tap.",
                    "choice1": "It burned.",
                    "choice2": "Water ran.",
                    "question": "effect",
                    "label": 1,
                },
                {
                    "premise": "He fell.",
                    "choice1": "He slipped.",
                    "choice2": "He sang.",
                    "question": "cause",
                    "label": 0,
                },
            ]
        },
        choices=[
            asked("He turned the tap therefore", "  it burned.", "  water ran.", right=1),
            asked("He fell because", "  he slipped.", "  he sang.", right=0),
        ],
    ),
    "wsc273": Case(
        files={
            "benchmarks/winograd_wsc.jsonl.gz": [
                {
                    "context_options": ["Al paid Bo as Al", "Al paid Bo as Bo"],
                    "continuation": "had worked.",
                    "gold": 1,
                },
                {
                    "context_options": ["The cup fit as the cup", "The cup fit as the box"],
                    "continuation": "was small.",
                    "gold": 0,
                },
            ]
        },
        choices=[
            ([("Al paid Bo as Al", "  had worked."), ("Al paid Bo as Bo", "  had worked.")], 1),
            ([("The cup fit as the cup", "  was small."), ("The cup fit as the box", "  was small.")], 0),
        ],
    ),
    "scitldr": Case(
        files={
            "summarization/scitldr-a-dev.jsonl.gz": [
                {"source": ["We add.", "It helps."], "target": ["Adding helps a lot.", "We propose adding."]},
                {"source": ["We cut."], "target": ["Cutting is cheap."]},
            ],
            "summarization/scitldr-a-train.jsonl.gz": [{"source": ["We try."], "target": ["Trying works."]}],
        },
        written=[
            ("We add. It helps.\n\nSummarize the text in one sentence.\nSummary:", " We propose adding."),
            ("We cut.\n\nSummarize the text in one sentence.\nSummary:", " Cutting is cheap."),
        ],
        right=100.0,
    ),
    "dialogsum": Case(
        files={
            "summarization/dialogsum-test.jsonl.gz": [
                {
                    "dialogue": "#Person1#: Hi.\n#Person2#: Bye.",
                    "summary1": "They meet.",
                    "summary2": "They part.",
                    "summary3": "A short talk.",
                },
                {"dialogue": "#Person1#: Tea?", "summary1": "Tea is offered."},
            ],
            "summarization/dialogsum-dev.jsonl.gz": [{"dialogue": "#Person1#: No.", "summary": "A refusal."}],
        },
        written=[
            ("#Person1#: Hi.\n#Person2#: Bye.\n\nSummarize the dialogue.\nSummary:", " They part."),
            ("#Person1#: Tea?\n\nSummarize the dialogue.\nSummary:", " Tea is offered."),
        ],
        right=100.0,
    ),
    "multi30k_de_en": _multi30k("de", "en", ("German", "English")),
    "multi30k_fr_en": _multi30k("fr", "en", ("French", "English")),
    "multi30k_en_de": _multi30k("en", "de", ("English", "German")),
    "bbh_zeroshot_boolean_expressions": Case(
        files={
            "benchmarks/bbh/boolean_expressions.json.gz": json.dumps(
                {
                    "canary": "x",
                    "examples": [
                        {"input": "not False is", "target": "True"},
                        {"input": "not True is", "target": "False"},
                    ],
                },
                indent=1,
            )
        },
        written=[
            (
                "Evaluate the result of a random Boolean expression.\n\nQ: not False is\nA:",
                " It is True, as you see.",
            ),
            ("Evaluate the result of a random Boolean expression.\n\nQ: not True is\nA:", " False"),
        ],
        hub={"input": "not False is", "target": "True"},
    ),
}
