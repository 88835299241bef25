"""What local files serve: for each task its files, what a line must have, and how it becomes the task's example.

Wording, choices and scoring of a task with a `folder` are those of the harness's own task file; only the examples come
from elsewhere. Tasks without one are defined here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from twofold.evaluate.tasks import convert, scoring
from twofold.evaluate.tasks.definition import Local, LocalGroup, Split, gold_bits, metric, written
from twofold.evaluate.tasks.lines import Doc, Fields, examples, interleaved, line_pairs, pages


def _rouge(doc: Doc, results: Sequence[Any]) -> dict[str, Any]:
    return scoring.rouge(results[0], doc["targets"])


def _squad(doc: Doc, results: Sequence[Any]) -> dict[str, Any]:
    return {
        "f1": scoring.squad_f1(results[0], doc["targets"]),
        "exact_match": scoring.squad_exact(results[0], doc["targets"]),
    }


def _translated(doc: Doc, results: Sequence[Any]) -> dict[str, Any]:
    pair = (doc["targets"][0], results[0].strip())
    return {"bleu": pair, "chrf": pair}


def _math(doc: Doc, results: Sequence[Any]) -> dict[str, Any]:
    return {"math_verify": scoring.math_equal(results[0], doc["solution"])}


def _arc(name: str) -> Local:
    fields: Fields = {"query": str, "choices": list, "gold": int}
    return Local(
        folder="arc",
        metric="acc_norm",
        test=Split(f"benchmarks/{name}-test.jsonl.gz", fields, convert.arc),
        shots=Split(f"benchmarks/{name}-train.jsonl.gz", fields, convert.arc),
    )


def _glue(task: str, fields: Fields) -> Local:
    """A task of GLUE with two answers."""
    test = Split(f"benchmarks/glue-{task}-validation.jsonl.gz", {**fields, "label": (0, 1)})
    return Local(folder=f"glue/{task}", metric="acc", test=test)


def _multi30k(source: str, target: str) -> Local:
    """Captions of Flickr; languages as in the files' names."""
    names = {"de": "German", "en": "English", "fr": "French"}
    make = partial(convert.phrase, names[source], names[target])

    def split(name: str) -> Split:
        files = tuple(f"translation/multi30k/{name}.{language}.gz" for language in (source, target))
        return Split(files, {}, make, line_pairs)

    return written(
        split("test_2016_flickr"),
        split("val"),
        _translated,
        {"bleu": scoring.bleu, "chrf": scoring.chrf},
        max_new_tokens=96,
        scale=100,
    )


_MMLU: Fields = {"question": str, "subject": str, "choices": list, "answer": (0, 1, 2, 3)}
_BBH = (
    "boolean_expressions causal_judgement disambiguation_qa dyck_languages geometric_shapes hyperbaton "
    "logical_deduction_seven_objects logical_deduction_three_objects multistep_arithmetic_two navigate "
    "penguins_in_a_table reasoning_about_colored_objects salient_translation_error_detection snarks "
    "temporal_sequences tracking_shuffled_objects_five_objects tracking_shuffled_objects_three_objects web_of_lies"
).split()
_RTE: Fields = {"sentence1": str, "sentence2": str}
_GSM8K: Fields = {"question": str, "answer": str}
_SCITLDR: Fields = {"source": list, "target": list}
_PIQA: Fields = {"goal": str, "sol1": str, "sol2": str, "label": (0, 1)}
_ROUGE_METRICS = dict.fromkeys(reversed(scoring.ROUGE), "mean")

LOCAL: dict[str, Local | LocalGroup] = {
    "arc_easy": _arc("arc_easy"),
    "arc_challenge": _arc("arc_challenge"),
    "boolq": Local(
        folder="super_glue/boolq",
        metric="acc",
        test=Split(
            "benchmarks/boolq-validation.jsonl.gz",
            {"passage": str, "question": str, "answer": bool},
            convert.boolq,
        ),
        shots=Split(
            "benchmarks/boolq-train.jsonl.gz",
            {"query": str, "choices": list, "gold": (0, 1)},
            convert.boolq_shot,
        ),
    ),
    "piqa": Local(
        folder="piqa",
        metric="acc_norm",
        test=Split("benchmarks/piqa-validation.jsonl.gz", _PIQA),
        shots=Split("benchmarks/piqa-train.jsonl.gz", _PIQA),
    ),
    "hellaswag": Local(
        folder="hellaswag",
        metric="acc_norm",
        test=Split(
            "benchmarks/hellaswag-validation.jsonl.gz",
            {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": tuple("0123")},
        ),
    ),
    "winogrande": Local(
        folder="winogrande",
        metric="acc",
        test=Split(
            "benchmarks/winogrande-winogrande_xl-validation.jsonl.gz",
            {"sentence": str, "option1": str, "option2": str, "answer": ("1", "2")},
        ),
    ),
    "openbookqa": Local(
        folder="openbookqa",
        metric="acc_norm",
        test=Split(
            "benchmarks/openbookqa-test.jsonl.gz",
            {"query": str, "choices": list, "gold": int},
            convert.openbookqa,
        ),
        shots=Split(
            "benchmarks/openbookqa-train.jsonl.gz",
            {"query": str, "choices": list, "gold": int},
            convert.openbookqa,
        ),
    ),
    "social_iqa": Local(
        folder="siqa",
        metric="acc",
        test=Split(
            "benchmarks/social_i_qa-validation.jsonl.gz",
            {
                "context": str,
                "question": str,
                "answerA": str,
                "answerB": str,
                "answerC": str,
                "label": tuple("123"),
            },
        ),
    ),
    "commonsense_qa": Local(
        folder="commonsense_qa",
        metric="acc",
        test=Split(
            "benchmarks/tau-commonsense_qa-validation.jsonl.gz",
            {"question": str, "choices.text": list, "choices.label": list, "answerKey": str},
            convert.commonsense_qa,
        ),
    ),
    "lambada_openai": Local(
        folder="lambada",
        metric="acc",
        test=Split(
            "benchmarks/lambada_openai.jsonl.gz", {"context": str, "continuation": str}, convert.lambada
        ),
    ),
    "mmlu": Local(
        folder="mmlu/default",
        base="mmlu_abstract_algebra",
        metric="acc",
        test=Split("benchmarks/mmlu-test.jsonl.gz", _MMLU, rows=partial(interleaved, field="subject")),
        shots=Split("benchmarks/mmlu-dev.jsonl.gz", _MMLU),
        shots_by="subject",
        config={
            "description": "The following are multiple choice questions (with answers) about "
            "{{subject|replace('_', ' ')}}.\n\n",
            "num_fewshot": 5,
        },
    ),
    "gsm8k": Local(
        folder="gsm8k",
        metric="exact_match,strict-match",
        test=Split("benchmarks/gsm8k-test.jsonl.gz", _GSM8K),
        shots=Split("benchmarks/gsm8k-train.jsonl.gz", _GSM8K),
    ),
    "drop": Local(
        folder="drop",
        metric="f1",
        test=Split(
            "benchmarks/drop.jsonl.gz", {"passage": str, "question": str, "answers": list}, convert.drop
        ),
        config={"process_docs": None, "doc_to_target": "{{ answers[0]|join(',')}}"},
    ),
    "squad": written(
        Split("benchmarks/squad.jsonl.gz", {"query": str, "answers_text": list}, convert.squad),
        None,
        _squad,
        {"f1": "mean", "exact_match": "mean"},
        max_new_tokens=32,
        scale=1,
    ),
    "nq_open": Local(
        folder="nq_open",
        metric="exact_match,remove_whitespace",
        test=Split("benchmarks/nq_open-validation.jsonl.gz", {"question": str, "answer": list}),
    ),
    "math_500": Local(
        metric="math_verify",
        test=Split("benchmarks/minerva_math_500.jsonl.gz", {"problem": str, "solution": str}),
        config={
            "output_type": "generate_until",
            "doc_to_text": "Problem:\n{{problem}}\n\nSolution:",
            "doc_to_target": "solution",
            "process_results": _math,
            "generation_kwargs": {"until": ["Problem:"], "max_gen_toks": 512, "do_sample": False},
            "metric_list": [metric("math_verify", "mean")],
            "num_fewshot": 4,
        },
    ),
    "humaneval_bpb": gold_bits(
        Split(
            "benchmarks/codex_humaneval.jsonl.gz",
            {"prompt": str, "canonical_solution": str},
            convert.humaneval,
        )
    ),
    "mbpp_bpb": gold_bits(
        Split("benchmarks/codex_mbpp.jsonl.gz", {"text": str, "code": str, "test_list": list}, convert.mbpp)
    ),
    "rte": _glue("rte", _RTE),
    "sglue_rte": Local(
        folder="super_glue/rte",
        metric="acc",
        test=Split("benchmarks/glue-rte-validation.jsonl.gz", {**_RTE, "label": (0, 1)}),
        config={"doc_to_text": "{{sentence1}}\nQuestion: {{sentence2}} True or False?\nAnswer:"},
    ),
    "mrpc": _glue("mrpc", _RTE),
    "sst2": _glue("sst2", {"sentence": str}),
    "wic": Local(
        folder="super_glue/wic",
        metric="acc",
        test=Split(
            ("benchmarks/wic/dev.data.txt.gz", "benchmarks/wic/dev.gold.txt.gz"),
            {},
            convert.word_in_context,
            line_pairs,
        ),
        shots=Split(
            ("benchmarks/wic/train.data.txt.gz", "benchmarks/wic/train.gold.txt.gz"),
            {},
            convert.word_in_context,
            line_pairs,
        ),
    ),
    "cb": Local(
        folder="super_glue/cb",
        metric="acc",
        test=Split(
            "benchmarks/super_glue-cb-validation.jsonl.gz",
            {"premise": str, "hypothesis": str, "label": (0, 1, 2)},
        ),
    ),
    "copa": Local(
        folder="super_glue/copa",
        metric="acc",
        test=Split(
            "benchmarks/super_glue-copa-validation.jsonl.gz",
            {
                "premise": str,
                "choice1": str,
                "choice2": str,
                "question": ("cause", "effect"),
                "label": (0, 1),
            },
        ),
    ),
    "wsc273": Local(
        folder="wsc273",
        metric="acc",
        test=Split(
            "benchmarks/winograd_wsc.jsonl.gz",
            {"context_options": list, "continuation": str, "gold": (0, 1)},
            convert.winograd,
        ),
        config={"process_docs": None},
    ),
    "wikitext2": Local(
        folder="wikitext",
        base="wikitext",
        metric="word_perplexity",
        test=Split("corpora/wikitext2-valid.txt.gz", {}, rows=pages),
    ),
    "scitldr": written(
        Split("summarization/scitldr-a-dev.jsonl.gz", _SCITLDR, convert.scitldr),
        Split("summarization/scitldr-a-train.jsonl.gz", _SCITLDR, convert.scitldr),
        _rouge,
        _ROUGE_METRICS,
        max_new_tokens=64,
        scale=100,
    ),
    "dialogsum": written(
        Split("summarization/dialogsum-test.jsonl.gz", {"dialogue": str, "summary1": str}, convert.dialogsum),
        Split("summarization/dialogsum-dev.jsonl.gz", {"dialogue": str, "summary": str}, convert.dialogsum),
        _rouge,
        _ROUGE_METRICS,
        max_new_tokens=96,
        scale=100,
    ),
    "multi30k_de_en": _multi30k("de", "en"),
    "multi30k_fr_en": _multi30k("fr", "en"),
    "multi30k_en_de": _multi30k("en", "de"),
    **{
        f"bbh_zeroshot_{name}": Local(
            folder="bbh/zeroshot",
            metric="exact_match,flexible-extract",
            test=Split(f"benchmarks/bbh/{name}.json.gz", {"input": str, "target": str}, rows=examples),
        )
        for name in _BBH
    },
    "bbh_zeroshot": LocalGroup(
        members=tuple(f"bbh_zeroshot_{name}" for name in _BBH), metric="exact_match,flexible-extract"
    ),
}
"""By the harness's names where it has the task; what differs from it is in the docs of evaluation."""
