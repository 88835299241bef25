import pytest

import twofold
from twofold.infer import generate


def test_texts_in_texts_out_in_order(text_model):
    engine = twofold.Engine(text_model(), device="cpu", batch_size=2)
    prompts = ["a long enough prompt", "short", "of middle length"]
    found = engine.generate(prompts, max_new_tokens=6)
    for prompt, completion in zip(prompts, found, strict=True):
        ids = engine.tokenizer(prompt)["input_ids"]
        alone = generate(engine.model, [ids[:-1]], [ids[-1:]], max_new_tokens=6)[0]
        assert completion.token_ids == alone.token_ids
        assert completion.num_source_tokens == len(ids) - 1
        assert completion.text == engine.tokenizer.decode(alone.token_ids, skip_special_tokens=True)


def test_a_published_pair_starts_from_bos(text_model):
    engine = twofold.Engine(text_model(decoder_start="bos", layout="separate", reads="final"), device="cpu")
    ids = engine.tokenizer("hello")["input_ids"]
    expected = generate(engine.model, [ids], [[256]], max_new_tokens=5)[0]
    assert engine.generate(["hello"], max_new_tokens=5)[0].token_ids == expected.token_ids


def test_conversations_use_the_chat_template(text_model):
    engine = twofold.Engine(text_model(), device="cpu")
    found = engine.generate([[{"role": "user", "content": "hi"}]], max_new_tokens=5)[0]
    source = engine.tokenizer("<|im_start|>user\nhi<|im_end|>\n")["input_ids"]
    header = engine.tokenizer("<|im_start|>assistant\n")["input_ids"]
    assert found.token_ids == generate(engine.model, [source], [header], max_new_tokens=5)[0].token_ids


def test_seeds_do_not_depend_on_the_batch_size(text_model):
    model = text_model()
    prompts = ["one", "three", "sevens"]
    options = {"max_new_tokens": 6, "temperature": 1.0, "seed": 5}
    one, three = (
        twofold.Engine(model, device="cpu", batch_size=n).generate(prompts, **options) for n in (1, 3)
    )
    assert [c.token_ids for c in one] == [c.token_ids for c in three]


def test_bad_use(text_model):
    model = text_model()
    engine = twofold.Engine(model, device="cpu")
    with pytest.raises(ValueError, match=r"pass \[text\]"):
        engine.generate("hello")
    with pytest.raises(ValueError, match="no prompts"):
        engine.generate([])
    with pytest.raises(ValueError, match="source is empty"):
        engine.generate([""])
    with pytest.raises(ValueError, match="batch_size"):
        twofold.Engine(model, batch_size=0)
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        twofold.Engine(model, device="cpu").generate(["hello"])
