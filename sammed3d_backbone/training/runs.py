"""The folder of a run: its configuration, its log, its checkpoints; made to survive a kill.

    <SAMMED3D_RUNS>/<name>/config.yaml        what was run; another configuration is refused
                           metrics.jsonl      one JSON object per line, in the order of steps
                           checkpoints/<step> the newest complete one is where the run goes on
                           best.safetensors, last.safetensors    networks, see `export`
                           results/           scores and figure

A checkpoint is written beside its place and renamed, so the newest named one is always whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from sammed3d_backbone import config
from sammed3d_backbone.files import write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RUNS_VARIABLE = "SAMMED3D_RUNS"
DEFAULT_RUNS = "~/sammed3d_runs"
PARTIAL = "partial-"


@dataclass
class Progress:
    """What a run knows beside its weights; saved in every checkpoint."""

    processes: int = 1  # that train together; they share out the samples of a step
    step: int = 0  # finished optimiser steps
    best: float = float("-inf")  # best validation score so far
    dice: float | None = None  # of the last validation
    seconds: float = 0.0  # on the clock, spent in training, over all resumes
    cpu_seconds: float = 0.0  # of the main process's cores, likewise; blind to a busy machine
    peak_bytes: int = 0  # most memory that a main process held, over all resumes

    def scored(self, dice: float | None) -> bool:
        """Takes the score of a validation, None if no class had one; whether it is the best."""
        self.dice = dice
        is_best = (dice or 0.0) > self.best
        self.best = max(self.best, dice or 0.0)
        return is_best

    def state_dict(self) -> dict[str, Any]:
        """For accelerate's checkpoints."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For accelerate's checkpoints."""
        for name, value in state.items():
            setattr(self, name, value)


@dataclass(frozen=True)
class Run:
    """One run's folder."""

    folder: Path
    writes: bool = True  # one of several processes does

    @property
    def log(self) -> Path:
        """The file of JSON lines."""
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = (self.folder / "checkpoints").glob("[0-9]*")
        return sorted(found, key=lambda path: int(path.name))

    def begin(self, cfg: DataclassInstance) -> None:
        """Makes the folder and writes the configuration into it."""
        if not self.writes:
            return
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "config.yaml", config.dump(cfg))

    def record(self, **values: object) -> None:
        """Appends one line to the log."""
        if not self.writes:
            return
        with self.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(values) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The lines of the log; a line cut off by a kill is left out."""
        if not self.log.is_file():
            return []
        lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def save(self, accelerator: Accelerator, step: int) -> None:
        """Writes the checkpoint of a step and then removes the older ones."""
        place = self.folder / "checkpoints" / f"{step:07d}"
        partial = place.with_name(PARTIAL + place.name)
        older = self.checkpoints
        if place in older:
            return
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if self.writes:
            partial.replace(place)
            for path in older:
                shutil.rmtree(path)
        accelerator.wait_for_everyone()

    def resume(self, accelerator: Accelerator, progress: Progress) -> bool:
        """Goes on from the newest checkpoint, if there is one.

        The log forgets what came after it, and what a kill left half-written is removed.

        Args:
            accelerator: With everything prepared and registered that is to be restored.
            progress: Registered with the accelerator; tells the step.

        Raises:
            ValueError: If the checkpoint is of another number of processes.
        """
        processes = progress.processes
        if self.writes:
            for path in (self.folder / "checkpoints").glob(f"{PARTIAL}*"):
                shutil.rmtree(path)
        accelerator.wait_for_everyone()
        found = self.checkpoints
        if found:
            accelerator.load_state(str(found[-1]))
        if progress.processes != processes:
            raise ValueError(
                f"{self.folder} was trained by {progress.processes} processes, and {processes} "
                f"would see other samples; go on with torchrun --nproc_per_node "
                f"{progress.processes}, or pass another name="
            )
        if self.writes:
            kept = [line for line in self.records() if line["step"] <= progress.step]
            write_text(self.log, "".join(json.dumps(line) + "\n" for line in kept if found))
        accelerator.wait_for_everyone()
        return bool(found)


def runs_folder() -> Path:
    """Where all runs lie: SAMMED3D_RUNS, by default outside any work tree."""
    return Path(os.environ.get(RUNS_VARIABLE, DEFAULT_RUNS)).expanduser()


def open_run(
    name: str, cfg: DataclassInstance, *, free: Collection[str] = (), writes: bool = True
) -> Run:
    """The run of that name below SAMMED3D_RUNS, new or to be continued; nothing is written yet.

    Args:
        name: Of the folder.
        cfg: What is asked for now.
        free: Keys that may differ from the earlier start, since no result depends on them.
        writes: Whether this process writes what one of several has to write.

    Raises:
        ValueError: If the name leaves the folder of runs, or the folder holds a run of another
            configuration; names what differs.
    """
    folder = runs_folder() / name
    if runs_folder().resolve() not in folder.resolve().parents:
        raise ValueError(f"name={name!r} is outside {runs_folder()}; give the name of a folder")
    written = folder / "config.yaml"
    if written.is_file():
        try:
            earlier = config.load(type(cfg), written)
        except ValueError as error:
            raise ValueError(
                f"{folder} holds a run of another version ({error}); pass another name="
            ) from None
        found = config.differences(earlier, cfg)
        changed = {key: values for key, values in found.items() if key not in free}
        if changed:
            listed = ", ".join(f"{key} ({a!r} -> {b!r})" for key, (a, b) in changed.items())
            raise ValueError(
                f"{folder} holds a run with other values of {listed}; pass another name=, or "
                "remove the folder to start over"
            )
    return Run(folder, writes)
