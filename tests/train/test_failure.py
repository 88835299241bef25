"""What is left of a run of several ranks when one of them, or all, or the disk fails."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.train.ranks import on_ranks
from tests.train.test_parallel import A, assert_same_weights, close, resumed, run, streams
from tests.train.tiny_run import recipe, settings, tiny_model
from twofold.checkpoint.load import load
from twofold.train import Callback, checkpointing, fit, latest_checkpoint
from twofold.train import step as step_module
from twofold.train.world import start_world


def rank_dies(output, victim):
    """Kill -9 in the middle of step 4: after the forward pass of the second batch, before its backward pass."""
    real, calls = step_module.batch_loss, itertools.count(1)

    def batch_loss(*arguments):
        loss = real(*arguments)
        if next(calls) == 8 and os.environ["RANK"] == str(victim):
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    step_module.batch_loss = batch_loss
    return run(output, {"save_every": 1, "collective_timeout_s": 30})


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_and_the_run_goes_on_from_its_last_checkpoint(tmp_path, victim):
    whole = run(tmp_path / "whole")
    started = time.monotonic()
    results = on_ranks(rank_dies, 2, tmp_path / "parts", victim)
    assert time.monotonic() - started < 20
    assert results[victim] == "killed"
    assert "another rank failed" in str(results[1 - victim])
    assert f"rank {1 - victim}, after step 3" in str(results[1 - victim])
    checkpoint = latest_checkpoint(tmp_path / "parts")
    assert checkpoint.name in ("step-000001", "step-000002", "step-000003")
    load(checkpoint)
    rest = on_ranks(resumed, 2, tmp_path / "parts")
    assert close(rest[0][0], whole[0])
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert not list((tmp_path / "parts" / "checkpoints").glob(".*"))


def all_die_while_saving(output):
    real = checkpointing._write_shards

    def write(folder, tensors, world):
        real(folder, tensors, world)
        if "step-000002" in str(folder):
            (output / f"seen-{world.rank}").touch()
            time.sleep(30)

    checkpointing._write_shards = write

    class Die(Callback):
        def on_step(self, step, result):
            if step == 3:
                while not (output / f"seen-{os.environ['RANK']}").exists():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)

    return run(output, {"save_every": 1}, callbacks=[Die()])


def test_a_checkpoint_that_was_being_written_when_all_were_killed_is_never_picked_up(tmp_path):
    whole = run(tmp_path / "whole")
    assert on_ranks(all_die_while_saving, 2, tmp_path / "parts") == ["killed", "killed"]
    folder = tmp_path / "parts" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [".step-000002.partial", "step-000001"]
    rest = resumed(tmp_path / "parts")
    assert close(rest[0], whole[0])
    assert sorted(path.name for path in folder.iterdir()) == ["step-000003", "step-000004"]


def disk_is_full(output):
    """On rank 1, from the third checkpoint on."""
    real = Path.open

    def full(path, mode="r", *arguments, **options):
        if "w" in mode and "step-000003" in str(path) and os.environ["RANK"] == "1":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, mode, *arguments, **options)

    Path.open = full
    return run(output, {"save_every": 1})


def test_a_full_disk_on_one_rank_stops_all_and_leaves_the_checkpoints_before(tmp_path):
    errors = on_ranks(disk_is_full, 2, tmp_path / "run")
    for error in errors:
        assert isinstance(error, checkpointing.CheckpointError)
        assert "step-000003 could not be written" in str(error)
        assert "No space left on device" in str(error)
        assert "on rank 1" in str(error)
        assert "step-000002 is complete" in str(error)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000001", "step-000002"]


def loader_fails(output):
    config = settings(steps=4, accumulate_batches=A)
    with start_world(config) as world:
        model = tiny_model()
        loader = streams(model, world.streams(A))
        given = loader.next_step
        if world.rank == 1:
            counted = iter(range(9))

            def next_step():
                if next(counted) == 2:
                    raise ValueError("document 7 is not readable")
                return given()

            loader.next_step = next_step
        return fit(model, loader, None, config, output, world=world)


def test_the_rank_that_fails_says_why_and_the_others_that_one_failed(tmp_path):
    other, failing = on_ranks(loader_fails, 2, tmp_path / "run")
    assert str(failing) == "document 7 is not readable"
    assert failing.__notes__ == ["rank 1, after step 2"]
    assert str(other) == "rank 0, after step 2: stopped, because another rank failed or does not answer"


def torchrun(arguments, size=2):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return subprocess.Popen(
        [*launcher, "-m", "twofold.cli", "train", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_the_command_under_torchrun(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(recipe(tmp_path, steps=3).model_dump(mode="json")))
    out, messages = (process := torchrun([file, "--json"])).communicate(timeout=100)
    assert process.returncode == 0, messages
    summary = json.loads(out)  # one line, from rank 0
    assert (summary["finished"], summary["step"]) == (True, 3)
    assert messages.count("parameters on 2 x cpu") == 1
    load(summary["model"])

    resume = [file, "--resume", "steps=4"]
    file.write_text(file.read_text().replace("accumulate_batches: 2", "accumulate_batches: 3"))
    _, messages = (process := torchrun(resume)).communicate(timeout=100)
    assert process.returncode != 0
    assert "set it to a multiple of 2 (such as 4)" in messages.replace("\n", " ")
    assert "twofold/train" not in messages  # torchrun's own traceback is not ours to leave out
