"""Fine-tuning is equal under several processes, accumulation and kills."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.checks import equality_check

SAME = {
    "parameters",
    "optimiser",
    "average of the weights",
    "best.safetensors",
    "last.safetensors",
    "log",
    "samples",
}


@pytest.fixture(scope="module")
def figures(root, tmp_path_factory):
    """The figures of the check, which runs once."""
    out = tmp_path_factory.mktemp("equality") / "equality.json"
    subprocess.run(
        [sys.executable, "-m", "tests.checks.equality_check", "--kills", "10", "--out", out],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["two_processes", "accumulated"])
def test_halves_of_a_batch_give_the_losses_and_weights_of_the_whole(figures, arm):
    assert 0 <= figures["largest_difference"][f"{arm}_loss"] < 1e-4
    assert 0 <= figures["largest_difference"][f"{arm}_weight"] < 1e-4


@pytest.mark.slow
def test_runs_killed_again_and_again_end_with_the_same_bits(figures):
    assert figures["kills"]["total"] >= 10
    assert figures["killed_runs"] >= 2  # runs of one process and of two
    assert figures["kills"]["while saving"] >= 1
    assert figures["equal_to_the_last_bit"] == dict.fromkeys(SAME, True)


def finished_run(folder, value):
    """A folder with the files that the check compares, all holding the value."""
    checkpoint = folder / "checkpoints/0000012"
    checkpoint.mkdir(parents=True)
    checked = [checkpoint / name for name in equality_check.STATES.values()]
    for path in (*checked, folder / "best.safetensors", folder / "last.safetensors"):
        save_file({"weight": np.array([value])}, path)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 12, "loss": value}) + "\n")
    (folder / "samples.txt").write_text(f"0 {value}\n")
    return folder


def test_the_check_sees_a_difference_in_every_part(tmp_path):
    one, same, other = (finished_run(tmp_path / n, v) for n, v in (("a", 1), ("b", 1), ("c", 2)))
    assert equality_check.differences(one, same) == []
    assert set(equality_check.differences(one, other)) == SAME


def test_the_check_does_not_compare_what_a_clock_says(tmp_path):
    runs = [finished_run(tmp_path / name, 1) for name in "ab"]
    log = runs[1] / "metrics.jsonl"
    log.write_text(log.read_text().replace("}", ', "seconds": 3.0}'))
    assert equality_check.differences(*runs) == []
