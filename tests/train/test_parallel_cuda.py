"""As many ranks as there are GPUs, over NCCL, do what one process does on one of them."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.train.ranks import on_ranks
from tests.train.test_parallel import A, run, streams
from tests.train.tiny_run import settings, tiny_model
from twofold.config.recipe import OptimizerConfig
from twofold.train import LossModule, train_step
from twofold.train.checkpointing import CheckpointSaver, TrainerState, restore_checkpoint
from twofold.train.optimizer import new_optimizer, trainable_parameters
from twofold.train.parallel import shard, whole
from twofold.train.world import World, _join, device_of

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def sharded(precision, folder):
    """Losses and weights of a sharded model, also where there is one GPU; the last step follows a checkpoint."""
    config = settings(device="cuda", precision=precision, accumulate_batches=A)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    world = _join(config, rank, size, device_of(config, rank))
    losses = steps(config, world, folder)
    dist.destroy_process_group()
    return losses


def plain(precision):
    config = settings(device="cuda", precision=precision, accumulate_batches=A)
    return steps(config, World(device=torch.device("cuda", 0)), None)


def steps(config, world, folder):
    model = tiny_model()
    loader = streams(model, world.streams(A))
    module, optimizer, parameters = built(model, config, world)
    losses = []
    for step in range(1, 5):
        if step == 4 and folder is not None:
            state = TrainerState(step=3, settings={})
            saver = CheckpointSaver(folder, world, keep=1)
            saver.start(model, optimizer, parameters, state)
            path = saver.wait()
            model = tiny_model(seed=5)
            module, optimizer, parameters = built(model, config, world)
            restore_checkpoint(path, model, optimizer, parameters, state, world)
        batches = loader.next_step()
        result = train_step(
            module.train(), optimizer, batches, step=step, learning_rate=3e-3, max_grad_norm=1.0, world=world
        )
        losses.append(result.loss)
    return losses, {name: whole(p.detach()).cpu().numpy() for name, p in model.named_parameters()}


def built(model, config, world):
    module = LossModule(model, config.precision)
    if world.mesh is None:
        model.to(world.device)
    else:
        shard(module, model, world, precision=config.precision)
    parameters = trainable_parameters(model)
    return module, new_optimizer(model, parameters, OptimizerConfig(learning_rate=3e-3)), parameters


@pytest.mark.parametrize(("precision", "rel", "atol"), [("float32", 1e-5, 1e-4), ("bfloat16", 2e-3, 2e-2)])
def test_sharded_over_gpus_equals_one_process(tmp_path, precision, rel, atol):
    results = on_ranks(sharded, torch.cuda.device_count(), precision, tmp_path, timeout=200)
    losses, weights = results[0]
    plain_losses, plain_weights = plain(precision)
    assert losses == pytest.approx(plain_losses, rel=rel)
    for name, weight in weights.items():
        np.testing.assert_allclose(weight, plain_weights[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_run_on_all_gpus_equals_a_run_on_one(tmp_path):
    one = run(tmp_path / "one", {"device": "cuda"})
    many = on_ranks(run, 2, tmp_path / "many", {"device": "cuda"}, timeout=200)
    assert many[0][0] == pytest.approx(one[0], rel=1e-5)
