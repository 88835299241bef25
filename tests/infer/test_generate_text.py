import json

import pytest

import twofold
from twofold.infer import Request, Sampling, generate


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
    with pytest.raises(ValueError, match="one completion per prompt"):
        engine.generate(["hello"], n=2, temperature=1.0)
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        twofold.Engine(model, device="cpu").generate(["hello"])


def test_streamed_text_is_the_completions(text_model):
    """Random bytes: half characters are held back until they are whole or the answer ends."""
    engine = twofold.Engine(text_model(), device="cpu")
    request = Request(prompt="hello", max_new_tokens=40, sampling=Sampling(temperature=2.0, seed=1), n=3)
    deltas = list(engine.stream(request))
    for index, completion in enumerate(engine.submit(request).result()):
        whole = engine.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert completion.text == whole == "".join(d.text for d in deltas if d.index == index)


def test_a_stop_string_ends_the_text_before_it(text_model):
    """It may begin in the middle of a token's text and end in another's; the row leaves, others go on."""
    engine = twofold.Engine(text_model(), device="cpu")
    free = engine.generate(["hello", "world"], max_new_tokens=20)
    stop = free[0].text[5:8]
    found = engine.generate(["hello", "world"], max_new_tokens=20, stop=[stop, "never there"])
    assert found[0].text == free[0].text[: free[0].text.index(stop)]
    assert found[0].finish_reason == "stop"
    assert found[0].token_ids == free[0].token_ids[: len(found[0].token_ids)]
    assert len(found[0].token_ids) < 20
    assert found[1] == free[1]
    assert (
        "".join(d.text for d in engine.stream(Request(prompt="hello", max_new_tokens=20, stop=stop)))
        == found[0].text
    )


def test_the_end_token_gives_no_text_even_where_it_is_an_ordinary_one(text_model):
    engine = twofold.Engine(text_model(), device="cpu")
    free = engine.generate(["hello"], max_new_tokens=8)[0]
    stop = free.token_ids[4]
    ended = engine.generate(["hello"], max_new_tokens=8, stop_token_ids=[stop])[0]
    n = free.token_ids.index(stop) + 1
    assert (ended.token_ids, ended.finish_reason) == (free.token_ids[:n], "stop")
    assert ended.text == engine.tokenizer.decode(free.token_ids[: n - 1])


def test_prompt_i_draws_with_seed_plus_i(text_model):
    """Whatever is decoded together with it."""
    model = text_model()
    engine = twofold.Engine(model, device="cpu", batch_size=2)
    prompts = ["some text", "b", "some other"]
    found = engine.generate(
        prompts, max_new_tokens=6, temperature=1.0, top_k=50, top_p=0.9, seed=7, min_p=0.01
    )
    for i, (prompt, completion) in enumerate(zip(prompts, found, strict=True)):
        sampling = Sampling(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, seed=7 + i)
        ids = engine.tokenizer(prompt)["input_ids"]
        expected = generate(model, [ids[:-1]], [ids[-1:]], max_new_tokens=6, sampling=sampling)[0]
        assert completion.token_ids == expected.token_ids


def test_nothing_runs_where_one_prompt_is_bad_and_nothing_is_left_after_an_interrupt(text_model, monkeypatch):
    engine = twofold.Engine(text_model(), device="cpu")
    with pytest.raises(ValueError, match="source is empty"):
        engine.generate(["hello", ""])
    assert engine.loop.is_idle
    step, n_steps = engine.loop.step, iter(range(3))

    def interrupted():
        if next(n_steps, None) is None:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine.loop, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(["hello", "world"] * 6)
    assert engine.loop.is_idle
    assert engine.loop.scheduler.used_bytes == 0


def test_what_a_completion_writes_as_json(text_model):
    engine = twofold.Engine(text_model(), device="cpu")
    plain = engine.generate(["hello"], max_new_tokens=2)[0]
    assert set(plain.to_json()) == {"text", "token_ids", "finish_reason", "num_source_tokens"}
    full = engine.generate(["hello"], max_new_tokens=2, num_beams=2, logprobs=1)[0]
    written = json.loads(json.dumps(full.to_json()))
    assert written["score"] == full.score
    assert written["logprobs"][0] == {
        "logprob": full.logprobs[0].logprob,
        "top": [list(full.logprobs[0].top[0])],
    }
