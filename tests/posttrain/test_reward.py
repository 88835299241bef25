"""Reward models against one text at a time, what they say of themselves, and the folder that they become."""

import math

import pytest
import torch

import twofold
from tests.posttrain.tiny_pairs import data_config, pairs_of
from tests.train.tiny_run import settings, tiny_model
from twofold.data import Convention
from twofold.posttrain import reward
from twofold.posttrain.pairs import PairLoader
from twofold.posttrain.reward import (
    RewardModel,
    RewardObjective,
    collate_texts,
    load_reward_model,
    whole_text,
)
from twofold.train import evaluate, fit
from twofold.train.checkpointing import save_model
from twofold.train.step import scored_positions
from twofold.train.world import ONE_PROCESS


def reward_model(seed=0, **meeting):
    return RewardModel.of_pair(tiny_model(seed, **meeting), seed)


def collate_for(model):
    return collate_texts(Convention.of(model.config))


def test_a_text_is_what_a_reader_of_prompt_and_reply_sees(text_model, tmp_path):
    model = text_model()
    (pair, *_) = pairs_of(model, tmp_path)
    text = model.tokenizer.decode(whole_text(pair.chosen, Convention.of(model.config)))
    assert text == "<|im_start|>user\nsay tree0<|im_end|>\n<|im_start|>assistant\nTR<|im_end|>"
    published = tiny_model()  # its decoder starts from a BOS that is not part of the text
    (pair, *_) = pairs_of(published, tmp_path)
    text = published.tokenizer.decode(whole_text(pair.rejected, Convention.of(published.config)))
    assert text == "say tree0tre<eos>"


def test_losses_gradients_and_metrics_are_those_of_single_texts(tmp_path):
    model = reward_model()
    with torch.no_grad():
        model.head.out_proj.weight.mul_(20)
    pairs = [p._replace(margin=0.1 * n) for n, p in enumerate(pairs_of(model, tmp_path)[:9])]
    objective = RewardObjective(model)
    batch = collate_for(model)(pairs, range(9))
    assert (batch.num_scored_tokens, batch.num_real_tokens) == (18, int((batch.segment_ids > 0).sum()))
    loss = objective(batch, scored_positions(batch))
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    margins = []
    for pair in pairs:
        rewards = []
        for reply in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(whole_text(reply, Convention.of(model.config)))[None]
            states = model.encoder(ids, twofold.models.masks.Tokens.from_segments(torch.ones_like(ids)))
            last = states.last_hidden_state[0, -1]
            rewards.append(last @ model.head.out_proj.weight[0] + model.head.out_proj.bias[0])
        margins.append(rewards[0] - rewards[1])
    expected = sum(-torch.sigmoid(m - p.margin).log() for m, p in zip(margins, pairs, strict=True))
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    scale = max(p.grad.abs().max().item() for p in model.parameters())
    for n, p in model.named_parameters():
        torch.testing.assert_close(found[n], p.grad, atol=1e-5 * scale, rtol=1e-3, msg=n)
    assert objective.count(batch) == 9
    found = evaluate(objective, [batch])
    values = [m.item() for m in margins]
    assert found.metrics["margin"] == pytest.approx(sum(values) / 9, abs=1e-5)
    assert found.metrics["accuracy"] == pytest.approx(sum(m > 0 for m in values) / 9)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for m in values:
        confidence = 1 / (1 + math.exp(-abs(m)))
        bins.setdefault(int((confidence - 0.5) * 20), []).append((confidence, m > 0))
    assert len(bins) > 2
    error = sum(
        len(b) / 9 * abs(sum(right for _, right in b) / len(b) - sum(c for c, _ in b) / len(b))
        for b in bins.values()
    )
    assert found.metrics["calibration_error"] == pytest.approx(error, abs=1e-5)
    assert set(found.metrics) == {"accuracy", "margin", "calibration_error"}


def test_calibration_error_of_known_margins():
    """Of two pairs with confidence 0.75 one is right, of one with 0.95 all: (2 * 0.25 + 0.05) / 3."""
    objective = RewardObjective(reward_model())
    margins = torch.tensor([math.log(3), -math.log(3), math.log(19)])

    class Rewards:
        def __call__(self, ids, is_real):
            return torch.stack([margins, torch.zeros(3)], dim=1).flatten()

    object.__setattr__(objective, "model", Rewards())
    objective._modules.pop("model")
    ids = torch.ones(6, 1, dtype=torch.int64)
    batch = twofold.posttrain.reward.RewardBatch(
        input_ids=ids, segment_ids=ids, decoder_input_ids=ids[:, :0], decoder_segment_ids=ids[:, :0],
        labels=ids[:, :0], margins=torch.zeros(3),
    )  # fmt: skip
    loss = objective(batch, scored_positions(batch))
    assert loss.item() == pytest.approx(-math.log(0.75) - math.log(0.25) - math.log(0.95))
    sums = torch.stack(objective._noted).sum(0).tolist()
    means = dict(zip(objective.metric_names, (total / 3 for total in sums), strict=True))
    assert objective.reported(means) == pytest.approx(
        {"accuracy": 2 / 3, "margin": math.log(19) / 3, "calibration_error": (2 * 0.25 + 0.05) / 3}
    )


def test_scores_are_those_of_the_objective_whatever_else_is_scored(text_model, tmp_path, monkeypatch):
    model = RewardModel.of_pair(text_model(), 3)
    pairs = pairs_of(model, tmp_path)[:4]
    prompts = ["say tree0", "say house1", [{"role": "user", "content": "say river2"}], "say cloud3"]
    scores = model.score(prompts, ["TR", "HOU", "RIVE", "CLOUD"])
    batch = collate_for(model)(pairs, range(4))
    with torch.no_grad():
        expected = model(batch.input_ids, batch.segment_ids)[::2]
    assert (scores.shape, scores.dtype) == ((4,), torch.float32)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.score(prompts[2:3], ["RIVE"]), scores[2:3], atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(reward, "_BATCH_TOKENS", 100)  # of 39 to 48 tokens: two batches
    backwards = model.score(prompts[::-1], ["CLOUD", "RIVE", "HOU", "TR"])
    torch.testing.assert_close(backwards, scores.flip(0), atol=1e-5, rtol=1e-5)
    assert model.score([], []).shape == (0,)
    with pytest.raises(ValueError, match="got 1 and 2"):
        model.score(["a"], ["b", "c"])
    with pytest.raises(ValueError, match="target is empty"):
        model.score(["a"], [""])
    with pytest.raises(ValueError, match=r"prompt and reply 0.*longer than the encoder's max_position"):
        model.score(["a" * 300], ["b"])


def test_the_head_starts_small_whatever_the_width():
    model = reward_model(5)
    assert model.head.out_proj.weight.std().item() == pytest.approx(33**-0.5, rel=0.3)
    assert model.head.out_proj.bias.item() == 0
    again = reward_model(5).head.out_proj.weight
    assert torch.equal(model.head.out_proj.weight, again)


def test_it_comes_back_from_its_folder(tmp_path):
    model = reward_model(2)
    save_model(model, tmp_path / "reward", ONE_PROCESS)
    loaded = load_reward_model(tmp_path / "reward")
    assert not loaded.training
    for (n, ours), (m, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert n == m
        assert torch.equal(ours, theirs)
    assert {n.split(".")[0] for n, _ in loaded.named_parameters()} == {"encoder", "head"}
    assert torch.equal(loaded.score(["a"], ["b"]), model.score(["a"], ["b"]))
    with pytest.raises(ValueError, match=r"is a reward model, which writes nothing; load it with"):
        twofold.load(tmp_path / "reward")
    twofold.save(tiny_model(), tmp_path / "pair")
    with pytest.raises(ValueError, match=r"is no reward model \(architectures.*\['EncoderDecoder'\]\)"):
        load_reward_model(tmp_path / "pair")


def test_a_tiny_model_learns_what_is_preferred(tmp_path):
    model = reward_model()
    pairs = pairs_of(model, tmp_path)
    data = data_config("unused", pairs_per_batch=16)
    loaders = [PairLoader(pairs, data, collate_for(model)) for _ in range(2)]
    config = settings(steps=20, optimizer={"learning_rate": 3e-3}, schedule={"decay": "constant"})
    result = fit(model, *loaders, config, tmp_path / "run", objective=RewardObjective)
    found = evaluate(RewardObjective(model), loaders[1].one_pass())
    assert found.metrics["accuracy"] == 1.0
    assert found.metrics["margin"] > 1
    assert result.held_out[-1][1] < 0.5 * result.held_out[0][1]
    assert load_reward_model(result.model_path).score(["say tree0"], ["TR"]) > model.score(
        ["say tree0"], ["tr"]
    )
