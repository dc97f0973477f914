"""One kill of one command, and what has to hold after it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from boxes import write_boxes

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.loading.checkpoint import content_sha256, read

ROOT = Path(__file__).resolve().parents[2]
CLI = "import sys; from sammed3d_backbone.cli import main; sys.exit(main())"
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
    return ("-c", CLI, *arguments)


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


def start(command, place):
    """The command as a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "SAMMED3D_RUNS": str(place / "runs"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.Popen(
        [sys.executable, *command.arguments],
        cwd=place,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


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
    return path.read_text()


def results(command, place):
    """The content of all results."""
    return {
        str(path.relative_to(place)): content(path)
        for pattern in command.results
        for path in sorted(place.glob(pattern))
    }


def finished(name, place):
    """Runs a command to its end; its results, and the seconds that it took."""
    began = time.monotonic()
    process = start(COMMANDS[name], place)
    _, said = process.communicate()
    assert process.returncode == 0, f"{name}: {said[-600:]}"
    assert "Traceback" not in said, said
    return results(COMMANDS[name], place), time.monotonic() - began


def kill(name, place, *, rng, seconds, expected, tally):
    """Kills a command once, and runs it to its end."""
    inside_a_save = rng.random() < 0.5
    until = time.monotonic() + rng.uniform(0.2, 1.0) * seconds
    process = start(COMMANDS[name], place)
    while process.poll() is None and time.monotonic() < until:
        if inside_a_save and any(place.rglob("*/.[0-9a-f]*")):
            break
        time.sleep(0.002)
    sent = rng.choice(SIGNALS)
    is_running = process.poll() is None
    process.send_signal(sent)
    _, said = process.communicate()
    tally.kills += is_running
    tally.too_late += not is_running
    try:
        # Before `run_program` has begun, while a script imports, Python itself answers Ctrl-C.
        began = "run_program" in said or "in <module>\n    from " not in said
        if sent is signal.SIGINT and is_running and began and "Traceback" in said:
            raise AssertionError(f"a traceback after Ctrl-C: {said[-300:]}")
        for path in place.rglob("*"):
            if path.is_file() and not any(p.startswith((".", "partial-")) for p in path.parts[-3:]):
                content(path)
        after, _ = finished(name, place)
        if after.keys() != expected.keys():
            raise AssertionError(f"other files: {sorted(after.keys() ^ expected.keys())}")
        if unequal := [path for path in after if after[path] != expected[path]]:
            raise AssertionError(f"unequal: {unequal}")
    except Exception as error:  # noqa: BLE001 (counted)
        tally.faults.append(f"{name}, {sent.name}: {type(error).__name__}: {error}"[:500])


def campaign(name, kills, seed, folder, model):
    """Kills a command so many times, each in a fresh folder."""
    rng, tally = random.Random(f"{seed}{name}"), Tally()
    places = iter(range(kills + 1))

    def fresh():
        place = workplace(folder / f"{name}{next(places)}")
        shutil.copyfile(model, place / "model.safetensors")
        return place

    place = fresh()
    expected, seconds = finished(name, place)
    assert expected, name
    shutil.rmtree(place)
    for _ in range(kills):
        place = fresh()
        kill(name, place, rng=rng, seconds=seconds, expected=expected, tally=tally)
        shutil.rmtree(place)
    return tally


def small_model(path):
    """A fine-tuned model for `predict`."""
    import torch

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
        preprocessing=Preprocessing(None, {"default": "zscore"}, "volume", (16, 16, 16)),
    )
    Segmenter(build_network(card), card).save(path)
    return path
