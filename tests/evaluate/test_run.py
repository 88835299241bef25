"""Whole evaluations: against the harness's own backend, interrupted, truncated, in groups, with broken examples."""

import math
from dataclasses import replace
from statistics import fmean

import datasets
import pytest
from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.group import AggMetricConfig
from lm_eval.tasks import TaskManager

from twofold.evaluate import Contender, Evaluation, kind_of
from twofold.evaluate.run import evaluate


@pytest.fixture(autouse=True)
def _no_report_on_the_machine(monkeypatch):
    """The harness has PyTorch describe it, which takes two seconds each time."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


COLOURS = [
    {"question": "The sky is", "choices": ["blue", "green and loud", "red"], "answer": 0},
    {"question": "Grass is", "choices": ["blue", "green", "soft"], "answer": 1},
    {"question": "Snow falls and is", "choices": ["white", "hot"], "answer": 0},
    {"question": "Coal is", "choices": ["a", "b", "black"], "answer": 2},
    {"question": "A rose is", "choices": ["no", "red"], "answer": 1},
]


def task(name, docs, **config):
    """A task of the harness over the given examples."""
    split = datasets.Dataset.from_list(docs)
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": split},
            "test_split": "test",
            "metadata": {"version": 1.0},
            **config,
        }
    )


def colours(name="colours", docs=COLOURS):
    return task(
        name,
        docs,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
    )


def echo(docs=({"text": "hello"}, {"text": "good morning"}, {"text": "yes"})):
    return task(
        "echo",
        list(docs),
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{text}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 6},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )


def texts():
    return task(
        "texts",
        [{"text": "one two three"}, {"text": "four"}],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )


def contender(model) -> Contender:
    return Contender(name="tiny", path="some/tiny", kind=kind_of(model.config), model=model.eval())


def run(model_or_contender, tasks, **options) -> Evaluation:
    given = model_or_contender
    given = given if isinstance(given, Contender) else contender(given)
    return evaluate(given, tasks, **({"backend": "torch", "command": "a command"} | options))


def test_scores_are_those_of_the_harness_with_its_own_backend(donors, hflm, contender_of, tmp_path):
    _, model, tokenizer = donors["llama"]
    theirs = simple_evaluate(
        hflm(model, tokenizer),
        tasks=[colours(), echo(), texts()],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=10,
    )["results"]
    found = run(contender_of("llama"), [colours(), echo(), texts()], limit=None)
    assert list(found.tasks) == ["colours", "echo", "texts"]
    score = found.tasks["colours"]
    assert (score.metric, score.n, score.scale, score.n_truncated) == ("acc_norm", 5, 1.0, 0)
    assert score.value == theirs["colours"]["acc_norm,none"] == fmean(score.values)
    assert score.others == {"acc": theirs["colours"]["acc,none"]}
    assert score.error == pytest.approx(math.sqrt(score.value * (1 - score.value) / 4))
    n_read = [len(doc["question"]) for doc in COLOURS for _ in doc["choices"]]
    assert score.source_tokens == fmean(n_read)
    merged = ["black"]  # "ac" is one token
    n_scored = [1 + len(c) - (c in merged) for doc in COLOURS for c in doc["choices"]]
    assert score.target_tokens == fmean(n_scored)
    assert found.tasks["echo"].value == theirs["echo"]["exact_match,none"]
    score = found.tasks["texts"]
    assert (score.metric, score.values) == ("bits_per_byte", ())
    assert {name: task.higher_is_better for name, task in found.tasks.items()} == {
        "colours": True, "echo": True, "texts": False,
    }  # fmt: skip
    assert score.value == pytest.approx(theirs["texts"]["bits_per_byte,none"], rel=1e-5)
    assert (found.model, found.kind, found.command) == ("llama", "decoder-only", "a command")
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.settings["shots"] == {"colours": 0, "echo": 0, "texts": 0}
    found.save(tmp_path / "results.json")
    assert Evaluation.load(tmp_path / "results.json") == found


class Interrupted(Exception):
    pass


def interrupt_after(model, n, monkeypatch):
    """Let the model encode `n` batches, then fail. Returns the number of sources of each."""
    encode, encoded = model.encode, []

    def until(ids, *args, **options):
        if len(encoded) == n:
            raise Interrupted
        encoded.append(len(ids))
        return encode(ids, *args, **options)

    monkeypatch.setattr(model, "encode", until)
    return encoded


@pytest.mark.parametrize("make", [colours, texts])
def test_an_interrupted_evaluation_asks_for_the_rest_only(make, text_model, tmp_path, monkeypatch):
    monkeypatch.setattr("twofold.infer.likelihood._MAX_TOKENS", 15)
    model = text_model()
    with monkeypatch.context() as patch:
        whole = interrupt_after(model, -1, patch)
        wanted = run(model, [make()]).tasks
    with monkeypatch.context() as patch:
        interrupt_after(model, 1, patch)
        with pytest.raises(Interrupted):
            run(model, [make()], cache=tmp_path)
    rest = interrupt_after(model, -1, monkeypatch)
    assert run(model, [make()], cache=tmp_path).tasks == wanted
    assert len(rest) == len(whole) - 1
    assert run(model, [make()], cache=tmp_path).tasks == wanted
    assert len(rest) == len(whole) - 1


def test_answers_that_were_written_are_kept(text_model, tmp_path, monkeypatch):
    model = text_model()
    wanted = run(model, [echo()])
    interrupt_after(model, 2, monkeypatch)
    with pytest.raises(RuntimeError, match="task echo, example"):
        run(model, [echo()], cache=tmp_path, batch_size=1)
    monkeypatch.undo()
    rest = interrupt_after(model, -1, monkeypatch)
    assert run(model, [echo()], cache=tmp_path).tasks == wanted.tasks
    assert sum(rest) == 1


def test_another_model_or_setting_does_not_find_the_answers(text_model, tmp_path, monkeypatch):
    model = text_model()
    first = run(model, [colours()], cache=tmp_path)
    again = run(model, [colours()], cache=tmp_path, count_stop=True)
    assert again.settings["count_stop"]
    assert first.tasks["colours"].target_tokens + 1 == again.tasks["colours"].target_tokens
    other = text_model()
    other.lm_head.out_proj.weight.data.mul_(-1)
    encoded = interrupt_after(other, -1, monkeypatch)
    run(other, [colours()], cache=tmp_path)
    assert sum(encoded) == 5
    assert len(list(tmp_path.glob("tiny-*_rank0.db"))) == 3


def test_examples_that_do_not_fit_are_counted(text_model):
    long = [{**COLOURS[0], "question": "a" * 300}, *COLOURS[1:]]
    with pytest.warns(
        UserWarning, match=r"colours: 1 of 5 examples are longer than .* can read \(256 tokens\)"
    ):
        score = run(text_model(), [colours(docs=long)]).tasks["colours"]
    assert (score.n, score.n_truncated) == (5, 1)


def test_the_first_examples_alone(text_model):
    found = run(text_model(), [colours()], limit=2)
    assert (found.tasks["colours"].n, found.settings["limit"]) == (2, 2)


def test_a_group_is_one_result(text_model):
    """Weighted by size where the group says so; else its mean is not that of the examples."""
    one_is_right = [{**COLOURS[0], "answer": answer} for answer in range(3)]
    for by_size in (True, False):
        group = Group("all", aggregate_metric_list=[AggMetricConfig(metric="acc", weight_by_size=by_size)])
        group.add(colours("warm", one_is_right))
        group.add(colours("cold"))
        found = run(text_model(), [group, colours("other")]).tasks
        assert list(found) == ["all", "other"]
        cold = found["other"].others["acc"]
        assert (found["all"].metric, found["all"].n) == ("acc", 8)
        wanted = (1 + 5 * cold) / 8 if by_size else (1 / 3 + cold) / 2
        assert found["all"].value == pytest.approx(wanted)
        assert len(found["all"].values) == (8 if by_size else 0)


def test_a_group_without_a_score_is_its_tasks(text_model):
    group = Group("both")
    group.add(colours("warm", COLOURS[:2]))
    group.add(colours("cold", COLOURS[2:]))
    assert list(run(text_model(), [group]).tasks) == ["warm", "cold"]


def test_through_the_chat_template(text_model):
    found = run(text_model(), [colours()], chat=True)
    turns = len("<user\n>\n<assistant\n")
    assert found.tasks["colours"].source_tokens > turns + 5
    assert found.settings["chat"]


def test_what_cannot_be_run(text_model, byte_tokenizer):
    model = text_model()
    for broken in ({"answer": 7}, {"choices": None}):
        docs = [COLOURS[0], {**COLOURS[1], **broken}]
        with pytest.raises(
            ValueError, match=r"task colours, example 1 cannot be used: .*'question': 'Grass is'"
        ):
            run(model, [colours(docs=docs)])
    with pytest.raises(ValueError, match="limit must be at least 1 example, got 0"):
        run(model, [colours()], limit=0)
    writes_programs = colours()
    writes_programs.UNSAFE_CODE = True
    with pytest.raises(ValueError, match="colours would run programs that the model wrote"):
        run(model, [writes_programs])
    assert run(model, [writes_programs], run_code=True).tasks["colours"].n == 5
    with pytest.raises(ValueError, match="list of at least one task"):
        run(model, [])
    with pytest.raises(ValueError, match="list of at least one task, got 'colours'"):
        run(model, "colours")
    group = Group("all")
    group.add(colours())
    with pytest.raises(ValueError, match="Duplicate task 'colours'"):
        run(model, [colours(), group])
    model.tokenizer = type(byte_tokenizer)(tokenizer_object=byte_tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="tokenizer of some/tiny has no chat template"):
        run(model, [colours()], chat=True)


def test_bfloat16_holds_for_likelihoods(text_model):
    found = run(text_model(), [colours()], precision="bfloat16")
    assert found.settings["likelihood_dtype"] == "bfloat16"
    assert replace(found, tasks={}).settings["precision"] == "bfloat16"
