"""Equality of fine-tuning runs under several processes, accumulation and kills, on boxes.

    python -m tests.checks.equality_check                # writes tests/checks/results/equality.json

Two processes on half batches, and one that accumulates half batches, are compared with one process
on whole batches: losses and weights differ by rounding only. Then runs, of one process and of two,
are killed (SIGKILL) at random moments and while they save, resume and are killed again; in the end
they have to equal an uninterrupted run, to the last bit. Cases annotated in part, an encoder
that waits, drop path and augmentation take part.

Every run is a fork of this process, which has imported everything and computed nothing: a start
costs no import, and no pool of threads is lost in the fork.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from sammed3d_backbone.recipes import finetune_unetr
from sammed3d_backbone.recipes.studies.arms import ArmConfig, fine_tune

from sammed3d_backbone.data.crops import CropStream
from sammed3d_backbone.provenance import provenance
from sammed3d_backbone.training.runs import (
    AVERAGE,
    MODEL,
    OPTIMIZER,
    PARTIAL,
    RUNS_VARIABLE,
    Run,
    runs_folder,
)
from tests.support.boxes import write_boxes

HERE = Path(__file__).parent
FORK = multiprocessing.get_context("fork")
CLOCKS = ("seconds", "cpu_seconds", "images_per_s", "memory_gib")  # these entries may differ
# What has to be equal after a kill, by the file of the last checkpoint that holds it.
STATES = {
    "parameters": MODEL,
    "optimiser": OPTIMIZER,
    "average of the weights": AVERAGE,
}
NETWORKS = ("best.safetensors", "last.safetensors")


def small_config(data: Path) -> ArmConfig:
    """The configuration of a run of about two seconds."""
    return ArmConfig(
        name="whole",
        data=str(data),
        folds=3,
        scratch=True,
        feature_size=4,
        spacing_mm=(1.0, 1.0, 1.0),
        crop_vox=16,
        freeze=3,
        steps=8,
        batch=1,
        accumulate=2,
        warmup_steps=2,
        validate_every=4,
        threads=1,
        cpu=True,
    )


class WatchedStream(CropStream):
    """Writes a hash of each sample into the folder of the run."""

    notes: Path

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(number)
        digest = hashlib.sha256(b"".join(sample[key].numpy().tobytes() for key in sorted(sample)))
        with self.notes.open("a") as notes:
            notes.write(f"{number} {digest.hexdigest()}\n")
        return sample


def start(cfg: ArmConfig, processes: int = 1) -> list[BaseProcess]:
    """Starts a run in a number of processes, as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank} | together if processes > 1 else {}
        child = FORK.Process(
            target=_run, args=(cfg, {name: str(value) for name, value in place.items()})
        )
        child.start()
        children.append(child)
    return children


def finish(children: list[BaseProcess]) -> None:
    """Waits for a run, which has to succeed."""
    for child in children:
        child.join()
        if child.exitcode:
            raise RuntimeError(f"a run failed:\n{_said_by(child).read_text()}")


def kill_until_done(cfg: ArmConfig, processes: int, rng: np.random.Generator) -> Counter[str]:
    """Kills and resumes a run, at random moments or while it saves, until it completes.

    Returns:
        How many kills left a half-written checkpoint behind ("while saving"), and how many not.
    """
    folder = runs_folder() / cfg.name
    kills: Counter[str] = Counter()
    while True:
        children = start(cfg, processes)
        if rng.random() < 0.7:
            time.sleep(rng.uniform(0, 2))
        else:
            for _ in range(rng.integers(1, 4)):
                _wait_for_save(folder, children[0])
            time.sleep(rng.uniform(0, 0.01))
        for child in children:
            child.kill()
        for child in children:
            child.join()
        if not any(child.exitcode == -signal.SIGKILL for child in children):
            finish(children)
            return kills
        saving = any(folder.glob(f"checkpoints/{PARTIAL}*"))
        kills["while saving" if saving else "elsewhere"] += 1


def differences(whole: Path, other: Path) -> list[str]:
    """The parts that are not bit-equal in two finished runs."""
    checkpoints = [Run(folder).checkpoints[-1] for folder in (whole, other)]
    pairs: dict[str, list[object]] = {
        state: [_tensors(folder / file) for folder in checkpoints] for state, file in STATES.items()
    }
    for file in NETWORKS:
        pairs[file] = [_tensors(folder / file) for folder in (whole, other)]
    pairs["log"] = [_log(folder) for folder in (whole, other)]
    pairs["samples"] = [_samples(folder) for folder in (whole, other)]
    return [name for name, (one, two) in pairs.items() if one != two]


def compare_sharing(cfg: ArmConfig) -> dict[str, float]:
    """Largest differences when halves of a batch go to two processes, or through one in turn."""
    # Each share of a batch draws its own random numbers for drop path, so there is none.
    base = replace(cfg, accumulate=1, drop_path_rate=0.0)
    arms = {
        "whole_batch": (replace(base, name="whole_batch", batch=4), 1),
        "two_processes": (replace(base, name="two_processes", batch=2), 2),
        "accumulated": (replace(base, name="accumulated", batch=2, accumulate=2), 1),
    }
    for arm, processes in arms.values():
        finish(start(arm, processes))
    losses, weights = {}, {}
    for name in arms:
        folder = runs_folder() / name
        losses[name] = np.array([line["loss"] for line in _log(folder) if "loss" in line])
        weights[name] = _tensors(folder / "last.safetensors")
    figures = {}
    for name in ("two_processes", "accumulated"):
        figures[f"{name}_loss"] = float(np.abs(losses[name] - losses["whole_batch"]).max())
        figures[f"{name}_weight"] = max(
            float(np.abs(np.frombuffer(a, np.float32) - np.frombuffer(b, np.float32)).max())
            for a, b in zip(weights[name].values(), weights["whole_batch"].values(), strict=True)
        )
    return figures


def check(kills: int, seed: int) -> dict[str, object]:
    """All figures, from runs in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[RUNS_VARIABLE] = f"{folder}/runs"
        runs_folder().mkdir()
        write_boxes(Path(folder), partly=True)
        cfg = small_config(Path(folder))
        result: dict[str, object] = {"largest_difference": compare_sharing(cfg)}
        rng = np.random.default_rng(seed)
        total: Counter[str] = Counter()
        differing: set[str] = set()
        wholes = {n: replace(cfg, name=f"whole_{n}") for n in (1, 2)}  # by number of processes
        for processes, whole in wholes.items():
            finish(start(whole, processes))
        runs = 0
        while total.total() < kills or not total["while saving"] or runs < len(wholes):
            processes = 1 + runs % 2
            killed = replace(cfg, name=f"killed_{runs}")
            total += kill_until_done(killed, processes, rng)
            folders = (runs_folder() / run.name for run in (wholes[processes], killed))
            differing |= {*differences(*folders)}
            runs += 1
    compared = [*STATES, *NETWORKS, "log", "samples"]
    return {
        **result,
        "kills": dict(total) | {"total": total.total()},
        "killed_runs": runs,  # runs of one process and of two in turn
        "steps_per_run": cfg.steps,
        "equal_to_the_last_bit": {name: name not in differing for name in compared},
    }


def main() -> None:
    """Checks, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="at least so many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "equality.json")
    arguments = parser.parse_args()
    result = check(arguments.kills, arguments.seed)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    result |= {"cpu_seconds": round(spent.ru_utime + spent.ru_stime, 1), **provenance(HERE)}
    text = json.dumps(result, indent=1)
    arguments.out.write_text(text + "\n")
    print(text)


def _run(cfg: ArmConfig, place: dict[str, str]) -> None:
    """The child process: the recipe without its final scores."""
    os.environ.update(place)
    with _said_by(multiprocessing.current_process()).open("w") as said:
        os.dup2(said.fileno(), sys.stdout.fileno())
        os.dup2(said.fileno(), sys.stderr.fileno())
    WatchedStream.notes = runs_folder() / cfg.name / "samples.txt"
    finetune_unetr.CropStream = WatchedStream
    finetune_unetr.SAVE_EVERY_S = 0.5
    finetune_unetr.finetuning.report = lambda *_: {}
    fine_tune(cfg)


def _said_by(child: BaseProcess) -> Path:
    """The file with a child's output."""
    return runs_folder() / f"{child.name}.txt"


def _wait_for_save(folder: Path, child: BaseProcess) -> None:
    """Returns when the next checkpoint begins to be written, or the run has ended."""
    seen = {*folder.glob("checkpoints/*")}
    while child.is_alive():
        if any(p.name.startswith(PARTIAL) for p in {*folder.glob("checkpoints/*")} - seen):
            return
        time.sleep(0.001)


def _log(folder: Path) -> list[dict[str, object]]:
    """A run's log without times and memory."""
    return [{k: v for k, v in r.items() if k not in CLOCKS} for r in Run(folder).records()]


def _samples(folder: Path) -> set[str]:
    """Numbers and hashes of the drawn samples, as a set."""
    return {*(folder / "samples.txt").read_text().split("\n")}


def _tensors(path: Path) -> dict[str, bytes]:
    """The bytes of every tensor in a file."""
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name).tobytes() for name in sorted(file.keys())}


if __name__ == "__main__":
    main()
