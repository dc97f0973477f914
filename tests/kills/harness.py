"""Kills and other disturbances of one command, and what has to hold after them."""

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from boxes import write_boxes

from sammed3d_backbone.cli import main
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.loading.checkpoint import content_sha256, read

ROOT = Path(__file__).resolve().parents[2]
# Processes are forked from one that has imported everything: a command takes a second, not ten.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "tests.kills.harness",
        "sammed3d_backbone.recipes.finetune_unetr",
        "sammed3d_backbone.recipes.pretrain_promptable",
    ]
)
SCAN = "toy/imagesTr/case_0.nii.gz"
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
TUNING = {
    "name": "run",
    "data": "toy",
    "folds": 3,
    "scratch": True,
    "feature_size": 4,
    "spacing_mm": [0, 0, 0],
    "crop_vox": 16,
    "steps": 4,
    "validate_every": 1,
    "warmup_steps": 1,
    "threads": 1,
    "cpu": True,
}
PRETRAINING = {
    "name": "run",
    "sources": ["synthetic"],
    "shares": [1],
    "img_size": 32,
    "objects": 2,
    "interactions": 2,
    "val_crops": 1,
    "steps": 3,
    "warmup_steps": 1,
    "validate_every": 1,
    "log_every": 1,
    "threads": 1,
    "cpu": True,
}


@dataclass(frozen=True)
class Command:
    """A command, and the files whose content counts."""

    arguments: tuple[str, ...]
    results: tuple[str, ...]  # patterns


def _cli(*arguments):
    return ("sammed3d", *arguments)


TUNE = (str(ROOT / "recipes/finetune_unetr.py"), "tune.yaml")
COMMANDS = {
    "finetune": Command(TUNE, ("runs/run/*.safetensors", "runs/run/results/scores.csv")),
    "pretrain": Command(
        (str(ROOT / "recipes/pretrain_promptable.py"), "pretrain.yaml"), ("runs/run/*.safetensors",)
    ),
    "curate": Command(
        _cli("curate", "toy", "out", "--min-side-mm", "1"),
        ("out/*.jsonl", "out/dataset.json", "out/cases/*/masks/*", "out/cases/*/decisions.json"),
    ),
    "clicks": Command(
        _cli(
            *[
                "clicks",
                "toy",
                "--variant",
                "tiny",
                "--first",
                "centre",
                "--cases",
                "1",
                "--out",
                "out",
            ]
        ),
        ("out/clicks.jsonl", "out/masks/*/*"),
    ),
    "segment": Command(
        _cli(
            *f"segment {SCAN} out/o.nii.gz --variant tiny --point 10,9,8".split(),
            *["--png", "out/o.png", "--force"],
        ),
        ("out/o.nii.gz",),
    ),
    "features": Command(
        _cli("features", SCAN, "out/f.safetensors", "--variant", "tiny", "--force"),
        ("out/f.safetensors",),
    ),
    "convert": Command(
        _cli("convert", str(ROOT / "weights/tiny.safetensors"), "out/w.safetensors", "--force"),
        ("out/w.safetensors",),
    ),
    "predict": Command(
        _cli("predict", "model.safetensors", SCAN, "out/o.nii.gz", "--force"), ("out/o.nii.gz",)
    ),
}


@dataclass
class Tally:
    """What became of the kills of one command."""

    kills: int = 0
    too_late: int = 0  # the command had ended
    faults: list[str] = field(default_factory=list)


def workplace(folder):
    """A folder with data and configurations."""
    folder.mkdir(parents=True)
    write_boxes(folder / "toy", cases=3)
    (folder / "tune.yaml").write_text(json.dumps(TUNING | {"data": str(folder / "toy")}))
    (folder / "pretrain.yaml").write_text(json.dumps(PRETRAINING))
    return folder


def start(name, place, largest=None):
    """The command as a process of its own; nothing that it writes may be larger than `largest`."""
    reader, writer = PROCESSES.Pipe(duplex=False)
    arguments = COMMANDS[name].arguments, str(place), writer, largest
    process = PROCESSES.Process(target=_run, args=arguments, name=name)
    process.start()
    writer.close()
    process.stderr = reader
    return process


def _run(arguments, place, writer, largest):
    """The body of the process, which has the imports of all commands behind it."""
    os.dup2(writer.fileno(), 2)
    writer.close()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.chdir(place)
    os.environ["SAMMED3D_RUNS"] = f"{place}/runs"
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    if largest is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    program, *sys.argv[1:] = arguments
    if program == "sammed3d":
        sys.exit(main())
    runpy.run_path(program, run_name="__main__")


def ended(process):
    """Waits for the process; its exit code and what it said."""
    said, descriptor = b"", process.stderr.fileno()
    os.set_blocking(descriptor, False)  # a process of the process may keep the other end
    is_running = True
    while is_running:
        process.join(0.02)
        is_running = process.is_alive()
        with contextlib.suppress(BlockingIOError):
            while part := os.read(descriptor, 2**16):
                said += part
    process.stderr.close()
    said = said.decode(errors="replace")
    if process.exitcode in (0, 1, 2) and "Traceback" in said:
        raise AssertionError(f"{process.name}: a traceback: {said[-600:]}")
    return process.exitcode, said


def content(path):
    """What counts of a file; raises if it is not whole."""
    if path.name.endswith((".nii", ".nii.gz")):
        volume = Volume.load(path)
        return volume.array.tobytes(), volume.affine.tobytes()
    if path.suffix == ".safetensors":
        return content_sha256(read(path)[0])
    if path.suffix == ".png":
        assert path.read_bytes().endswith(b"IEND\xaeB`\x82"), path
        return None
    if path.suffix == ".json":
        found = json.loads(path.read_text())
        found.pop("made_of", None) if isinstance(found, dict) else None  # times of files
        return json.dumps(found)
    return re.sub(r'"commit": "[^"]*"', "", path.read_text())  # the checkout may change meanwhile


def results(command, place):
    """The content of all results."""
    return {
        str(path.relative_to(place)): content(path)
        for pattern in command.results
        for path in sorted(place.glob(pattern))
        if not path.name.startswith(".")  # of a process that was killed while it wrote
    }


def finished(name, place):
    """Runs a command to its end; its results, and the seconds that it took."""
    began = time.monotonic()
    code, said = ended(start(name, place))
    assert code == 0, f"{name}: {said[-600:]}"
    return results(COMMANDS[name], place), time.monotonic() - began


def require_equal(after, expected):
    """Refuses other results."""
    if after.keys() != expected.keys():
        raise AssertionError(f"other files: {sorted(after.keys() ^ expected.keys())}")
    if unequal := [path for path in after if after[path] != expected[path]]:
        raise AssertionError(f"unequal: {unequal}")


def require_whole(place):
    """Refuses files that are half-written under their final name."""
    for path in place.rglob("*"):
        if path.is_file() and not any(p.startswith((".", "partial-")) for p in path.parts[-3:]):
            content(path)


def kill(name, place, rng, seconds, tally):
    """Kills a command, at a random moment or inside a save."""
    inside_a_save = rng.random() < 0.5
    until = time.monotonic() + rng.uniform(0.05, 1.0) * seconds
    process = start(name, place)
    while process.is_alive() and time.monotonic() < until:
        if inside_a_save and any(place.rglob("*/.[0-9a-f]*")):
            break
        time.sleep(0.002)
    if is_running := process.is_alive():
        os.kill(process.pid, rng.choice(SIGNALS))
    tally.kills += is_running
    tally.too_late += not is_running
    code, said = ended(process)
    if code == 130 and "Traceback" in said:
        raise AssertionError(f"a traceback after Ctrl-C: {said[-300:]}")


def fill_disk(name, place, rng, *_):
    """Runs a command where no file can grow beyond some size."""
    code, said = ended(start(name, place, int(10 ** rng.uniform(2, 6))))
    assert code in (0, 1, 2), f"{code}: {said[-300:]}"


def write_protect(name, place, *_):
    """Runs a command where nothing can be written."""
    is_root = os.geteuid() == 0
    if is_root:  # may write where permissions forbid it
        subprocess.run(["mount", "--bind", place, place], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True)
    else:
        place.chmod(0o555)
    try:
        code, said = ended(start(name, place))
        assert code == 2, f"{code}: {said[-300:]}"
    finally:
        if is_root:
            subprocess.run(["umount", place], check=True)
        else:
            place.chmod(0o755)


def start_two(name, place, *_):
    """Runs a command twice at once; one may be refused."""
    shutil.copytree(place, other := place.with_name(f"{place.name}-other"))
    (other / "out").symlink_to(place / "out")
    (other / "runs").symlink_to(place / "runs")
    for folder in ("out", "runs"):
        (place / folder).mkdir()
    both = [start(name, where) for where in (place, other)]
    codes = [ended(one)[0] for one in both]
    assert sorted(codes) in ([0, 0], [0, 2]), codes
    shutil.rmtree(other)


DISTURBANCES = {
    "kill": kill,
    "full disk": fill_disk,
    "write-protected": write_protect,
    "two at once": start_two,
}


def campaign(name, kills, seed, folder, model, others=()):
    """Disturbs a command so many times, each in a fresh folder, and runs it to its end after that.

    Args:
        name: Name of the command.
        kills: Their number.
        seed: Seed of the moments.
        folder: For the files.
        model: A fine-tuned model.
        others: Disturbances beside kills, once each.
    """
    rng, tally = random.Random(f"{seed}{name}"), Tally()
    places = itertools.count()

    def fresh():
        place = workplace(folder / f"{name}{next(places)}")
        shutil.copyfile(model, place / "model.safetensors")
        return place

    place = fresh()
    expected, seconds = finished(name, place)
    assert expected, name
    shutil.rmtree(place)
    for disturbance in (*["kill"] * 2 * kills, *others):
        if disturbance == "kill" and tally.kills == kills:
            continue  # some of them came too late
        place = fresh()
        try:
            DISTURBANCES[disturbance](name, place, rng, seconds, tally)
            require_whole(place)
            require_equal(finished(name, place)[0], expected)
        except Exception as error:  # noqa: BLE001 (counted)
            tally.faults.append(f"{name}, {disturbance}: {type(error).__name__}: {error}"[:500])
        shutil.rmtree(place)
    return tally


def small_model(path):
    """A fine-tuned model for `predict`."""
    from sammed3d_backbone.data.preprocessing import Preprocessing
    from sammed3d_backbone.inference.card import Card
    from sammed3d_backbone.inference.segmenter import Segmenter, build_network

    torch.manual_seed(0)
    card = Card(
        network="basicunet",
        encoder={},
        adapter={"features": [4, 4, 4, 4, 4, 4]},
        labels={0: "background", 1: "front", 2: "back"},
        channels=("MRI",),
        preprocessing=Preprocessing(None, {"default": "zscore"}, "volume", (32, 32, 32)),
    )
    Segmenter(build_network(card), card).save(path)
    return path
