"""A server with two tiny models that write words, for the route and for the browser."""

import time
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import twofold
from tests.conftest import CHATML
from tests.models.tiny import build, pair_config, stack
from tests.serve.running import serving
from twofold.serve.playground import add_playground

WORDS = (
    "<unk> the a bridge was closed for nine weeks and ferries carried people over water while engineers replaced "
    "cables clamps cost four million pounds or half of what city had set aside in june user assistant summarise text "
    "two sentences . , < | im_start im_end > ! ?"
).split()
POSITIONS = 256


def writing_tokenizer(chat_template):
    """One token per word, which decoding joins with spaces."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    tokens = {"unk_token": "<unk>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=chat_template, **tokens)


@pytest.fixture(scope="session")
def engines():
    """A lossless pair and a published one with another chat template, that never end by themselves."""
    found = {}
    lossless = {
        "layout": "merged", "reads": "aligned", "cross_rope": True, "decoder_positions": "continue",
        "decoder_start": "last_source_token",
    }  # fmt: skip
    for seed, (name, meeting) in enumerate({"lossless": lossless, "published": {}}.items()):
        end = len(WORDS) + 1
        config = pair_config(
            stack(vocab_size=len(WORDS) + 2, max_position_embeddings=POSITIONS),
            bos_token_id=end - 1, eos_token_ids=(end,), pad_token_id=end, **meeting,
        )  # fmt: skip
        model = build(config, seed=seed, qk_factor=1.5)
        model.lm_head.out_proj.weight.data[end] = 0.0
        opening = "<|im_start|>the bridge was closed<|im_end|>\n" if name == "published" else ""
        model.tokenizer = writing_tokenizer(opening + CHATML)
        found[name] = twofold.Engine(model, device="cpu", backend="torch")
    return found


@pytest.fixture(scope="session")
def served(engines):
    """Its address, its engines, and `pace`: seconds that every step takes longer."""
    found = SimpleNamespace(engines=engines, pace=0.0, address="")
    for engine in engines.values():
        step = engine.loop.step

        def slower(step=step):
            time.sleep(found.pace)
            return step()

        engine.loop.step = slower
    with serving(engines, extensions=(add_playground,)) as running:
        found.address = running.url
        yield found
