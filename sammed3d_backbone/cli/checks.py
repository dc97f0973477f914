"""What several commands ask for, and checks before any work."""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

MAX_FILE_NAME_BYTES = 255  # of the common file systems

if TYPE_CHECKING:
    from torch import nn

    NetworkT = TypeVar("NetworkT", bound=nn.Module)


def require_free(
    targets: Sequence[Path | None], inputs: Sequence[str | Path | None], *, force: bool
) -> None:
    """Checks before any work that outputs can be written and overwrite nothing unasked.

    Args:
        targets: Files to be written; None for outputs that are not wanted.
        inputs: Files that are read, which are never overwritten; others are ignored.
        force: Whether other existing files may be overwritten.

    Raises:
        FileExistsError: If a file exists and may not be overwritten, or is an input.
        IsADirectoryError: If a target is a folder.
        PermissionError: If the folder of a target cannot be made or written to.
        ValueError: If two targets are one file.
    """
    asked = [target for target in targets if target is not None]
    for target in asked:
        if target.is_symlink() and not target.exists():
            raise FileExistsError(f"{target} is a link to nothing; choose another name")
        if len(os.fsencode(target.name)) > MAX_FILE_NAME_BYTES:
            raise ValueError(f"the name {target.name} is too long for a file; shorten it")
    read = {Path(path).resolve() for path in inputs if path is not None}
    if len({target.resolve() for target in asked}) < len(asked):
        raise ValueError(f"two outputs are named {asked[-1]}; give each its own name")
    for target in asked:
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder; give a file name in it")
        if target.exists() and not (force and target.is_file() and target.resolve() not in read):
            raise FileExistsError(
                f"{target} exists; choose another name, or pass --force if it is not an input"
            )
        folder = next(parent for parent in target.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(
                f"{target} cannot be written, since {folder} is not a folder that you may write "
                "to; choose another place"
            )


def add_workers(
    parser: argparse.ArgumentParser,
    jobs: int | None = 1,
    meaning: str = "workers; -1: all cores",
) -> None:
    """Declares `--jobs` and `--backend`, see `parallel.workers`."""
    parser.add_argument("--jobs", type=int, default=jobs, metavar="N", help=meaning)
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help="dask://HOST:PORT, a running Dask cluster that sees the same paths; or joblib's: "
        "loky, threading, sequential, ray",
    )


def positive(text: str) -> float:
    """A finite number above 0, as a type of argparse."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def positive_int(text: str) -> int:
    """A whole number above 0, as a type of argparse."""
    return int(positive(str(int(text))))


def require_unused(args: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    """Refuses options that would be ignored.

    Raises:
        ValueError: If one of them was given.
    """
    given = [
        f"--{name.replace('_', '-')}"
        for name in names
        if (value := getattr(args, name)) is not None and value is not False and value != []
    ]
    if given:
        raise ValueError(f"{' '.join(given)}: {reason}; leave it out")


def on_device(network: "NetworkT", device: str) -> "NetworkT":
    """The network on a device.

    Raises:
        ValueError: If the device cannot be used here.
    """
    import torch

    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no values")
        return network.to(device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used ({reason}); try cpu") from None
