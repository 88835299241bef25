"""Rewards: what each gives, how they are added up, and what is said where one fails."""

import math
import time

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from tests.posttrain.tiny_pairs import reward_recipe
from twofold.config.rewards import RewardConfig
from twofold.data.sources import BadRecord
from twofold.posttrain.pair_runs import train_reward
from twofold.posttrain.prompts import Prompt
from twofold.posttrain.reward import load_reward_model
from twofold.posttrain.rewards import RewardError, Rewards, code_of
from twofold.posttrain.sandbox import Limits, passes

GSM8K = "She sold 48/2 = <<48/2=24>>24 in May.\nTogether 48+24 = <<48+24=72>>72.\n#### 72"


def config(**values):
    return TypeAdapter(RewardConfig).validate_python(values)


def score(completions, records=None, prompt="p", **values):
    """What one reward gives."""
    records = records or [{}] * len(completions)
    prompts = [
        Prompt(np.array([1]), np.array([2]), prompt, record, f"file, line {n + 1}")
        for n, record in enumerate(records)
    ]
    rewards = Rewards([config(**values)])
    return next(iter(rewards.score(prompts, completions).by_name.values())).tolist()


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("It is 72.", GSM8K, 1.0),
        ("First 48, then 24, so 72 clips.\n#### 72", GSM8K, 1.0),
        ("#### 24", GSM8K, 0.0),
        ("24", GSM8K, 0.0),
        ("I cannot say", GSM8K, 0.0),
        ("", GSM8K, 0.0),
        ("#### 72\nThat was 71 of 90", GSM8K, 1.0),
        ("the price is $1,200", "1200", 1.0),
        (r"so \boxed{\frac{1}{2}}", "0.5", 1.0),
        ("#### 12", 12, 1.0),
        ("#### 12", ["#### 12"], 1.0),
    ],
)
def test_math(completion, answer, expected):
    assert score([completion], [{"answer": answer}], kind="math") == [expected]


def test_exact_match_rouge_format_and_length():
    records = [{"answer": "The Danube"}, {"answer": ["Rhine", "the Elbe"]}, {"answer": "Oder"}]
    assert score(["danube!", "Elbe", "Odra"], records, kind="exact_match") == [1.0, 1.0, 0.0]
    # LCS "the cat sat" of 3 in 4 and 3 words: recall 3/3, precision 3/4.
    (found,) = score(["the cat sat down"], [{"answer": "the cat sat"}], kind="rouge")
    assert found == pytest.approx(2 * 0.75 / 1.75)
    (found,) = score(["a b c"], [{"refs": ["x y z", "c b a"]}], kind="rouge", variant="rouge1", field="refs")
    assert found == 1.0
    texts = ["<think>x</think> 4", "4", "<think>\n</think>5 or so"]
    pattern = r"<think>.*</think>\s*\d"
    assert score(texts, kind="format", pattern=pattern) == [1.0, 0.0, 1.0]
    assert score(texts, kind="format", pattern=pattern, whole=True) == [1.0, 0.0, 0.0]
    texts = ["one two", "1 2 3 4", "1 2 3 4 5 6", "1 2 3 4 5 6 7 8 9"]
    assert score(texts, kind="length", target_words=4) == [0.0, 0.0, -0.5, -1.0]


def test_rewards_are_added_up_by_weight():
    prompt = Prompt(np.array([1]), np.array([2]), "p", {"answer": "yes"}, "here")
    rewards = Rewards(
        [
            config(kind="exact_match", weight=2.0),
            config(kind="length", target_words=1, name="short"),
            config(kind="format", pattern="y", weight=0.0),
        ]
    )
    assert (rewards.names, rewards.columns) == (("exact_match", "short", "format"), ("answer",))
    scores = rewards.score([prompt, prompt], ["yes", "yes and no"])
    assert scores.total.tolist() == [2.0, -1.0]
    assert {name: values.tolist() for name, values in scores.by_name.items()} == {
        "exact_match": [1.0, 0.0],
        "short": [0.0, -1.0],
        "format": [1.0, 1.0],
    }


FUNCTIONS = """
import numpy

def longest(prompts, completions, records):
    return [len(c) + r["bonus"] if isinstance(p, str) else 0 for p, c, r in zip(prompts, completions, records)]

def array(prompts, completions, records):
    return numpy.arange(len(completions))

def few(prompts, completions, records):
    return [1.0]

def none(prompts, completions, records):
    return None

def nan(prompts, completions, records):
    return [float("nan") if c == "b" else 0.0 for c in completions]

def words(prompts, completions, records):
    return ["1"] * len(completions)

def broken(prompts, completions, records):
    raise KeyError("nothing")
"""


def test_a_function_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    path, records = f"{file}:", [{"bonus": 1}, {"bonus": 2}]
    assert score(["a", "bb"], records, kind="function", path=path + "longest") == [2.0, 4.0]
    assert score(["a", "bb"], kind="function", path=path + "array") == [0.0, 1.0]
    for name, message in [
        ("few", r"must give a list of one number for each of 2 completions, got 1 of them"),
        ("none", r"got NoneType \(answers to file, line 1 and after\)"),
        ("nan", r"finite numbers, got nan for an answer to file, line 2"),
        ("words", r"got '1' for an answer to file, line 1"),
        ("broken", r"failed for answers to file, line 1 to file, line 2 \(2 prompts\): KeyError"),
    ]:
        with pytest.raises(RewardError, match=message):
            score(["a", "b"], kind="function", path=path + name)
    with pytest.raises(ValueError, match=r"has no function 'absent'; it has longest, array"):
        Rewards([config(kind="function", path=path + "absent")])
    with pytest.raises(FileNotFoundError, match="no file"):
        Rewards([config(kind="function", path=str(tmp_path / "x.py:f"))])
    file.write_text("1 / 0")
    with pytest.raises(ValueError, match="cannot be run: ZeroDivisionError"):
        Rewards([config(kind="function", path=path + "longest")])
    with pytest.raises(ValidationError, match=r"like rewards.py:score"):
        config(kind="function", path="mine.py")


def test_a_reward_that_raises_names_the_record(monkeypatch):
    from twofold.posttrain import rewards

    monkeypatch.setattr(rewards.scoring, "rouge", lambda text, references: {"rougeL": 1 // len(text)})
    with pytest.raises(RewardError, match="'rouge' failed for an answer to file, line 2: ZeroDivisionError"):
        score(["a", ""], [{"answer": "a"}, {"answer": "b"}], kind="rouge")


def test_a_reward_model(tmp_path):
    folder = train_reward(reward_recipe(tmp_path, steps=1)).model_path
    found = score(["TREE", "", "tree"], prompt="say tree", kind="reward_model", path=str(folder), of_empty=-3)
    told = load_reward_model(folder).score(["say tree"] * 2, ["TREE", "tree"])
    assert found == pytest.approx([told[0].item(), -3.0, told[1].item()])
    with pytest.raises(ValueError, match="is no reward model"):
        Rewards([config(kind="reward_model", path=str(tmp_path / "start"))])


def test_records_that_a_reward_cannot_use_are_refused():
    rewards = Rewards([config(kind="math"), config(kind="rouge", field="summary")])
    rewards.check({"answer": GSM8K, "summary": ["", "x"]}, "row 1")
    rewards.check({"answer": r"\frac{1}{3}", "summary": "x"}, "row 1")
    for answer, summary, message in [
        ("", "x", "row 1: reward 'math' needs 'answer', and it is empty"),
        ("no idea", "x", "'math' finds no number or expression in 'answer': 'no idea'"),
        (None, "x", "must be a text, a number or a list of texts, got NoneType"),
        ("1", [" "], "'rouge' needs 'summary', and it is empty"),
        ("1", [1], "'summary', which must be"),
    ]:
        with pytest.raises(BadRecord, match=message):
            rewards.check({"answer": answer, "summary": summary}, "row 1")


def test_a_config_says_what_is_wrong():
    with pytest.raises(
        ValidationError, match=r"does not match any of the expected tags: 'math', 'exact_match'"
    ):
        config(kind="maths")
    with pytest.raises(ValidationError, match="weight must be a finite number"):
        config(kind="math", weight=math.inf)
    with pytest.raises(ValidationError, match="is no regular expression"):
        config(kind="format", pattern="(")
    with pytest.raises(ValidationError, match="letters, digits"):
        config(kind="math", name="my reward")
    with pytest.raises(
        ValidationError, match="runs what the model writes on this machine; set runs_model_code=true"
    ):
        config(kind="code")


# Code of a model.

FACTORIAL = "def f(n):\n    return 1 if n < 2 else n * f(n - 1)\n"


def test_code_is_rewarded_by_the_share_of_its_tests_that_pass():
    completions = [
        f"Here it is:\n```python\n{FACTORIAL}```\nDone.",
        "```\ndef f(n):\n    return n\n```",
        "def f(n): retrun n",
        "import sys, os\nos._exit(0)",
    ]
    records = [{"tests": ["assert f(2) == 2", "assert f(4) == 24"]}] * 4
    assert score(completions, records, kind="code", runs_model_code=True) == [1.0, 0.5, 0.0, 0.0]
    assert code_of("```py\na\n```\nor\n```python\nb") == "b"


ATTEMPTS = {
    "endless": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "ignores the alarm": "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True: pass",
    "memory": "x = bytearray(2**30)",
    "large file": "open('x', 'wb').write(b'0' * (20 * 2**20))",
    "outside": "open('/tmp/twofold-outside', 'w').write('x')",
    "delete": "import os; os.remove({victim!r})",
    "tree": "import shutil; shutil.rmtree({folder!r})",
    "fork": "import os; os.fork()",
    "program": "import subprocess; subprocess.run(['true'])",
    "shell": "import os; assert os.system('true') == 0",
    "network": "import socket; socket.socket()",
    "foreign": "import ctypes; ctypes.CDLL(None)",
    "says so itself": "print('x' * 32)",
    "environment": "import os; assert 'TWOFOLD_SECRET' in os.environ",
}


@pytest.mark.parametrize("name", ATTEMPTS)
def test_what_code_may_not(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TWOFOLD_SECRET", "1")
    victim = tmp_path / "victim"
    victim.write_text("x")
    code = ATTEMPTS[name].format(victim=str(victim), folder=str(tmp_path))
    started = time.monotonic()
    limits = Limits(time_s=1.0, memory_mb=256, file_mb=8)
    assert not passes(code, "assert 0" if name == "says so itself" else "pass", limits)
    assert time.monotonic() - started < 15
    assert victim.exists()


def test_what_code_may():
    code = "open('x', 'w').write('1')\nimport os, re, math, random\nos.rename('x', 'y')\nprint('said')\n"
    assert passes(code, "assert open('y').read() == '1'", Limits())
