"""A Dask cluster of two workers writes what one process writes, also when it loses a worker."""

import contextlib
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from boxes import write_boxes

from sammed3d_backbone import parallel
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.parallel import workers

CLI = "import sys; from sammed3d_backbone.cli import main; sys.exit(main(sys.argv[1:]))"
EVALUATE = "from sammed3d_backbone.recipes.evaluate import main; main()"
SCANS = 8
WAIT_S = 120


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
    """A folder of scans, each of which takes a worker about half a second; one is damaged."""
    for number in range(SCANS):
        array = rng.normal(100, 20, (40, 40, 40)).astype(np.float32)
        Volume(array, np.diag([2.0, 2.0, 2.0, 1])).save(tmp_path / f"scans/{number}.nii.gz")
    (tmp_path / "scans/3.nii.gz").write_bytes(b"damaged")
    return tmp_path / "scans"


def content(folder, patterns):
    """Name -> bytes of the files of a result that do not hold times."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }


def manifest(folder):
    """What a manifest says about each scan, without what was measured."""
    cases = json.loads((folder / "manifest.json").read_text())["cases"]
    measured = ("seconds", "peak_memory_mb")
    return [{k: v for k, v in case.items() if k not in measured} for case in cases]


@pytest.mark.slow
def test_every_command_over_cases_writes_the_same_files(cluster, toy, scans, fine_tuned, tmp_path):
    backend, _ = cluster
    model = fine_tuned(labels={0: "background", 1: "front", 2: "back"})
    given = ("--memory", "8GB", "--precision", "no", "--steps", 50)
    commands = {
        "curate": (
            CLI,
            ["curate", toy, "out", "--min-side-mm", 1],
            ["out/*.jsonl", "out/cases/**/*"],
        ),
        "plan": (CLI, ["plan", toy, *given], ["*.plan.yaml"]),
        "predict": (CLI, ["predict", model, scans, "out"], ["out/*.nii.gz"]),
        "evaluate": (EVALUATE, [model, toy, "--out", "out"], ["out/scores.csv", "out/pred*/*"]),
    }
    for name, (script, arguments, files) in commands.items():
        alone, shared = (tmp_path / f"{name}_{how}" for how in ("alone", "shared"))
        codes = [
            start(alone, ("-c", script), *arguments).wait(),
            start(shared, ("-c", script), *arguments, backend).wait(),
        ]
        assert codes == [name == "predict"] * 2, (shared / "log").read_text()  # one is damaged
        assert content(shared, files) == content(alone, files) != {}
    assert manifest(tmp_path / "predict_shared/out") == manifest(tmp_path / "predict_alone/out")


@pytest.mark.slow
def test_the_scans_of_a_lost_worker_are_done_by_the_other(cluster, scans, fine_tuned, tmp_path):
    backend, (lost, _) = cluster
    model, out = fine_tuned(), tmp_path / "shared/out"
    begun = start(tmp_path / "shared", ("-c", CLI), "predict", model, scans, out, backend)
    wait_for(lambda: [*out.glob("*.nii.gz")])
    lost.kill()
    assert len(manifest(out) if (out / "manifest.json").is_file() else []) < SCANS // 2
    assert begun.wait() == 1  # the damaged scan
    assert start(tmp_path / "alone", ("-c", CLI), "predict", model, scans, "out").wait() == 1
    alone = tmp_path / "alone/out"
    assert len(content(alone, ["*.nii.gz"])) == SCANS - 1
    assert content(out, ["*.nii.gz"]) == content(alone, ["*.nii.gz"])
    assert manifest(out) == manifest(alone)


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(parallel, "ANSWER_S", 0.2)
    given = workers("dask://127.0.0.1:9", 1)
    with pytest.raises(ConnectionError, match="start `dask scheduler`"), given:
        pass
