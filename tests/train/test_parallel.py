"""Several ranks do what one does. Batches differ in scored tokens, so that a mean of their means is wrong."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.train.ranks import on_ranks
from tests.train.tiny_run import data_config, settings, tiny_model
from twofold.checkpoint.load import load
from twofold.checkpoint.shards import ShardsSource
from twofold.data import Convention, Corpus, Loader
from twofold.train import Callback, evaluate, fit, token_loss
from twofold.train.loop import Trainer
from twofold.train.loss import SparseTeacher
from twofold.train.parallel import shard
from twofold.train.step import LossModule
from twofold.train.world import start_world

A = 4
TEXTS = [("mind the gap " * 4)[: (30, 18, 45, 10)[n % 4]] for n in range(24)]
"""Some share a row with others, and leave rows of unequal lengths."""


def streams(model, owned=None, texts=TEXTS, num_streams=A):
    convention = Convention.of(model.config)
    corpus = Corpus.from_records([{"text": text} for text in texts], model.tokenizer, convention)
    config = data_config(rows_per_batch=1, packing=True)
    return Loader([corpus], model.tokenizer, config, convention, num_streams=num_streams, owned=owned)


def run(output, changes=None, model=None, *, resume=False, held_out=True, callbacks=(), objective=LossModule):
    """What each rank does: losses, held-out losses."""
    config = settings(steps=4, accumulate_batches=A, **(changes or {}))
    with start_world(config) as world:
        model_here = tiny_model(seed=0 if world.is_main else 7, **(model or {}))
        loader = streams(model_here, world.streams(A))
        held = streams(model_here, texts=TEXTS[-3:], num_streams=1) if held_out else None
        result = fit(
            model_here,
            loader,
            held,
            config,
            output,
            callbacks,
            resume=resume,
            world=world,
            objective=objective,
        )
    return result.losses, result.held_out


def weights(output):
    return dict(load(Path(output) / "model").named_parameters())


def assert_same_weights(one, other, **tolerance):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], **({"rtol": 0, "atol": 3e-6} | tolerance), msg=name
        )


def close(one, other):
    return one == pytest.approx(other, rel=2e-6)


def naive(changes=None, model=None):
    """Example by example, with a plain loop, autograd and AdamW."""
    config = settings(steps=4, accumulate_batches=A, **(changes or {}))
    net = tiny_model(**(model or {})).train()
    loader = streams(net)
    embeddings = {id(net.encoder.embed_tokens.weight), id(net.decoder.embed_tokens.weight)}
    named = dict(net.named_parameters())
    decayed = [p for p in named.values() if p.ndim == 2 and id(p) not in embeddings]
    rest = [p for p in named.values() if p.ndim != 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    losses = []
    for step in range(1, 5):
        total, count = torch.zeros(()), 0
        for batch in loader.next_step():
            for segment in range(1, int(batch.segment_ids.max()) + 1):
                source = batch.input_ids[batch.segment_ids == segment][None]
                mine = batch.decoder_segment_ids == segment
                logits = net(source, torch.ones_like(source), batch.decoder_input_ids[mine][None]).logits
                summed, n = token_loss(logits, batch.labels[mine][None])
                total, count = total + summed, count + int(n)
        adamw.zero_grad()
        (total / count).backward()
        losses.append(total.item() / count)
        if step <= config.cross_attention_warmup_steps:
            for name, p in named.items():
                p.grad = p.grad if "cross_attn" in name else None
        torch.nn.utils.clip_grad_norm_([p for p in named.values() if p.grad is not None], 1.0)
        for group in adamw.param_groups:
            progress = step / 4  # half a cosine wave, down to a tenth at the last step
            group["lr"] = 3e-3 * (0.1 + 0.9 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item()))
        adamw.step()
    return losses, {name: p.detach() for name, p in named.items()}


CASES = {
    "tied": ({}, {"tie_word_embeddings": "all"}),
    "tied decoder, warm-up": ({"cross_attention_warmup_steps": 2}, {"tie_word_embeddings": "decoder"}),
    "untied, every batch reduced": ({"reduce_every_batch": True}, {"tie_word_embeddings": "none"}),
    "checkpointed": ({"activation_checkpointing": "selective"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_and_a_naive_loop(tmp_path, case):
    changes, model = CASES[case]
    one = run(tmp_path / "one", changes, model)
    two = on_ranks(run, 2, tmp_path / "two", changes, model)
    assert two[0] == two[1]
    assert close(two[0][0], one[0])
    assert close([loss for _, loss in two[0][1]], [loss for _, loss in one[1]])
    assert two[0][0][0] == one[0][0]  # the sum over batches has one order
    assert two[0][1][0] == one[1][0]
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    losses, wanted = naive(changes, model)
    assert one[0] == pytest.approx(losses, rel=1e-5)
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=2e-5, msg=name)


def test_batches_of_a_step_differ_in_their_tokens_and_are_packed():
    loader = streams(tiny_model())
    steps = [loader.next_step() for _ in range(4)]
    assert all(len({batch.num_scored_tokens for batch in step}) > 1 for step in steps)
    assert max(int(batch.segment_ids.max()) for batch in steps[0]) > 1


def test_replicas_of_shards_equal_one(tmp_path):
    one = run(tmp_path / "one")
    four = on_ranks(run, 4, tmp_path / "four", {"data_parallel_replicas": 2})
    assert close(four[3][0], one[0])
    assert_same_weights(tmp_path / "one", tmp_path / "four")
    optimizer = ShardsSource(tmp_path / "four" / "checkpoints" / "step-000004" / "optimizer")
    assert len(optimizer.names()) == 2 * len(weights(tmp_path / "one"))


def test_dropout_does_not_depend_on_the_number_of_ranks(tmp_path):
    one = run(tmp_path / "one", model={"dropout": 0.3})
    two = on_ranks(run, 2, tmp_path / "two", None, {"dropout": 0.3})
    assert close(two[0][0], one[0])


def test_bfloat16_is_near_autocast_on_one(tmp_path):
    one = run(tmp_path / "one", {"precision": "bfloat16"})
    two = on_ranks(run, 2, tmp_path / "two", {"precision": "bfloat16"})
    exact = run(tmp_path / "exact")
    assert two[0][0] == pytest.approx(one[0], rel=2e-3)
    assert two[0][0] != exact[0]


def teacher(batch, scored):
    ids = (batch.labels.flatten()[scored] + 1).remainder(250)[:, None]
    return SparseTeacher(ids, torch.full((len(scored), 1), 0.5))


def taught(output):
    """As `run`, with a teacher."""
    return run(output, objective=partial(LossModule, teacher=teacher))


def test_a_teacher_changes_nothing_about_that(tmp_path):
    one = taught(tmp_path / "one")
    two = on_ranks(taught, 2, tmp_path / "two")
    assert close(two[0][0], one[0])
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    assert one[0] != run(tmp_path / "plain")[0]


def resumed(output, changes=None, *, stop=None, resume=True):
    class Stop(Callback):
        def on_step(self, step, result):
            if stop is not None and (step, int(os.environ.get("RANK", 0))) == stop:
                os.kill(os.getpid(), signal.SIGTERM)

    return run(output, {"save_every": 1} | (changes or {}), resume=resume, callbacks=[Stop()])


def stopped(output, step, rank):
    return resumed(output, stop=(step, rank), resume=False)


def test_resume_on_other_numbers_of_ranks(tmp_path):
    whole = run(tmp_path / "whole")
    first = on_ranks(stopped, 2, tmp_path / "parts", 1, 1)  # SIGTERM on rank 1 stops both
    assert [len(losses) for losses, _ in first] == [1, 1]
    second = resumed(tmp_path / "parts", stop=(2, 0))
    assert len(second[0]) == 2
    third = on_ranks(resumed, 4, tmp_path / "parts")
    assert close(third[0][0], whole[0])
    assert close([loss for _, loss in third[0][1]], [loss for _, loss in whole[1]])
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_resume_on_the_same_number_is_equal_to_the_bit(tmp_path):
    whole = on_ranks(run, 2, tmp_path / "whole")
    on_ranks(stopped, 2, tmp_path / "parts", 2, 0)
    rest = on_ranks(resumed, 2, tmp_path / "parts")
    assert rest[0] == whole[0]
    assert_same_weights(tmp_path / "whole", tmp_path / "parts", atol=0)


def held_out_losses(n_batches):
    with start_world(settings(accumulate_batches=A)) as world:
        module = LossModule(tiny_model())
        if world.size > 1:
            shard(module, module.model, world, precision="float32")
        batches = list(streams(module.model, num_streams=1).one_pass())[:n_batches]
        return evaluate(module, batches, world)


@pytest.mark.parametrize("n_batches", [1, 2, 5])
def test_an_uneven_evaluation_equals_that_of_one(n_batches):
    one = held_out_losses(n_batches)
    assert on_ranks(held_out_losses, 4, n_batches) == [one] * 4


def poisoned(output):
    """Rank 1's second batch (stream 3) of step 2 has a token whose embedding is not finite."""
    real = Trainer._step

    def step(self):
        if self._state.step == 1 and self._world.rank == 1:
            given = self._train_loader.next_step

            def next_step():
                batches = given()
                batches[1].input_ids[:] = 200
                return batches

            self._train_loader.next_step = next_step
        return real(self)

    Trainer._step = step
    spoil = tiny_model

    def spoiled(*arguments, **named):
        model = spoil(*arguments, **named)
        with torch.no_grad():
            model.encoder.embed_tokens.weight[200] = float("nan")
        return model

    globals()["tiny_model"] = spoiled
    return run(output, model={"tie_word_embeddings": "decoder"}, held_out=False)


def test_a_loss_that_is_not_finite_stops_all_before_the_update_and_names_the_batch(tmp_path):
    errors = on_ranks(poisoned, 2, tmp_path / "run")
    for error in errors:
        assert "step 2 has loss nan" in str(error)
        assert "from batch 3 (documents (in memory) " in str(error)


def refused(changes):
    with start_world(settings(**changes)):
        pass


def test_settings_that_do_not_fit_the_ranks_are_refused():
    for error in on_ranks(refused, 2, {"accumulate_batches": 3}):
        assert "accumulate_batches" in str(error)
        assert "multiple of 2 (such as 4)" in str(error)
    for error in on_ranks(refused, 2, {"data_parallel_replicas": 3}):
        assert "data_parallel_replicas is 3" in str(error)
