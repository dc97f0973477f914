"""Launch files for accelerate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from sammed3d_backbone.recipes.finetune_unetr import Config

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


def launched(launch, small, tmp_path, root):
    """The output of a training that a launcher started."""
    path = tmp_path / "small.yaml"
    path.write_text(config.dump(Config(**small | {"steps": 2})))
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
