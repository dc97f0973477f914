"""Checks before any work: no file is overwritten unasked, and the device exists."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import nn

    NetworkT = TypeVar("NetworkT", bound=nn.Module)


def require_free(targets: Sequence[Path | None], source: Path, *, force: bool) -> None:
    """Checks that no output would overwrite a file.

    Args:
        targets: Files to be written; None for outputs that are not wanted.
        source: The input, which is never overwritten.
        force: Whether other existing files may be overwritten.

    Raises:
        FileExistsError: If a file exists and may not be overwritten, or is the input.
        IsADirectoryError: If a target is a folder.
        ValueError: If two targets are one file.
    """
    wanted = [target for target in targets if target is not None]
    if len({target.absolute() for target in wanted}) < len(wanted):
        raise ValueError(f"two outputs are named {wanted[-1]}; give each its own name")
    for target in wanted:
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder; give a file name in it")
        if target.exists() and (not force or (source.exists() and target.samefile(source))):
            raise FileExistsError(
                f"{target} exists; choose another name, or pass --force if it is not IN itself"
            )


def on_device(network: "NetworkT", device: str) -> "NetworkT":
    """The network on a device.

    Raises:
        ValueError: If the device cannot be used here.
    """
    try:
        return network.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used ({reason}); try cpu") from None
