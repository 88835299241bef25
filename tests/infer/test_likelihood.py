"""Scores and embeddings against one whole forward pass each."""

import pytest
import torch

import twofold
from tests.models.tiny import MEETINGS, assert_same, build, gemma_stack, meeting_id, pair_config
from twofold.infer.likelihood import embed_sources, score_targets

SOURCES = [[5, 6, 7, 8, 9], [], [10] * 12, [11, 12]]
PREFIXES = [[2], [2, 30], [31, 32, 33], [2]]
TARGETS = [[20, 21, 22], [1], [0] * 9, [23, 24]]


@torch.no_grad()
@pytest.mark.parametrize("meeting", [MEETINGS[i] for i in (0, 9, 15)], ids=meeting_id)
def test_scores_are_those_of_whole_forward_passes(meeting, monkeypatch):
    monkeypatch.setattr("twofold.infer.likelihood._HEAD_TOKENS", 2)
    model = build(pair_config(gemma_stack(), **meeting), qk_factor=2.0)
    found = score_targets(model, SOURCES, PREFIXES, TARGETS)
    for score, source, prefix, target in zip(found, SOURCES, PREFIXES, TARGETS, strict=True):
        source_ids, ids = torch.tensor([source or [0]]), torch.tensor([[*prefix, *target]])
        mask = torch.full_like(source_ids, bool(source))
        logits = model(source_ids, mask, ids, torch.ones_like(ids)).logits[0, len(prefix) - 1 : -1]
        expected = [row[token].item() for row, token in zip(logits.log_softmax(-1), target, strict=True)]
        assert score.token_ids == tuple(target)
        assert score.logprobs == pytest.approx(expected, abs=1e-5)
        assert score.total == pytest.approx(sum(expected), abs=1e-4)
        assert score.is_greedy == (logits.argmax(-1).tolist() == target)


@pytest.mark.parametrize(("batch_tokens", "sources_encoded"), [(10, [1, 1, 1]), (4096, [2])])
def test_rows_of_one_source_encode_it_once_a_batch(batch_tokens, sources_encoded, monkeypatch):
    monkeypatch.setattr("twofold.infer.likelihood._MAX_TOKENS", batch_tokens)
    model = build(pair_config(gemma_stack(), **MEETINGS[15]), qk_factor=2.0)
    sources = [[5, 6, 7], [8, 9], [5, 6, 7], [5, 6, 7], [8, 9]]
    targets = [[20, 21], [22], [23], [24, 25, 26], [27, 28]]
    encoded = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda ids, mask: encoded.append(len(ids)) or encode(ids, mask))
    found = score_targets(model, sources, [[2]] * 5, targets)
    assert encoded == sources_encoded
    for score, source, target in zip(found, sources, targets, strict=True):
        alone = score_targets(model, [source], [[2]], [target])[0]
        assert score.logprobs == pytest.approx(alone.logprobs, abs=1e-5)


@torch.no_grad()
def test_what_the_model_finds_most_likely_is_greedy():
    model = build(pair_config(gemma_stack()))
    logits = model(torch.tensor([[5, 6]]), None, torch.tensor([[2]])).logits[0, -1]
    best, other = logits.argmax().item(), logits.argmin().item()
    found = score_targets(model, [[5, 6]] * 3, [[2]] * 3, [[best], [other], [best, other]])
    assert [score.is_greedy for score in found][:2] == [True, False]


def test_the_last_token_of_a_target_needs_no_position():
    """A decoder with 64 positions predicts 64 tokens behind its start token."""
    model = build(pair_config(gemma_stack()))
    assert len(score_targets(model, [[5]], [[2]], [[7] * 64])[0].logprobs) == 64
    with pytest.raises(ValueError, match="max_position_embeddings of 64"):
        score_targets(model, [[5]], [[2]], [[7] * 65])
    with pytest.raises(ValueError, match="token ids from 40 to 40"):
        score_targets(model, [[5]], [[2]], [[7, 40]])


@torch.no_grad()
@pytest.mark.parametrize("batch_tokens", [5, 4096])
def test_embeddings_pool_the_encoders_output(batch_tokens, monkeypatch):
    monkeypatch.setattr("twofold.infer.likelihood._MAX_TOKENS", batch_tokens)
    model = build(pair_config(gemma_stack()))
    sources = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
    pools = {"mean": lambda x: x.mean(0), "first": lambda x: x[0], "last": lambda x: x[-1]}
    for pooling, pool in pools.items():
        found = embed_sources(model, sources, pooling)
        expected = [pool(model.encode(torch.tensor([source])).last_hidden_state[0]) for source in sources]
        assert_same(found, torch.stack(expected))


def test_the_engine_scores_and_embeds_texts(text_model):
    """The end token counts as a token of the target; an embedding reads the whole text."""
    engine = twofold.Engine(text_model(), device="cpu")
    source, target = engine.tokenizer("hello")["input_ids"], engine.tokenizer("you")["input_ids"]
    with_end, without = engine.score(["hello"], ["you"])[0], engine.score(["hello"], ["you"], ends=False)[0]
    assert with_end == score_targets(engine.model, [source[:-1]], [source[-1:]], [[*target, 257]])[0]
    assert without.token_ids == tuple(target)
    assert without.logprobs == pytest.approx(with_end.logprobs[:-1], abs=1e-5)
    assert_same(engine.embed(["hello"]), embed_sources(engine.model, [source], "mean"))
    assert engine.score([], []) == []
    assert engine.embed(["a" * 256]).shape == (1, 32)  # all positions the encoder has


def test_a_score_is_that_of_the_generated_tokens(text_model):
    engine = twofold.Engine(text_model(), device="cpu")
    completion = engine.generate(["hello"], max_new_tokens=5, logprobs=0)[0]
    ids = engine.tokenizer("hello")["input_ids"]
    score = score_targets(engine.model, [ids[:-1]], [ids[-1:]], [completion.token_ids])[0]
    assert [x.logprob for x in completion.logprobs] == pytest.approx(score.logprobs, abs=1e-4)


def test_bad_input(text_model):
    model = text_model()
    engine = twofold.Engine(model, device="cpu")
    for call, match in [
        (lambda: engine.score(["a"], []), "as many targets as prompts, got 1 prompts, 0 targets"),
        (lambda: engine.score(["ab"], [""], ends=False), "target 0 is empty"),
        (lambda: engine.score(["a" * 300], ["b"]), "target 0: 3.. tokens before|source of 299 tokens"),
        (lambda: engine.embed(["a", ""]), "text 1 is empty"),
        (lambda: engine.embed("a"), r"pass \[text\]"),
        (lambda: engine.embed(["a"], pooling="max"), "unknown pooling 'max'"),
        (lambda: engine.embed(["a" * 300]), "text 0: source of 300 tokens is longer"),
        (lambda: embed_sources(model, [[]], "mean"), "text 0 has no tokens"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
    model.tokenizer = None
    for call in (lambda e: e.score(["a"], ["b"]), lambda e: e.embed(["a"])):
        with pytest.raises(ValueError, match="no tokenizer"):
            call(twofold.Engine(model, device="cpu"))
