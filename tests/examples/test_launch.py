import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from twofold.cli import app
from twofold.config.recipe import TrainSettings

FOLDER = Path(__file__).parents[2] / "examples" / "launch"
SLURM, KUBERNETES = FOLDER / "slurm.sbatch", FOLDER / "kubernetes.yaml"


def check_command(words):
    """torchrun's part with torchrun's own parser, ours against the command line that exists."""
    words = [re.sub(r"\$\(?\w+\)?", "2", word) for word in words]  # variables that hold numbers or names
    arguments = get_args_parser().parse_args(words[1:])
    assert arguments.module
    assert arguments.training_script == "twofold.cli"
    verb, _recipe, *rest = arguments.training_script_args
    assert verb in {command.name for command in app.registered_commands}
    assert "--resume" in rest
    for override in rest:
        if "=" in override:
            assert override.partition("=")[0] in TrainSettings.model_fields
    return arguments


def torchrun_of_slurm():
    text = SLURM.read_text().replace("\\\n", " ")
    line = next(line for line in text.splitlines() if " torchrun " in line)
    return line[line.index("torchrun") :].removesuffix(" &").replace('"', "").replace("$@ ", "").split()


def test_the_slurm_script_is_bash_and_starts_commands_that_exist():
    subprocess.run(["bash", "-n", SLURM], check=True)
    arguments = check_command(torchrun_of_slurm())
    assert (arguments.nproc_per_node, arguments.rdzv_backend) == ("8", "c10d")
    assert re.findall(r"^#SBATCH --(signal=\S+|requeue)$", SLURM.read_text(), re.M) == [
        "signal=B:TERM@120",
        "requeue",
    ]


@pytest.mark.parametrize(("status", "is_requeued"), [(0, True), (3, False)])
def test_a_signal_to_the_slurm_script_reaches_the_workers_and_then_the_job_is_queued_again(
    tmp_path, status, is_requeued
):
    """With stand-ins for Slurm: srun runs what it is given, scontrol and torchrun write down what they are told."""
    if shutil.which("pkill") is None:
        pytest.skip("pkill is not installed")
    worker = tmp_path / "bin" / "worker"
    worker.parent.mkdir()
    told = tmp_path / "told"
    scripts = {
        "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
        "scontrol": f'[[ $1 == show ]] && echo localhost || echo "$@" >> {told}',
        "worker": f"trap 'exit {status}' TERM\necho started >> {told}\nfor i in $(seq 200); do sleep 0.05; done",
        "torchrun": f"exec -a '{tmp_path}' bash {worker} -u -m twofold.cli train",
        "pkill": f"echo \"$@\" >> {told}\nexec {shutil.which('pkill')} -TERM -f '{worker} [-]u -m twofold[.]cli train'",
    }
    for name, text in scripts.items():
        (worker.parent / name).write_text(f"#!/bin/bash\n{text}\n")
        (worker.parent / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{worker.parent}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "a,b",
        "SLURM_JOB_ID": "17",
        "SLURM_NNODES": "2",
        "USER": "root",
    }
    process = subprocess.Popen(["bash", SLURM, "recipe.yaml"], env=environment, text=True)
    while not told.exists():
        assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=15) == status
    lines = told.read_text().splitlines()
    assert "-u -m twofold[.]cli train" in lines[1]
    assert (lines[-1] == "requeue 17") is is_requeued


def test_the_kubernetes_file_is_a_job_of_commands_that_exist():
    service, job = yaml.safe_load_all(KUBERNETES.read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    arguments = check_command(pod["containers"][0]["command"])
    nodes = spec["completions"]
    assert arguments.nnodes == str(nodes) == str(spec["parallelism"])
    assert spec["completionMode"] == "Indexed"
    assert arguments.master_addr == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert arguments.master_port == service["spec"]["ports"][0]["port"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == int(arguments.nproc_per_node)
