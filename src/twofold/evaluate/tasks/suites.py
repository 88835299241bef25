"""The lists of tasks that the T5Gemma paper averages, by the harness's names (arXiv 2504.06225, section 4)."""

from __future__ import annotations

SUITES: dict[str, dict[str, int | None]] = {
    "pt": {
        "boolq": None,
        "social_iqa": None,
        "piqa": None,
        "arc_challenge": 25,
        "arc_easy": None,
        "mmlu": 5,
        "mmlu_pro": None,
        "hellaswag": 10,
        "winogrande": None,
        "truthfulqa_mc2": None,
        "agieval_en": None,
        "bbh_cot_fewshot": None,
        "drop": None,
        "gpqa_main_zeroshot": None,
        "gsm8k": 5,
        "humaneval": None,
        "lambada_openai": None,
        "minerva_math500": 4,
        "mbpp": 3,
        "nq_open": 5,
        "triviaqa": 5,
    },
    "it": {
        "gsm8k": 5,
        "mmlu": 5,
        "mmlu_pro": None,
        "mbpp_instruct": None,
        "humaneval_instruct": None,
        "minerva_math500": 4,
        "bbh_cot_fewshot": None,
        "gpqa_diamond_cot_zeroshot": None,
        "mgsm_direct": None,
    },
    "superglue": {
        "copa": None,
        "wic": None,
        "wsc": None,
        "sglue_rte": None,
        "multirc": None,
        "cb": None,
        "boolq": None,
    },
}
"""Shots by task; None: the harness's own (none for most, 3 with reasoning for BBH, 5 for MMLU-Pro).

Left out: WMT23, which the harness does not have. Not as the paper: AGIEval's 3 to 5 shots, for which the harness has no
examples. The list `superglue` asks the model; the paper's fine-tuning is `twofold.evaluate.superglue`.
"""
