"""The adapter against the harness's own Hugging Face backend, and against hand-computed log-probabilities."""

import copy
import importlib
import sys

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance

import twofold
from tests.models import hf
from tests.models.tiny import randomise
from twofold.evaluate import Contender, kind_of, open_contender
from twofold.evaluate.harness import TwofoldLM, Usage, generation_options
from twofold.evaluate.inputs import ChatPrompt
from twofold.infer import Sampling

PAIRS = [
    ("The sky is", " blue"),
    ("The sky is", " green and"),
    ("ends in a space ", "cat"),
    ("", " word"),
    ("0123456789" * 20, "yy"),
]
DONOR_PAIRS = [*PAIRS, ("cut in spa", "ces"), ("", "<|im_start|>word")]
TEXTS = [("hello world",), ("y" * 250,)]
ASKED = [
    ("hello", {"until": ["\n"], "max_gen_toks": 12}),
    ("z" * 100, {"until": "[[", "max_gen_toks": 12}),
    ("The sky", {"until": [], "max_gen_toks": 3, "do_sample": False, "temperature": 0.7}),
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it blue?"},
]
BOS_FIRST = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
BEGUN = [*CHAT, {"role": "assistant", "content": "Well, it"}]


def requests(kind, arguments, *, task="colours"):
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=(task, i, 1))
        for i, args in enumerate(arguments)
    ]


def contender(model, name="tiny") -> Contender:
    return Contender(name=name, path=name, kind=kind_of(model.config), model=model.eval())


def lm_of(model, **options) -> TwofoldLM:
    return TwofoldLM(contender(model), backend="torch", device="cpu", **options)


def assert_answers_agree(ours, theirs):
    for (total, is_greedy), (wanted, wanted_greedy) in zip(ours, theirs, strict=True):
        assert total == pytest.approx(wanted, rel=1e-5, abs=1e-4)
        assert is_greedy == wanted_greedy


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_decoder_only_model_gets_the_numbers_of_the_hf_backend(name, donors, hflm, contender_of):
    """Also where contexts are cut, where they are empty, and over several windows."""
    _, model, tokenizer = donors[name]
    theirs, ours = hflm(model, tokenizer), TwofoldLM(contender_of(name), backend="torch", device="cpu")
    assert ours.max_length == theirs.max_length == 96
    asked = requests("loglikelihood", DONOR_PAIRS)
    assert_answers_agree(ours.loglikelihood(asked), theirs.loglikelihood(asked))
    tokens = [(None, [tokenizer.bos_token_id, *range(40, 60)], [5, 6, 7])]
    assert_answers_agree(ours._loglikelihood_tokens(tokens), theirs._loglikelihood_tokens(tokens))
    texts = requests("loglikelihood_rolling", TEXTS)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-5)
    asked = requests("generate_until", ASKED)
    assert ours.generate_until(asked) == theirs.generate_until(asked)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("messages", [CHAT, BEGUN], ids=["asked", "begun"])
@pytest.mark.parametrize("template", [None, BOS_FIRST], ids=["chatml", "bos-first"])
def test_conversations_too(name, messages, template, donors, hflm, contender_of):
    """BOS, which the template writes and a tokenizer may add, stands there once."""
    _, model, tokenizer = donors[name]
    theirs, mine = hflm(model, tokenizer), contender_of(name)
    for its in (theirs.tokenizer, mine.model.tokenizer):
        its.chat_template = template or its.chat_template
    ours = TwofoldLM(mine, backend="torch", device="cpu", chat=True)
    is_asked = messages is CHAT
    prompt = ours.apply_chat_template(messages, add_generation_prompt=is_asked)
    assert prompt == theirs.apply_chat_template(messages, add_generation_prompt=is_asked)
    asked = requests("loglikelihood", [(prompt, "yes"), (prompt, "no, not")])
    assert_answers_agree(ours.loglikelihood(asked), theirs.loglikelihood(asked))
    asked = requests("generate_until", [(prompt, {"until": ["\n"], "max_gen_toks": 8})])
    assert ours.generate_until(asked) == theirs.generate_until(asked)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("messages", [None, CHAT, BEGUN], ids=["text", "asked", "begun"])
def test_a_lossless_pair_gets_its_donors_scores(name, messages, donors, hflm):
    folder, model, tokenizer = donors[name]
    pair = twofold.adapt(folder, encoder_mask="causal", dtype=torch.float32)
    theirs, ours = hflm(model, tokenizer), lm_of(pair)
    assert contender(pair).kind == "encoder-decoder"
    pairs = DONOR_PAIRS
    if messages is not None:
        prompt = ours.apply_chat_template(messages, add_generation_prompt=messages is CHAT)
        pairs = [(prompt, "yes"), (prompt, "no, not")]
    asked = requests("loglikelihood", pairs)
    assert_answers_agree(ours.loglikelihood(asked), theirs.loglikelihood(asked))
    asked = requests("generate_until", [(pairs[0][0], {"until": ["\n"], "max_gen_toks": 8})])
    assert ours.generate_until(asked) == theirs.generate_until(asked)
    texts = requests("loglikelihood_rolling", TEXTS)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-5)


@pytest.fixture(scope="module")
def t5gemma(byte_tokenizer, tmp_path_factory):
    """A model of transformers, and its folder with a tokenizer."""
    caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}
    blocks = hf.COMMON | hf.GEMMA | caps | {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257}
    blocks |= {"max_position_embeddings": 64}
    config = transformers.T5GemmaConfig(
        encoder=blocks, decoder=blocks, vocab_size=258, attn_implementation="eager",
        bos_token_id=256, eos_token_id=257, pad_token_id=0,
    )  # fmt: skip
    theirs = transformers.T5GemmaForConditionalGeneration(config).eval()
    randomise(theirs, qk_factor=3.0)
    folder = tmp_path_factory.mktemp("t5gemma") / "t5gemma"
    theirs.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    # transformers' eager attention sees one token further than the published encoder window, which ours follows.
    theirs.config.encoder.sliding_window -= 1
    return theirs, folder


@torch.no_grad()
def by_hand(model, source: list[int], target: list[int]) -> float:
    """Log-probability of a target behind BOS, by transformers."""
    logits = model(
        input_ids=torch.tensor([source]),
        attention_mask=torch.ones(1, len(source), dtype=torch.int64),
        decoder_input_ids=torch.tensor([[256, *target[:-1]]]),
        decoder_attention_mask=torch.ones(1, len(target), dtype=torch.int64),
    ).logits[0]
    return logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum().item()


@pytest.fixture(scope="module")
def ids(byte_tokenizer):
    """Token ids of a text."""
    return lambda text: byte_tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("count_stop", [False, True])
def test_a_t5gemma_model_by_hand(t5gemma, ids, count_stop):
    theirs, folder = t5gemma
    lm = TwofoldLM(open_contender(folder), backend="torch", device="cpu", count_stop=count_stop)
    end = [257] if count_stop else []
    found = [total for total, _ in lm.loglikelihood(requests("loglikelihood", PAIRS))]
    wanted = [
        by_hand(theirs, ids("The sky is"), [*ids(" blue"), *end]),
        by_hand(theirs, ids("The sky is"), [*ids(" green and"), *end]),
        by_hand(theirs, ids("ends in a space"), [*ids(" cat"), *end]),
        by_hand(theirs, [256], [*ids(" word"), *end]),
        by_hand(theirs, ids(("0123456789" * 20)[-64:]), [*ids("yy"), *end]),  # all that the encoder holds
    ]
    assert found == pytest.approx(wanted, rel=1e-5)


def test_whole_texts_of_a_t5gemma_model_are_predicted_from_what_stands_before(t5gemma, ids, monkeypatch):
    monkeypatch.setattr("twofold.evaluate.inputs.ROLLING_TOKENS", 40)
    theirs, folder = t5gemma
    lm = TwofoldLM(open_contender(folder), backend="torch", device="cpu")
    text = "".join(map(chr, range(32, 127))) + "0123456789"
    wanted = (
        by_hand(theirs, [256], ids(text[:40]))
        + by_hand(theirs, ids(text[:40]), ids(text[40:80]))
        + by_hand(theirs, ids(text[16:80]), ids(text[80:]))
    )
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,), ("",)]))
    assert found == pytest.approx([wanted, 0.0], rel=1e-5)


def test_the_start_of_a_reply_is_where_training_puts_it(text_model, ids):
    """In the decoder where it goes on, in the source where it starts from BOS; what is begun is the decoder's."""
    asked = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs it blue?<|im_end|>\n"
    header = "<|im_start|>assistant\n"
    lossless, started = lm_of(text_model()), lm_of(text_model(decoder_start="bos"))

    def parts(row):
        return [list(part) for part in (row.source, row.prefix, row.target)]

    prompt = lossless.apply_chat_template(CHAT)
    assert parts(lossless.inputs.prompt(prompt, 8)) == [ids(asked), ids(header), []]
    # The harness moves the line break.
    assert parts(lossless.row(prompt, "no")) == [ids(asked), ids(header[:-1]), ids("\nno")]
    assert parts(started.row(prompt, "no")) == [ids(asked + header), [256], ids("no")]
    begun = lossless.apply_chat_template(BEGUN, add_generation_prompt=False)
    assert parts(lossless.inputs.prompt(begun, 8)) == [ids(asked), ids(header + "Well, it"), []]
    assert parts(started.inputs.prompt(begun, 8)) == [ids(asked + header), [256, *ids("Well, it")], []]


def test_a_pair_trained_without_bos_reads_none_that_a_template_writes(text_model, ids):
    model = text_model()
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.chat_template = BOS_FIRST
    lm = lm_of(model)
    row = lm.row(lm.apply_chat_template(CHAT), "no")
    assert list(row.source) == ids("system: Be brief.\nuser: Is it blue?\n")
    assert (list(row.prefix), list(row.target)) == (ids("assistant:"), ids(" no"))


def test_a_model_without_chat_template_is_refused_at_once(text_model, byte_tokenizer):
    model = text_model()
    model.tokenizer = type(byte_tokenizer)(tokenizer_object=byte_tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="tokenizer of tiny has no chat template"):
        lm_of(model, chat=True)
    with pytest.raises(ValueError, match="has no chat template"):
        lm_of(model).apply_chat_template(CHAT)
    model.tokenizer = None
    with pytest.raises(ValueError, match="tiny has no tokenizer"):
        lm_of(model)


def test_a_template_without_system_messages(text_model, byte_tokenizer):
    """They are left out, as by the harness's backend."""
    model = text_model()
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    model.tokenizer = type(byte_tokenizer)(
        tokenizer_object=byte_tokenizer.backend_tokenizer,
        chat_template=template + byte_tokenizer.chat_template,
    )
    lm = lm_of(model, chat=True)
    with pytest.warns(UserWarning, match="takes no system message"):
        prompt = lm.apply_chat_template(CHAT)
    assert prompt == "<|im_start|>user\nIs it blue?<|im_end|>\n<|im_start|>assistant\n"
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages == CHAT[1:]


def test_what_cannot_be_asked_names_task_and_example(text_model):
    lm = lm_of(text_model())
    good = ("a", {"until": [], "max_gen_toks": 9})
    for call, kind, args, match in [
        (lm.loglikelihood, "loglikelihood", ("a", ""), "continuation '' has no tokens"),
        (lm.loglikelihood, "loglikelihood", ("a", "b" * 300), "max_position_embeddings of 256; shorten"),
        (
            lm.generate_until,
            "generate_until",
            ("a", {"penalty_alpha": 1}),
            "unknown settings.*: penalty_alpha;",
        ),
        (lm.generate_until, "generate_until", ("a", {"max_gen_toks": 256}), "lower max_gen_toks"),
    ]:
        first = ("a", "b") if kind == "loglikelihood" else good
        with pytest.raises(ValueError, match=f"task colours, example 1: .*{match}"):
            call(requests(kind, [first, args]))


def test_settings_of_generation_in_the_engines_words():
    drawn = {"do_sample": True, "temperature": 0.5, "top_k": 1, "top_p": 1.0, "min_p": 0, "until": ["a", ""]}
    found = generation_options(drawn | {"max_new_tokens": 4})
    assert (found["max_new_tokens"], found["stop"]) == (4, ("a",))
    assert found["sampling"] == Sampling(temperature=0.5, top_k=1)
    greedy = {"do_sample": False, "temperature": 0.9, "top_k": 3, "repetition_penalty": 1.2, "num_beams": 2}
    found = generation_options(greedy)
    assert found["sampling"] == Sampling(repetition_penalty=1.2)
    assert (found["num_beams"], found["max_new_tokens"], found["stop"]) == (2, 256, ())
    assert generation_options({"do_sample": True})["sampling"] == Sampling(temperature=1.0)


def test_drawn_answers_depend_on_their_text_alone(text_model):
    """Repeats differ; another order, or other company, changes nothing."""
    lm = lm_of(text_model())
    drawn = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 6, "until": []}
    hello, again, bye = lm.generate_until(
        requests("generate_until", [("hello", drawn), ("hello", drawn), ("goodbye", drawn)])
    )
    assert hello != again
    assert lm.generate_until(requests("generate_until", [("goodbye", drawn), ("hello", drawn)])) == [
        bye,
        hello,
    ]


def test_usage_counts_what_did_not_fit(text_model):
    lm = lm_of(text_model())
    assert lm.usage("loglikelihood", ("abc", "de")) == Usage(3, 2, 0)
    assert lm.usage("loglikelihood", ("a" * 300, "de")) == Usage(255, 2, 45)
    assert lm.usage("generate_until", ("a" * 300, {"max_gen_toks": 56}), ["four"]) == Usage(200, 4, 100)
    assert lm.usage("loglikelihood_rolling", ("abc",)) == Usage(1, 3, 0)


def test_without_the_harness_the_message_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "twofold.evaluate.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match=r"lm_eval; pip install 'twofold\[eval\]'"):
        importlib.import_module("twofold.evaluate.harness")
