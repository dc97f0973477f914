"""The launch files are read by accelerate, and the one that can run here does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from finetune_unetr import Config

from sammed3d_backbone import config

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


@pytest.mark.integration
def test_two_processes_are_launched_by_the_file_for_cpus(small, runs, tmp_path, root):
    path = tmp_path / "small.yaml"
    path.write_text(config.dump(Config(**small | {"steps": 2})))
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    how = ["--config_file", FOLDER / "cpu.yaml", "--num_processes", "2"]
    done = subprocess.run(
        [*launch, *how, root / "recipes/finetune_unetr.py", path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mean Dice") == 1  # one process speaks
    assert json.loads((runs / "toy/results/scores.json").read_text())["cases"] == 2
