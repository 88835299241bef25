import copy

import numpy as np
import pytest

from twofold.data.chat import messages_to_example, prompt_inputs, record_to_example
from twofold.data.convention import Convention

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "yo"}


@pytest.fixture(scope="module")
def conventions(ids):
    start, end, bos = ids("<|im_start|><|im_end|><bos>")
    common = {"source_bos": False, "stop_token_ids": (end,), "pad_token_id": end}
    return {
        "lossless": Convention(decoder_start="last_source_token", bos_token_id=start, **common),
        "chatml_bos": Convention(decoder_start="bos", bos_token_id=start, **common),
        "bos": Convention(decoder_start="bos", bos_token_id=bos, **common),
    }


def with_template(tokenizer, template):
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


PROMPT = "<|im_start|>user\nhi<|im_end|>\n"
HEADER = "<|im_start|>assistant\n"


def test_lossless_decoder_starts_with_the_header(tokenizer, ids, conventions):
    example = messages_to_example([USER, REPLY], tokenizer, conventions["lossless"])
    assert example.source.tolist() == ids(PROMPT)
    assert example.decoder_prefix.tolist() == ids(HEADER)
    assert example.target.tolist() == ids("yo<|im_end|>")
    assert example.labels.tolist() == [-100] * (len(ids(HEADER)) - 1) + ids("yo<|im_end|>")


@pytest.mark.parametrize("name", ["bos", "chatml_bos"])
def test_bos_decoder_reads_the_header(tokenizer, ids, conventions, name):
    example = messages_to_example([USER, REPLY], tokenizer, conventions[name])
    assert example.source.tolist() == ids(PROMPT + HEADER)
    assert example.decoder_prefix.tolist() == [conventions[name].bos_token_id]
    assert example.target.tolist() == ids("yo<|im_end|>")


def test_all_earlier_turns_are_read(tokenizer, ids, conventions):
    example = messages_to_example(
        [USER, REPLY, USER, {**REPLY, "content": " ok "}], tokenizer, conventions["bos"]
    )
    assert example.source.tolist() == ids(PROMPT + HEADER + "yo<|im_end|>\n" + PROMPT + HEADER)
    assert example.target.tolist() == ids("ok<|im_end|>")  # the template trims


def test_prompt_inputs_are_those_of_training(tokenizer, ids, conventions):
    for convention in conventions.values():
        example = messages_to_example([USER, REPLY], tokenizer, convention)
        source, prefix = prompt_inputs([USER], tokenizer, convention)
        assert source.tolist() == example.source.tolist()
        assert prefix.tolist() == example.decoder_prefix.tolist()


def test_plain_prompts(tokenizer, ids, conventions):
    source, prefix = prompt_inputs("abc", tokenizer, conventions["lossless"])
    assert (source.tolist(), prefix.tolist()) == (ids("ab"), ids("c"))
    source, prefix = prompt_inputs("abc", tokenizer, conventions["bos"])
    assert (source.tolist(), prefix.tolist()) == (ids("abc"), ids("<bos>"))


def test_bos_of_the_template_stays_out_of_an_encoder_without_one(tokenizer, ids, conventions):
    gemma = with_template(tokenizer, "<bos>" + tokenizer.chat_template)
    assert messages_to_example([USER, REPLY], gemma, conventions["bos"]).source.tolist() == ids(
        PROMPT + HEADER
    )


def test_records(tokenizer, ids, conventions):
    convention = conventions["lossless"]
    pair = {"prompt": "hi", "completion": "yo"}
    expected = messages_to_example([USER, REPLY], tokenizer, convention)
    for record in (pair, {"messages": [USER, REPLY]}):
        example = record_to_example(record, tokenizer, convention)
        assert all(np.array_equal(a, b) for a, b in zip(example, expected, strict=True))
    plain = record_to_example(pair, with_template(tokenizer, None), convention)
    assert [part.tolist() for part in plain[:3]] == [ids("h"), ids("i"), ids("yo<|im_end|>")]
    with pytest.raises(ValueError, match="has no chat template"):
        record_to_example({"messages": [USER, REPLY]}, with_template(tokenizer, None), convention)
    with pytest.raises(ValueError, match="has no chat template"):
        prompt_inputs([USER], with_template(tokenizer, None), convention)


def test_thinking_that_the_template_writes_is_part_of_the_reply(tokenizer, ids, conventions):
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}|"
        "{% if m['role'] == 'assistant' %}(think){% endif %}{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant|{% endif %}"
    )
    changed = with_template(tokenizer, template)
    reply = {"role": "assistant", "content": "think"}
    example = messages_to_example([USER, reply], changed, conventions["lossless"])
    assert example.target.tolist() == ids("(think)think<|im_end|>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% if add_generation_prompt %}A{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
            "at the end",
        ),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "in another way"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "closes a reply with '' .token None"),
        ("{% for m in messages %}{{ m.content }}<bos>{% endfor %}", "closes a reply with '<bos>' .token 258"),
        ("{{ raise_exception('one user only') }}", r"refuses .* with roles \['user'\]: one user only"),
    ],
)
def test_templates_that_cannot_be_used(tokenizer, conventions, template, message):
    with pytest.raises(ValueError, match=message):
        messages_to_example([USER, REPLY], with_template(tokenizer, template), conventions["lossless"])


def test_conversations_that_teach_nothing(tokenizer, conventions):
    for messages in ([USER], [REPLY], [USER, REPLY, USER]):
        with pytest.raises(ValueError, match="must end with a reply"):
            messages_to_example(messages, tokenizer, conventions["bos"])
    with pytest.raises(ValueError, match="the target is empty"):
        messages_to_example([USER, {**REPLY, "content": " "}], tokenizer, conventions["bos"])
