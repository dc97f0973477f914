"""Provenance of a result: machine, library versions, commit and date, as plain values for JSON."""

import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

LIBRARIES = ("torch", "monai", "timm", "accelerate", "numpy")
PATH_KEYS = ("cache", "data", "layout", "sources", "subjects")  # also below a folder of data
RESULTS = "recipes/studies/results"  # kept results, seen from a checkout's root


def provenance(repository: Path) -> dict[str, object]:
    """Machine, library versions, commit and date of this run."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(repository),
        "processor": _processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in LIBRARIES},
    }


def library_versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in ("sammed3d-backbone", *LIBRARIES, "nibabel"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"  # this package, imported from a checkout
    return found


def strip_directory(text: str) -> str:
    """The last part of a path; other text unchanged. Cards travel, directories do not.

    A path is absolute, or begins with ``~``, ``.`` or ``..``, or names something that exists here.
    """
    path = Path(text)
    is_path = path.is_absolute() or text.startswith(("~", "./", "../")) or os.path.lexists(path)
    return path.name if is_path and len(path.parts) > 1 else text


def settings_of_card(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings of a training as they travel with its network: files, but not their folders."""

    def plain(key: str, value: object) -> object:
        if isinstance(value, str):
            return Path(value).name if key in PATH_KEYS else strip_directory(value)
        return tuple(plain(key, each) for each in value) if isinstance(value, tuple) else value

    return {key: plain(key, value) for key, value in settings.items()}


def resident_bytes(entry: str) -> int:
    """Resident size of this process, now (VmRSS) or at most (VmHWM); 0 if this is not Linux.

    `resource.getrusage` would not do: its peak is inherited from the process that started this one.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:")]
    return found[0] if found else 0


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def command_line(processes: int) -> str:
    """The command that starts this recipe again, from a checkout or installed.

    torchrun starts as many processes on GPUs and on CPUs; accelerate's launcher starts one on CPUs,
    whatever number it is given, unless there is MPI.
    """
    program = Path(sys.argv[0]).name
    if not program.endswith(".py"):  # sammed3d train
        return shlex.join([program, *sys.argv[1:]])
    start = "python" if processes == 1 else f"torchrun --nproc_per_node {processes}"
    folder, _, script = Path(sys.argv[0]).resolve().as_posix().rpartition("/recipes/")
    return shlex.join([*start.split(), f"{'recipes/' if folder else ''}{script}", *sys.argv[1:]])


def _commit(repository: Path) -> str:
    """The commit, marked where the work tree differs from it in more than kept results.

    A study rewrites its committed table after every run, and no figure comes from that table.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(repository), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("describe", "--always", "--abbrev=12")
        where = ("--", ":/", f":(top,exclude){RESULTS}")
        changed = git("status", "--porcelain", "--untracked-files=no", *where)
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
    return f"{commit}-dirty" if changed else commit


def _processor() -> str:
    """The name of the processor, as far as the system reports it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
