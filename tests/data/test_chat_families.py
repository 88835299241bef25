"""The chat templates of every family: what the encoder reads and what the decoder is given and writes, by the letter.

`published` is a pair of T5Gemma's conventions (the decoder starts from BOS), `lossless` one that goes on where its
donor would: the template's header is the decoder's.
"""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.data import chat_templates as templates
from twofold.data.chat import messages_to_example, prompt_inputs
from twofold.data.convention import Convention

SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ok"},
]


def tokenizer_for(template, bos, eos):
    """One token per byte, and the special tokens of all families."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in templates.SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=template, bos_token=bos, eos_token=eos
    )


GEMMA_TURNS = "<start_of_turn>model\nyo<end_of_turn>\n<start_of_turn>user\nbye<end_of_turn>\n"
LLAMA_TURNS = (
    "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nyo<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nbye<|eot_id|>"
)
CHATML_TURNS = (
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>user\nbye<|im_end|>\n"
)
FAMILIES = {
    "gemma-2": (
        templates.GEMMA_2, "<bos>", "<end_of_turn>", True,
        "<start_of_turn>user\nhi<end_of_turn>\n" + GEMMA_TURNS,
        "<start_of_turn>user\nBe brief.\n\nhi<end_of_turn>\n" + GEMMA_TURNS,
        "<start_of_turn>model\n", "ok",
    ),
    "gemma-3": (
        templates.GEMMA_3, "<bos>", "<end_of_turn>", True,
        "<start_of_turn>user\nhi<end_of_turn>\n" + GEMMA_TURNS,
        "<start_of_turn>user\nBe brief.\n\nhi<end_of_turn>\n" + GEMMA_TURNS,
        "<start_of_turn>model\n", "ok",
    ),
    "llama-3": (
        templates.LLAMA_3, "<|begin_of_text|>", "<|eot_id|>", True,
        LLAMA_TURNS,
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>" + LLAMA_TURNS,
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "ok",
    ),
    "smollm2": (
        templates.SMOLLM2, "<|im_start|>", "<|im_end|>", False,
        "<|im_start|>system\nYou are helpful.<|im_end|>\n" + CHATML_TURNS,
        "<|im_start|>system\nBe brief.<|im_end|>\n" + CHATML_TURNS,
        "<|im_start|>assistant\n", "ok",
    ),
    "qwen-3": (
        templates.QWEN_3, None, "<|im_end|>", False,
        CHATML_TURNS,
        "<|im_start|>system\nBe brief.<|im_end|>\n" + CHATML_TURNS,
        "<|im_start|>assistant\n", "<think>\n\n</think>\n\nok",
    ),
    "mistral": (
        templates.MISTRAL, "<s>", "</s>", True,
        "[INST] hi[/INST] yo</s>[INST] bye[/INST]",
        "[INST] Be brief.\n\nhi[/INST] yo</s>[INST] bye[/INST]",
        "", " ok",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_letter_by_letter(name):
    template, bos, stop, source_bos, plain, with_system, header, reply = FAMILIES[name]
    tokenizer = tokenizer_for(template, bos, stop)
    vocab = tokenizer.get_vocab()
    common = {"bos_token_id": vocab.get(bos), "stop_token_ids": (vocab[stop],), "pad_token_id": 0}
    lossless = Convention(decoder_start="last_source_token", source_bos=source_bos, **common)
    start = bos if source_bos else ""
    for messages, expected in ((CHAT, plain), ([SYSTEM, *CHAT], with_system)):
        example = messages_to_example(messages, tokenizer, lossless)
        source, prefix, target = map(tokenizer.decode, example[:3])
        # Without a header, the last source token is what the decoder goes on from.
        assert (source + prefix, target) == (start + expected + header, reply + stop)
        assert prefix == (header or "[/INST]")
        assert [part.tolist() for part in prompt_inputs(messages[:-1], tokenizer, lossless)] == [
            example.source.tolist(),
            example.decoder_prefix.tolist(),
        ]
        if bos is None:
            continue
        # T5Gemma: no BOS in the encoder, whatever the template writes, and the header there.
        published = Convention(decoder_start="bos", source_bos=False, **common)
        example = messages_to_example(messages, tokenizer, published)
        assert tuple(map(tokenizer.decode, example[:3])) == (expected + header, bos, reply + stop)
        assert [vocab[bos], *example.target[:-1]] == example.decoder_input_ids.tolist()


def test_system_text_is_folded_only_where_it_would_be_lost():
    convention = Convention(
        decoder_start="bos", source_bos=False, bos_token_id=258, stop_token_ids=(261,), pad_token_id=0
    )
    forgets = templates.GEMMA_2.replace("{{ raise_exception('System role not supported') }}", "").replace(
        "{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"
    )
    tokenizer = tokenizer_for(forgets, "<bos>", "<end_of_turn>")
    assert (tokenizer.convert_tokens_to_ids("<bos>"), tokenizer.convert_tokens_to_ids("<end_of_turn>")) == (
        258,
        261,
    )
    source, _ = prompt_inputs([SYSTEM, CHAT[0]], tokenizer, convention)
    assert (
        tokenizer.decode(source)
        == "<start_of_turn>user\nBe brief.\n\nhi<end_of_turn>\n<start_of_turn>model\n"
    )
    with pytest.raises(ValueError, match=r"refuses .* roles \['system'\]"):
        messages_to_example(
            [SYSTEM, CHAT[1]], tokenizer_for(templates.GEMMA_2, "<bos>", "<end_of_turn>"), convention
        )


def test_a_reply_has_the_tokens_it_has_in_its_conversation():
    """SentencePiece puts a space before a text; a reply is in the middle of one."""
    words = ["<unk>", "<s>", "</s>", "▁", "yo", "▁yo", "\n", "hi", "<", "|", ">", *"user", *"ait"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", ignore_merges=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    inner.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=templates.ZEPHYR, bos_token="<s>", eos_token="</s>"
    )
    assert tokenizer.tokenize("yo") == ["▁yo"]
    convention = Convention(
        decoder_start="last_source_token",
        source_bos=True,
        bos_token_id=1,
        stop_token_ids=(2,),
        pad_token_id=0,
    )
    example = messages_to_example(CHAT[:2], tokenizer, convention)
    assert tokenizer.convert_ids_to_tokens(example.target.tolist()) == ["yo", "</s>"]
