"""Which prompts a step answers, with which seeds, and what becomes of their rewards; answers come from a stand-in."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.posttrain.tiny_rollouts import grpo_recipe
from tests.train.tiny_run import BOS, EOS, PAD, tiny_model
from twofold.posttrain.prompts import Prompt, PromptOrder, Prompts
from twofold.posttrain.rewards import Rewards
from twofold.posttrain.rollout_loader import HeldOutRollouts, RolloutLoader, RolloutParts
from twofold.posttrain.rollouts import Answer
from twofold.train.world import World

PROMPTS = [
    Prompt(np.array([5, n]), np.array([BOS]), f"prompt {n}", {"answer": "a"}, f"row {n}") for n in range(7)
]


class Writer:
    """Answer i to prompt n has i + 1 tokens; notes what it was asked."""

    def __init__(self):
        self.policy = tiny_model()
        self.asked = []
        self.refreshed = 0

    def refresh(self):
        self.refreshed += 1

    def answer(self, prompts, seeds, *, num_samples, temperature):
        self.asked.append(([int(p.source[1]) for p in prompts], list(seeds), temperature))
        return [
            [Answer((9,) * i + (EOS,), "a" * (i + 1), i == 1) for i in range(num_samples)] for _ in prompts
        ]


def loader_of(folder, world=None, **changes):
    recipe = grpo_recipe(
        folder, accumulate_batches=2, rewards=[{"kind": "length", "target_words": 1}], **changes
    )
    writer = Writer()
    rewards = Rewards(recipe.rewards)
    parts = RolloutParts(
        recipe=recipe, engine=writer, rewards=rewards, world=world or World(), pad_token_id=PAD
    )
    return RolloutLoader(Prompts(train=PROMPTS, held_out=[], report=[]), parts), writer, parts


def test_prompts_come_in_the_order_of_the_run_whoever_answers_them(tmp_path):
    loader, writer, _ = loader_of(tmp_path)
    for _ in range(7):
        loader.next_step()
    drawn = [n for numbers, _, _ in writer.asked for n in numbers]
    order = PromptOrder(7, 0, shuffle=True)
    assert drawn == [order[draw] for draw in range(28)]
    assert all(sorted(drawn[i : i + 7]) == list(range(7)) for i in range(0, 28, 7))
    seeds = [seed for _, seeds, _ in writer.asked for seed in seeds]
    assert len(set(seeds)) == 28
    assert writer.refreshed == 7
    by_rank = []
    for rank in range(2):
        loader, writer, _ = loader_of(tmp_path, World(rank=rank, size=2))
        assert len(loader.next_step()) == 1
        by_rank += [*zip(*writer.asked[0][:2], strict=True)]
    assert by_rank == list(zip(drawn[:4], seeds[:4], strict=True))


def test_a_batch_holds_what_was_written_and_what_it_is_worth(tmp_path, monkeypatch):
    loader, _, parts = loader_of(tmp_path)
    monkeypatch.setattr(
        parts.rewards,
        "_functions",
        [lambda prompts, texts, records: [len(t) + int(p[-1]) for p, t in zip(prompts, texts, strict=True)]],
    )
    batch, _ = loader.next_step()
    first = PromptOrder(7, 0, shuffle=True)[0]
    assert batch.labels[:3].tolist() == [[EOS, -100, -100], [9, EOS, -100], [9, 9, EOS]]
    assert batch.decoder_input_ids[2].tolist() == [BOS, 9, 9]
    assert batch.input_ids[0].tolist() == [5, first]
    assert batch.rewards[:3].tolist() == [[first + n] * 2 for n in (1.0, 2.0, 3.0)]
    assert batch.advantages[:3].tolist() == pytest.approx([-1 / 1.0001, 0.0, 1 / 1.0001])
    assert batch.is_truncated.tolist() == [False, True, False] * 2
    assert batch.documents[0] == f"row {first}"


def test_a_rollout_is_used_as_often_as_asked_and_survives_a_stop(tmp_path):
    changes = {"policy": {"num_iterations": 3}}
    loader, writer, _ = loader_of(tmp_path, **changes)
    first = loader.next_step()[0]
    state = json.loads(json.dumps(loader.state_dict()))
    again = loader.next_step()[0]
    other, _, _ = loader_of(tmp_path, **changes)
    other.load_state_dict(state)
    resumed = other.next_step()[0]
    for batch in (again, resumed):
        assert not batch.seconds.any()
        for name in ("labels", "advantages", "rewards", "is_truncated", "old_logprobs", "source_of"):
            one, two = getattr(batch, name), getattr(first, name)
            assert torch.equal(one, two), name
            assert one.dtype == two.dtype
        assert batch.documents == first.documents
    assert first.seconds.all()
    assert len(writer.asked) == 1
    loader.next_step()
    assert all(stream["batch"] is None for stream in loader.state_dict()["streams"].values())
    loader.next_step()
    assert len(writer.asked) == 2
    changed = {**state, "prompts": "others"}
    with pytest.raises(ValueError, match="saved state of the loader has prompts others"):
        other.load_state_dict(changed)


def test_held_out_prompts_are_answered_in_their_order_with_the_same_seeds(tmp_path):
    _, writer, parts = loader_of(tmp_path)
    held_out = HeldOutRollouts(PROMPTS, parts)
    batches = list(held_out.one_pass())
    list(held_out.one_pass())
    assert [len(batch.input_ids) for batch in batches] == [2, 2, 2, 1]
    assert writer.asked[0] == writer.asked[1]
    assert writer.asked[0][0] == list(range(7))
    assert writer.asked[0][2] == 0.0
    assert [group.prompt.where for group in held_out.last] == [f"row {n}" for n in range(7)]
    alone = replace(parts, world=World(rank=1, size=2))
    groups, _ = alone.groups([], [], num_samples=1, temperature=0.0)
    assert groups == []
