"""A Dask cluster of two workers writes what one process writes, also when it loses a worker."""

import contextlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from boxes import write_boxes
from sammed3d_backbone.recipes import evaluate as evaluate_recipe

from sammed3d_backbone import parallel
from sammed3d_backbone.cli import main
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.parallel import workers

SCANS = 8
WAIT_S = 600


def start(folder, script, *arguments):
    """A Python process in a folder of its own."""
    folder.mkdir(exist_ok=True)
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, *script, *map(str, arguments)],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=log,
            stdout=log,
        )


def wait_for(true):
    """Waits until a condition holds."""
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def cli(*arguments):
    """The exit code of a command of `sammed3d`."""
    return main([str(argument) for argument in arguments])


def evaluate(_, *arguments):
    """Runs `recipes/evaluate.py`, which returns nothing where all is well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
        return evaluate_recipe.main() is not None


@pytest.fixture
def cluster(tmp_path):
    """The address of a scheduler with two workers, and the processes of the workers."""
    dask, about = ("-m", "distributed.cli.dask_scheduler"), tmp_path / "scheduler.json"
    where = ("--scheduler-file", about, "--no-dashboard")
    with contextlib.ExitStack() as stack:

        def begin(name, script, *options):
            process = start(tmp_path / name, script, *where, *options)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        begin("scheduler", dask, "--host", "127.0.0.1", "--port", 0)
        wait_for(about.is_file)
        worker = ("-m", "distributed.cli.dask_worker")
        options = ("--nthreads", 1, "--no-nanny", "--memory-limit", 0)
        two = [begin(f"worker_{n}", worker, *options) for n in range(2)]
        for number in range(2):
            log = tmp_path / f"worker_{number}/log"
            wait_for(lambda log=log: "Registered to" in log.read_text())
        address = json.loads(about.read_text())["address"]
        yield f"--backend=dask://{address.removeprefix('tcp://')}", two


@pytest.fixture
def toy(tmp_path):
    """A data set of boxes."""
    write_boxes(tmp_path / "toy")
    return tmp_path / "toy"


@pytest.fixture
def scans(tmp_path, rng):
    """A folder of scans, each of which takes a worker some tenths of a second; one is damaged."""
    for number in range(SCANS):
        array = rng.normal(100, 20, (32, 32, 32)).astype(np.float32)
        Volume(array, np.diag([2.0, 2.0, 2.0, 1])).save(tmp_path / f"scans/{number}.nii.gz")
    (tmp_path / "scans/3.nii.gz").write_bytes(b"damaged")
    return tmp_path / "scans"


def content(folder, patterns):
    """Name -> bytes of the files of a result that do not hold times."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
        if path.is_file() and not path.name.startswith(".")  # what a lost worker was writing
    }


def manifest(folder):
    """What a manifest says about each scan, without what was measured."""
    cases = json.loads((folder / "manifest.json").read_text())["cases"]
    measured = ("seconds", "peak_memory_mb")
    return [{k: v for k, v in case.items() if k not in measured} for case in cases]


@pytest.mark.slow
def test_every_command_over_cases_writes_the_same_files(
    cluster, toy, scans, fine_tuned, tmp_path, monkeypatch
):
    backend, _ = cluster
    model = fine_tuned(labels={0: "background", 1: "front", 2: "back"})
    given = ("--memory", "8GB", "--precision", "no", "--steps", 50)
    commands = {
        "curate": (cli, [toy, "out", "--min-side-mm", 1], ["out/*.jsonl", "out/cases/**/*"]),
        "plan": (cli, [toy, *given], ["*.plan.yaml"]),
        "predict": (cli, [model, scans, "out"], ["out/*.nii.gz"]),
        "evaluate": (evaluate, [model, toy, "--out", "out"], ["out/scores.csv", "out/pred*/*"]),
    }
    for name, (run, arguments, files) in commands.items():
        made = {}
        for how, further in {"alone": [], "shared": [backend]}.items():
            (tmp_path / name / how).mkdir(parents=True)
            monkeypatch.chdir(tmp_path / name / how)
            assert run(name, *arguments, *further) == (name == "predict")  # a scan is damaged
            made[how] = content(Path(), files)
        assert made["shared"] == made["alone"] != {}
    alone, shared = (manifest(tmp_path / "predict" / how / "out") for how in ("alone", "shared"))
    assert shared == alone


@pytest.mark.slow
def test_the_scans_of_a_lost_worker_are_done_by_the_other(cluster, scans, fine_tuned, tmp_path):
    backend, (lost, _) = cluster
    model, shared, alone = fine_tuned(), tmp_path / "shared", tmp_path / "alone"
    with ThreadPoolExecutor(1) as other:
        begun = other.submit(cli, "predict", model, scans, shared, backend)
        wait_for(lambda: [*shared.glob("*.nii.gz")])
        lost.kill()
        done = len(manifest(shared)) if (shared / "manifest.json").is_file() else 0
        assert begun.result() == 1  # the damaged scan
    assert done < SCANS // 2
    assert cli("predict", model, scans, alone) == 1
    assert len(content(alone, ["*.nii.gz"])) == SCANS - 1
    assert content(shared, ["*.nii.gz"]) == content(alone, ["*.nii.gz"])
    assert manifest(shared) == manifest(alone)


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(parallel, "ANSWER_S", 0.2)
    given = workers("dask://127.0.0.1:9", 1)
    with pytest.raises(ConnectionError, match="start `dask scheduler`"), given:
        pass


@pytest.mark.parametrize("backend", ["", "lokj", "multiprocessing"])
def test_a_back_end_that_cannot_be_used_is_refused_with_those_that_can(backend):
    given = workers(backend, 1)
    with pytest.raises(ValueError, match="threading"), given:
        pass
