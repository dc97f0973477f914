"""The folder of a run: its configuration, its log and its checkpoints.

    <SAMMED3D_RUNS>/<name>/config.yaml        the configuration; a different one is refused
                           metrics.jsonl      one JSON object per line, in the order of steps
                           checkpoints/<step> the newest two; training resumes from the newest
                           best.safetensors, last.safetensors    networks, see `inference`
                           results/           scores and figure

A checkpoint is a folder of safetensors files and one JSON file with their hashes. Nothing in a run
folder is ever unpickled, and a folder that holds a pickle is refused. accelerate's own
``save_state`` is not used because it writes and reads pickles. Random states are not saved: every
step seeds its random numbers with its own number (`engine.seed_step`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from sammed3d_backbone import config
from sammed3d_backbone.files import locked, sync, write_text
from sammed3d_backbone.loading.hub import sha256_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RUNS_VARIABLE = "SAMMED3D_RUNS"
DEFAULT_RUNS = "~/sammed3d_runs"
PARTIAL = "partial-"
DAMAGED = "damaged-"
KEPT = 2  # checkpoints
MODEL, OPTIMIZER, AVERAGE = "model.safetensors", "optimizer.safetensors", "average.safetensors"
INDEX = "checkpoint.json"  # progress, and the hash of every other file
PICKLE_SUFFIXES = {".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt"}
PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")  # PK: torch's archives


@dataclass
class Progress:
    """Counters of a run."""

    processes: int = 1  # processes that train together and share the samples of a step
    step: int = 0  # finished optimiser steps
    best: float | None = None  # best validation score so far
    dice: float | None = None  # score of the last validation
    seconds: float = 0.0  # wall-clock time spent in training, over all resumes
    cpu_seconds: float = 0.0  # CPU time of the main process, over all resumes
    peak_bytes: int = 0  # largest memory of a main process, over all resumes

    def scored(self, dice: float | None) -> bool:
        """Takes the score of a validation, None if no class had one; returns if it is the best."""
        self.dice = dice
        is_best = self.best is None or (dice or 0.0) > self.best
        self.best = (dice or 0.0) if is_best else self.best
        return is_best


@dataclass(frozen=True)
class State:
    """Everything that a checkpoint holds and a resumed run restores.

    Args:
        model: The model as the accelerator prepared it.
        optimizer: Its optimiser, whose state consists of tensors only; learning rates are computed
            from the step and not saved.
        ema: The averaged weights.
        progress: Counters.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3
    progress: Progress


@dataclass(frozen=True)
class Run:
    """The folder of one run."""

    folder: Path
    writes: bool = True  # whether this process is the one of several that writes
    say: Callable[[str], object] = print
    free: Collection[str] = ()  # keys of the configuration that may differ from the earlier start

    @property
    def log(self) -> Path:
        """The file of JSON lines."""
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        named = [path for path in self._entries() if path.name.isdecimal()]
        found = [path for path in named if path.is_dir() and not path.is_symlink()]
        return sorted(found, key=lambda path: int(path.name))

    @contextlib.contextmanager
    def begun(self, cfg: DataclassInstance) -> Iterator[None]:
        """Makes the folder, holds it, and writes the configuration into it.

        Raises:
            FileExistsError: If another process holds it.
            ValueError: As `open_run`, if another process has begun it meanwhile.
        """
        if not self.writes:
            yield
            return
        with locked(self.folder):
            self.require_same(cfg)
            (self.folder / "checkpoints").mkdir(exist_ok=True)
            write_text(self.folder / "config.yaml", config.dump(cfg))
            yield

    def require_same(self, cfg: DataclassInstance) -> None:
        """Refuses a folder that holds a run of another configuration; names what differs."""
        written = self.folder / "config.yaml"
        if not written.is_file():
            return
        try:
            earlier = config.load(type(cfg), written)
        except ValueError as error:
            raise ValueError(
                f"{self.folder} holds a run of another version ({error}); pass another name="
            ) from None
        found = config.differences(earlier, cfg)
        changed = {key: values for key, values in found.items() if key not in self.free}
        if changed:
            listed = ", ".join(f"{key} ({a!r} -> {b!r})" for key, (a, b) in changed.items())
            raise ValueError(
                f"{self.folder} holds a run with other values of {listed}; pass another name= "
                f"(to train it further, also its last.safetensors as init= or weights=), or remove "
                "the folder to start over"
            )

    def record(self, **values: object) -> None:
        """Appends one line to the log."""
        if not self.writes:
            return
        with self.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(values) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The lines of the log; a line that is cut off or has no step is left out."""
        if not self.log.is_file():
            return []
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        found = [_parsed(line) for line in lines if line.endswith("\n")]
        return [line for line in found if isinstance(line.get("step"), int)]

    def save(self, accelerator: Accelerator, state: State) -> None:
        """Writes a checkpoint, then removes all but the newest two."""
        place = self.folder / "checkpoints" / f"{state.progress.step:07d}"
        if self.writes and not place.exists():
            partial = place.with_name(PARTIAL + place.name)
            _remove(partial)
            write_checkpoint(partial, _tensors(accelerator, state), state.progress)
            partial.replace(place)
            sync(place.parent)
            for path in self.checkpoints[:-KEPT]:
                _remove(path)
        accelerator.wait_for_everyone()

    def resume(self, accelerator: Accelerator, state: State) -> bool:
        """Restores the newest complete checkpoint, if there is one.

        The log forgets what came after it, and what a kill left half-written is removed. A damaged
        checkpoint is set aside, with one line, and the one before it is used.

        Args:
            accelerator: The one that prepared the state's model and optimiser.
            state: Is overwritten.

        Raises:
            ValueError: If all checkpoints are damaged, or the checkpoint was written by another
                number of processes or for another network.
        """
        chosen = [self._choose() if self.writes else None]
        name = broadcast_object_list(chosen)[0] if accelerator.num_processes > 1 else chosen[0]
        if name is not None:
            _restore(accelerator, state, self.folder / "checkpoints" / name)
            self.say(f"resuming after step {state.progress.step}")
        if self.writes:
            kept = [line for line in self.records() if line["step"] <= state.progress.step]
            write_text(self.log, "".join(json.dumps(line) + "\n" for line in kept if name))
        accelerator.wait_for_everyone()
        return name is not None

    def _choose(self) -> str | None:
        """The name of the newest undamaged checkpoint; clears away what is not one."""
        found = self.checkpoints
        for path in {*self._entries()} - {*found}:
            if path.name.startswith(PARTIAL):
                _remove(path)
            else:
                self.say(f"{path} is ignored: not a checkpoint")
        damaged: list[Path] = []
        for path in reversed(found):
            if (damage := _damage(path)) is None:
                for other in damaged:  # out of the way of the checkpoints to come
                    aside = other.with_name(DAMAGED + other.name)
                    _remove(aside)
                    other.replace(aside)
                return path.name
            self.say(f"checkpoint {path} is skipped: {damage}")
            damaged.append(path)
        if damaged:
            raise ValueError(
                f"{self.folder} has no checkpoint that can be read; pass another name=, or remove "
                "the folder to start over"
            )
        return None

    def _entries(self) -> list[Path]:
        """The entries of the folder of checkpoints."""
        folder = self.folder / "checkpoints"
        return sorted(folder.iterdir()) if folder.is_dir() else []


def runs_folder() -> Path:
    """The folder of all runs: SAMMED3D_RUNS, by default outside any work tree."""
    return Path(os.environ.get(RUNS_VARIABLE, DEFAULT_RUNS)).expanduser()


def open_run(
    name: str,
    cfg: DataclassInstance,
    *,
    free: Collection[str] = (),
    writes: bool = True,
    say: Callable[[str], object] = print,
) -> Run:
    """The run of that name below SAMMED3D_RUNS, new or to be resumed; nothing is written yet.

    Args:
        name: Name of the folder.
        cfg: The configuration of this start.
        free: Keys that may differ from the earlier start, since no result depends on them.
        writes: Whether this process is the one of several that writes.
        say: Prints a line.

    Raises:
        ValueError: If the name leaves the folder of runs, or the folder holds a pickle or a run of
            another configuration; names what differs.
    """
    folder = runs_folder() / name
    if runs_folder().resolve() not in folder.resolve().parents:
        raise ValueError(f"name={name!r} is outside {runs_folder()}; give the name of a folder")
    _refuse_pickles(folder)
    run = Run(folder, writes, say, free)
    run.require_same(cfg)
    return run


def _refuse_pickles(folder: Path) -> None:
    """Checks that no file in a run's folder is a pickle, by its name and its first two bytes.

    A safetensors file may start with any byte and is never unpickled, so it is not checked.
    """
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix == ".safetensors":
            continue
        with path.open("rb") as file:
            is_pickle = file.read(2) in PICKLE_STARTS
        if is_pickle or path.suffix in PICKLE_SUFFIXES:
            raise ValueError(
                f"{path} may be a pickle, which runs code when it is opened; this program never "
                "writes one: remove it, or pass another name="
            )


def _tensors(accelerator: Accelerator, state: State) -> dict[str, dict[str, Tensor]]:
    """The tensors of a state, by file and name."""
    network = accelerator.unwrap_model(state.model)
    moments = {
        f"{name}/{key}": value
        for name, parameter in _learning(network, state.optimizer).items()
        for key, value in state.optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)  # timm's Muon keeps flags there, too, which it derives anew
    }
    return {
        MODEL: network.state_dict(),
        OPTIMIZER: moments,
        AVERAGE: state.ema.module.state_dict(),
    }


def _learning(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The optimiser's parameters by name, in its order."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}


def write_checkpoint(
    folder: Path, files: Mapping[str, Mapping[str, Tensor]], progress: Progress
) -> None:
    """Writes a checkpoint's files through to the disk."""
    folder.mkdir()
    hashes = {}
    for name, tensors in files.items():
        # Clones, since safetensors refuses tensors that share memory.
        whole = {key: t.detach().cpu().clone().contiguous() for key, t in tensors.items()}
        save_file(whole, folder / name)
        hashes[name] = sha256_of(folder / name)
    index = {"progress": dataclasses.asdict(progress), "sha256": hashes}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    for path in (*(folder / name for name in (*files, INDEX)), folder):
        sync(path)


def _restore(accelerator: Accelerator, state: State, folder: Path) -> None:
    """Loads a checkpoint that has been checked."""
    progress = Progress(**json.loads((folder / INDEX).read_text(encoding="utf-8"))["progress"])
    if progress.processes != accelerator.num_processes:
        raise ValueError(
            f"{folder} was trained by {progress.processes} processes, and "
            f"{accelerator.num_processes} would see other samples; resume with torchrun "
            f"--nproc_per_node {progress.processes}, or pass another name="
        )
    network = accelerator.unwrap_model(state.model)
    for name, module in ((MODEL, network), (AVERAGE, state.ema.module)):
        tensors = load_file(folder / name)
        if tensors.keys() != module.state_dict().keys():
            raise ValueError(f"{folder / name} is of another network; pass another name=")
        module.load_state_dict(tensors)
    numbers = {name: n for n, name in enumerate(_learning(network, state.optimizer))}
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / OPTIMIZER).items():
        parameter, _, key = name.rpartition("/")
        moments.setdefault(numbers[parameter], {})[key] = tensor
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    vars(state.progress).update(vars(progress))


def _damage(folder: Path) -> str | None:
    """The reason why a checkpoint cannot be used; None if it can."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        Progress(**index["progress"])
        for name in (MODEL, OPTIMIZER, AVERAGE):
            if sha256_of(folder / name) != index["sha256"][name]:
                return f"{name} does not have the hash that {INDEX} gives"
            with safetensors.safe_open(folder / name, "pt"):
                pass
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _remove(folder: Path) -> None:
    """Removes a checkpoint's own files, and its folder unless it holds other files."""
    if not folder.is_dir() or folder.is_symlink():
        return
    # safetensors writes under a name of its own first, which a kill leaves behind.
    unfinished = [path.name for path in folder.glob(".tmp*") if path.is_file()]
    for name in (INDEX, MODEL, OPTIMIZER, AVERAGE, *unfinished):
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _parsed(line: str) -> dict[str, Any]:
    """A line of the log; empty if it is not a JSON object."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
