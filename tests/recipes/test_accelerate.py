"""Launch files for accelerate, and jobs for SLURM."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from sammed3d_backbone.recipes.finetune_unetr import Config, train

from sammed3d_backbone import config
from sammed3d_backbone.training.runs import INDEX

FOLDER = Path(__file__).resolve().parents[2] / "recipes/accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize(
    ("name", "processes", "machines", "cpu"),
    [("cpu", 1, 1, True), ("gpu", 1, 1, False), ("gpus", 4, 1, False), ("nodes", 8, 2, False)],
)
def test_accelerate_reads_a_launch_file(name, processes, machines, cpu):
    read = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (read.num_processes, read.num_machines, read.use_cpu) == (processes, machines, cpu)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_launch_file_says_how_to_start(path):
    assert (
        f"#     accelerate launch --config_file recipes/accelerate/{path.name}" in path.read_text()
    )


@pytest.mark.slow
def test_the_file_for_cpus_launches(small, runs, tmp_path, root):
    launch = ["accelerate.commands.launch", "--config_file", str(FOLDER / "cpu.yaml")]
    said = launched(launch, small, tmp_path, root)
    assert said.count("mean Dice") == 1
    assert processes(runs) == 1


@pytest.mark.slow
def test_torchrun_starts_as_many_processes_on_a_cpu_as_it_is_told(small, runs, tmp_path, root):
    said = launched(["torch.distributed.run", "--nproc_per_node", "2"], small, tmp_path, root)
    assert said.count("mean Dice") == 1  # one process speaks
    assert processes(runs) == 2
    assert json.loads((runs / "toy/results/scores.json").read_text())["cases"] == 2


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Runs a job's script with stand-ins for SLURM's commands: every node is this machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    commands = {
        "srun": "for SLURM_NODEID in $(seq 0 $((SLURM_NNODES - 1))); do\n"
        'export SLURM_NODEID; "$@" & steps+=($!)\ndone\n'
        'for step in "${steps[@]}"; do wait "$step" || exit 1; done\n',
        "scontrol": "echo 127.0.0.1\n",
    }
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}")
        (folder / name).chmod(0o755)
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run(script, *arguments, **variables):
        done = subprocess.run(
            ["bash", FOLDER / script, *arguments],
            env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def plan_of(folder, values):
    """A configuration as a file."""
    path = folder / "small.yaml"
    path.write_text(config.dump(Config(**values)))
    return path


@pytest.mark.slow
def test_the_jobs_of_an_array_train_a_fold_each_and_are_joined(small, runs, tmp_path, slurm):
    plan = plan_of(tmp_path, small | {"steps": 2})
    for fold in range(3):
        said = slurm("folds.slurm", plan, "seed=5", SLURM_ARRAY_TASK_ID=str(fold), SLURM_NNODES="1")
        assert "mean Dice" in said
    models = sorted(runs.glob("toy/fold_*/last.safetensors"))
    before = [path.stat().st_mtime_ns for path in models]
    scores = train(config.load(Config, plan, ["fold=all", "seed=5"]))
    assert scores["cases"] == 6
    assert [path.stat().st_mtime_ns for path in models] == before
    assert len([*runs.glob("toy/ensemble/fold_*.safetensors")]) == len(models) == 3


@pytest.mark.slow
def test_one_run_over_two_nodes(small, runs, tmp_path, slurm):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    plan = plan_of(tmp_path, small)
    nodes = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "MASTER_PORT": port}
    said = slurm("nodes.slurm", plan, "steps=2", **nodes)
    assert said.count("mean Dice") == 1  # one process speaks
    assert processes(runs) == 2
    assert json.loads((runs / "toy/results/scores.json").read_text())["cases"] == 2


def launched(launch, small, tmp_path, root):
    """The output of a training that a launcher started."""
    path = plan_of(tmp_path, small | {"steps": 2})
    done = subprocess.run(
        [sys.executable, "-m", *launch, root / "recipes/finetune_unetr.py", path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def processes(runs):
    """Number of processes by the newest checkpoint."""
    index = max(runs.glob(f"toy/checkpoints/*/{INDEX}"))
    return json.loads(index.read_text())["progress"]["processes"]
