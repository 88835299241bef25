"""Every local task asks and scores as it should: against strings written by hand, and the harness's own task files."""

import ast
import itertools
import math
import random
import re
import string
from pathlib import Path

import lm_eval.tasks
import pytest
import yaml
from lm_eval import evaluate
from lm_eval.api.model import LM
from lm_eval.utils import apply_template

from tests.evaluate.tasks.cases import CASES, Case, write
from twofold.evaluate import tasks
from twofold.evaluate.tasks.local import LOCAL

BBH = dict.fromkeys(LOCAL["bbh_zeroshot"].members, "(A)") | {
    "bbh_zeroshot_boolean_expressions": "True",
    "bbh_zeroshot_causal_judgement": "Yes",
    "bbh_zeroshot_dyck_languages": "] ]",
    "bbh_zeroshot_multistep_arithmetic_two": "-24",
    "bbh_zeroshot_navigate": "No",
    "bbh_zeroshot_web_of_lies": "Yes",
}  # fmt: skip


class Told(LM):
    """Answers what it was told for a prompt, which may have few-shot examples in front; all else is unlikely."""

    def __init__(self, likely=(), answers=()):
        super().__init__()
        self.likely, self.answers = list(likely), list(answers)

    def loglikelihood(self, requests):
        return [(0.0, True) if self._is_likely(*request.args) else (-50.0, False) for request in requests]

    def loglikelihood_rolling(self, requests):
        return [-10.0 for _ in requests]

    def generate_until(self, requests):
        return [self._answer(request.args[0]) for request in requests]

    def _answer(self, context):
        return next((answer for prompt, answer in self.answers if context.endswith(prompt)), "nothing")

    def _is_likely(self, context, continuation):
        return any(context.endswith(c) and continuation == wanted for c, wanted in self.likely)


def run(task, model, limit=None):
    """`lm_eval.simple_evaluate` without what it finds out about the machine."""
    loaded = lm_eval.tasks.TaskManager(include_defaults=False).load([task])
    for one in loaded["tasks"].values():
        one.set_fewshot_seed(0)
        if one.get_config("num_fewshot") is None:
            one.set_config("num_fewshot", 0)
    return evaluate(model, loaded, limit=limit, bootstrap_iters=0)


def score(name, results):
    metric, _ = tasks.main_metric(name)
    found = results["results"][name]
    return found[metric] if "," in metric else found[f"{metric},none"]


def gold(case: Case) -> Told:
    return Told([choices[right] for choices, right in case.choices], case.written)


def wrong(case: Case) -> Told:
    others = [pair for choices, right in case.choices for i, pair in enumerate(choices) if i != right]
    return Told(others)


def test_every_local_task_has_a_case():
    tested_below = {"wikitext2", "bbh_zeroshot", *LOCAL["bbh_zeroshot"].members}
    assert set(CASES) | tested_below == set(LOCAL)


@pytest.mark.parametrize("name", CASES)
def test_what_is_asked(name, tmp_path):
    case = CASES[name]
    (task,) = tasks.resolve([name], write(tmp_path, case))
    assert task.task_name == name
    task.set_config("num_fewshot", 0)
    task.build_all_requests()
    asked = [instance.args for instance in task.instances]
    if name == "mmlu":  # its description is tested below
        asked = [(prompt.split("\n\n")[1], answer) for prompt, answer in asked]
    if case.choices:
        assert asked == [pair for choices, _ in case.choices for pair in choices]
    else:
        assert [prompt for prompt, _ in asked] == [prompt for prompt, _ in case.written]


@pytest.mark.filterwarnings("ignore:F-score is ill-defined")
@pytest.mark.parametrize("name", CASES)
def test_right_and_wrong_answers(name, tmp_path):
    case = CASES[name]
    (task,) = tasks.resolve([name], write(tmp_path, case))
    results = run(task, gold(case))
    assert score(name, results) == pytest.approx(case.right)
    assert results["n-samples"][name]["original"] == len(case.choices) + len(case.written)
    (task,) = tasks.resolve([name], tmp_path)
    assert score(name, run(task, wrong(case))) == pytest.approx(case.wrong)


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if len(case.choices) > 1 and case.right == 1]
)
def test_one_right_answer(name, tmp_path):
    """A score is the mean over examples."""
    case = CASES[name]
    (task,) = tasks.resolve([name], write(tmp_path, case))
    one_right = Told([case.choices[0][0][case.choices[0][1]], *wrong(Case({}, case.choices[1:])).likely])
    assert score(name, run(task, one_right)) == pytest.approx(1 / len(case.choices))


class _Loader(yaml.SafeLoader):
    """Functions stay out."""


_Loader.add_constructor("!function", lambda loader, node: None)


def harness_file(folder: str, name: str) -> dict:
    """The harness's task file as it lies there, without code of the harness."""
    root = Path(lm_eval.tasks.__file__).parent / folder
    for file in sorted(root.glob("*.yaml")):
        found = _with_includes(file)
        if found.get("task") == name:
            return found
    raise AssertionError(f"no {name} in {root}")


def _with_includes(file: Path) -> dict:
    found = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    included = found.pop("include", None)
    return {**(_with_includes(file.parent / included) if included else {}), **found}


def rendered(template: str, doc: dict) -> str:
    return str(doc[template]) if template in doc else apply_template(template, doc)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.hub is not None])
def test_wording_is_the_harness_s(name, tmp_path):
    """What its task file makes of the hub's example is what the local line became."""
    case, local = CASES[name], LOCAL[name]
    (task,) = tasks.resolve([name], write(tmp_path, case))
    doc = task.eval_docs[0]
    found = harness_file(local.folder, local.base or name)
    assert task.doc_to_text(doc) == rendered(found["doc_to_text"], case.hub)
    if name != "drop":  # its target is never asked for
        assert str(task.doc_to_target(doc)) == rendered(found["doc_to_target"], case.hub)
    if choices := found.get("doc_to_choice"):
        wanted = choices if isinstance(choices, list) else ast.literal_eval(rendered(choices, case.hub))
        assert task.doc_to_choice(doc) == wanted
    for key in ("output_type", "target_delimiter", "fewshot_delimiter", "repeats"):
        if key in found:
            assert task.get_config(key) == found[key]
    assert [m["metric"] for m in task.get_config("metric_list")] == [
        m["metric"] for m in found["metric_list"]
    ]
    if "generation_kwargs" in found:
        assert task.get_config("generation_kwargs") == found["generation_kwargs"]


def test_mbpp_is_asked_in_the_harness_s_words(tmp_path):
    (task,) = tasks.resolve(["mbpp_bpb"], write(tmp_path, CASES["mbpp_bpb"]))
    doc = {"text": "Add one.", "test_list": ["assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 4"]}
    assert task.doc_to_text(task.eval_docs[0]) == apply_template(
        harness_file("mbpp", "mbpp")["doc_to_text"], doc
    )


def test_subjects_of_mmlu_are_named_as_the_harness_does(tmp_path):
    (task,) = tasks.resolve(["mmlu"], write(tmp_path, CASES["mmlu"]))
    folder = Path(lm_eval.tasks.__file__).parent / "mmlu/default"
    files = [yaml.load(file.read_text(encoding="utf-8"), _Loader) for file in folder.glob("mmlu_*.yaml")]
    subjects = {file["dataset_name"]: file["description"] for file in files}
    assert len(subjects) == 57
    for subject, description in subjects.items():
        assert task.resolve_field({"subject": subject}, task.get_config("description")) == description


def test_shots_of_mmlu_are_the_subject_s_first_five(tmp_path):
    (task,) = tasks.resolve(["mmlu"], write(tmp_path, CASES["mmlu"]))
    task.build_all_requests()
    contexts = [instance.args[0] for instance in task.instances if instance.idx == 0]
    for context, subject in zip(
        contexts, ("abstract algebra", "high school biology", "abstract algebra"), strict=True
    ):
        shots = [
            f"Dev {number} of {subject.replace(' ', '_')}?\nA. w\nB. x\nC. y\nD. z\nAnswer: {'ABCD'[number % 4]}\n\n"
            for number in range(5)
        ]
        start = f"The following are multiple choice questions (with answers) about {subject}.\n\n" + "".join(
            shots
        )
        assert context.startswith(start)
        assert context.count("Answer:") == 6


@pytest.mark.parametrize(
    ("name", "shot"),
    [
        ("arc_easy", "Question: What is hot?\nAnswer: fire"),
        ("openbookqa", "Fire is hot"),
        ("boolq", "It shines -- by day.\nQuestion: is it dark?\nAnswer: no"),
        ("piqa", "Question: Sit\nAnswer: on a chair"),
        (
            "wic",
            "Sentence 1: Dogs bark .\nSentence 2: Dogs run .\nQuestion: Is the word 'Dogs' used in the same way in the "
            "two sentences above?\nAnswer: yes",
        ),
        ("scitldr", "We try.\n\nSummarize the text in one sentence.\nSummary: Trying works."),
        ("dialogsum", "#Person1#: No.\n\nSummarize the dialogue.\nSummary: A refusal."),
        ("squad", "Background: It is blue.\nQuestion: Which colour?\nAnswer: blue"),
        ("sst2", "so dull\nQuestion: Is this sentence positive or negative?\nAnswer: negative"),
    ],
)
def test_one_shot(name, shot, tmp_path):
    """In front of the first question; from the other questions where there is no split for it."""
    (task,) = tasks.resolve([name], write(tmp_path, CASES[name]))
    doc = task.eval_docs[0]
    assert task.fewshot_context(doc, 1) == f"{shot}\n\n{task.doc_to_text(doc)}"


def test_shots_come_from_their_own_split(tmp_path):
    """Five of GSM8K, other ones for another seed, the same again for the same."""
    (task,) = tasks.resolve(["gsm8k"], write(tmp_path, CASES["gsm8k"]))

    def context(seed):
        task.set_fewshot_seed(seed)
        return task.fewshot_context(task.eval_docs[0], 5)

    first = context(1)
    assert first.endswith("\n\nQuestion: What is 1 + 1?\nAnswer:")
    shots = re.findall(r"Question: What is (\d+) \+ 1\?\nAnswer: It is <<.*?>>so\.\n#### (\d+)\n\n", first)
    assert len({a for a, _ in shots}) == 5
    assert all(10 <= int(a) < 17 and int(b) == int(a) + 1 for a, b in shots)
    assert context(1) == first
    assert context(2) != first


def test_a_question_is_not_among_its_shots(tmp_path):
    (task,) = tasks.resolve(["math_500"], write(tmp_path, CASES["math_500"]))
    task.set_fewshot_seed(0)
    task.build_all_requests()
    for instance, number in zip(task.instances, (3, 5, 7, 9, 11, 13), strict=True):
        *shots, question = re.findall(r"Halve \$(\d+)\$", instance.args[0])
        assert int(question) == number
        assert len(set(shots)) == 4
        assert question not in shots


def test_a_limit_takes_of_every_subject(tmp_path):
    (task,) = tasks.resolve(["mmlu"], write(tmp_path, CASES["mmlu"]))
    results = run(task, Told(), limit=2)
    asked = [sample["doc"]["subject"] for sample in results["samples"]["mmlu"]]
    assert asked == ["abstract_algebra", "high_school_biology"]


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("1233 + 1 = 1234.\n#### 1234", 1, 1),
        ("#### 1,234.", 1, 1),
        ("The answer is $1,234", 0, 1),
        ("#### 1234\n\nThen 7 more", 1, 0),
        ("#### 123", 0, 0),
        ("none", 0, 0),
    ],
)
def test_gsm8k_takes_the_number_behind_the_mark_or_the_last(answer, strict, flexible, tmp_path):
    (task,) = tasks.resolve(["gsm8k"], write(tmp_path, CASES["gsm8k"]))
    results = run(task, Told(answers=[("1233 + 1?\nAnswer:", answer)]))
    found = results["results"]["gsm8k"]
    assert found["exact_match,strict-match"] == strict / 2
    assert found["exact_match,flexible-extract"] == flexible / 2


def _drop_reference(answer: str, spans: list[str]) -> tuple[float, float]:
    """The rules of the DROP paper, 2019, section 5.1, over all alignments: for a handful of spans."""

    def words(text):
        found = []
        for word in re.split(r"[ -]", text.lower()):
            is_number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", word) is not None
            word = word if is_number else "".join(c for c in word if c not in string.punctuation)
            word = re.sub(r"^(a|an|the)$", "", word)
            found.append(str(float(word)) if re.fullmatch(r"(\d+\.?\d*|\.\d+)", word) else word)
        return [word for word in found if word]

    def f1(one, other):
        numbers = {word for word in other if re.fullmatch(r"[\d.]+", word)}
        if numbers and not numbers & one:
            return 0.0
        if not one or not other:
            return float(one == other)
        return 2 * len(one & other) / (len(one) + len(other))

    mine, golds = words(answer), [words(span) for span in spans]
    best = max(f1(set(mine), set(gold)) for gold in golds)
    return float([mine] == golds), round(best / len(golds), 2)


def test_drop_scores_by_its_paper(tmp_path):
    (task,) = tasks.resolve(["drop"], write(tmp_path, CASES["drop"]))
    rng = random.Random(0)
    vocabulary = [
        "the",
        "a",
        "An",
        "cats",
        "Cat's",
        "12",
        "12.0",
        "7,000",
        "7000",
        "first-half",
        "3.5",
        "Bo",
        "$5",
        "(x)",
    ]
    cases = [
        (" ".join(rng.choices(vocabulary, k=rng.randint(1, 4))), [
            " ".join(rng.choices(vocabulary, k=rng.randint(1, 3))) for _ in range(rng.randint(1, 3))
        ])
        for _ in range(2000)
    ]  # fmt: skip
    cases = [(a, spans) for a, spans in cases if a.split()[0].lower() not in ("the", "a", "an")]
    for answer, spans in [
        *cases,
        ("12 cats", ["12"]),
        ("the cat", ["cat"]),
        ("7-0", ["7", "0"]),
        ("", ["x"]),
    ]:
        found = task.process_results({"answers": [spans]}, [answer])
        assert (found["em"], found["f1"]) == pytest.approx(_drop_reference(answer, spans)), (answer, spans)
    several = task.process_results({"answers": [["2"], ["two dogs"]]}, ["two dogs"])
    assert several == {"em": 1.0, "f1": 1.0}


def test_wikitext_counts_the_words_of_its_articles(tmp_path):
    text = " \n = Homarus = \n \n Lobsters , in a sea . \n = = Size = = \n 0 @.@ 7 kg \n = Next = \n A b . \n"
    case = Case({"corpora/wikitext2-valid.txt.gz": text})
    (task,) = tasks.resolve(["wikitext2"], write(tmp_path, case))
    first, second = (doc["page"] for doc in task.eval_docs)
    assert first == " = Homarus = \n \n Lobsters , in a sea . \n = = Size = = \n 0 @.@ 7 kg "
    assert second == " = Next = \n A b . "
    assert task.doc_to_target({"page": first}) == " = Homarus =\n\nLobsters, in a sea.\n== Size ==\n0.7 kg "
    results = run(task, Told())["results"]["wikitext2"]
    n_words = len(re.split(r"\s+", first)) + len(re.split(r"\s+", second))
    assert results["word_perplexity,none"] == pytest.approx(math.exp(20 / n_words))
    assert results["bits_per_byte,none"] == pytest.approx(20 / len(first + second) / math.log(2))


def test_bbh_is_one_score_over_its_tasks(tmp_path):
    n_examples = itertools.count(1)
    files = {}
    for name in BBH:
        lines = [
            f'{{"input": "{name} {i}\\nOptions:\\n(A) yes\\n(B) no", "target": "{BBH[name]}"}}'
            for i in range(next(n_examples) % 3 + 1)
        ]
        file = name.removeprefix("bbh_zeroshot_")
        files[f"benchmarks/bbh/{file}.json.gz"] = f'{{"examples": [{", ".join(lines)}]}}'
    (found,) = tasks.resolve(["bbh_zeroshot"], write(tmp_path, Case(files)))
    knows = ["bbh_zeroshot_snarks", "bbh_zeroshot_dyck_languages", "bbh_zeroshot_multistep_arithmetic_two"]
    answers = [
        (f"{name} {i}\nOptions:\n(A) yes\n(B) no\nA:", f" {BBH[name]}") for name in BBH for i in range(3)
    ]
    assert score("bbh_zeroshot", run(found, Told(answers=answers))) == 1
    (found,) = tasks.resolve(["bbh_zeroshot"], tmp_path)
    results = run(found, Told(answers=[(p, a) for p, a in answers if p.split()[0] in knows]))
    sizes = {name: n["original"] for name, n in results["n-samples"].items()}
    assert len(sizes) == 18
    wanted = sum(sizes[name] for name in knows) / sum(sizes.values())
    assert score("bbh_zeroshot", results) == pytest.approx(wanted)
    assert 0 < wanted < 1
