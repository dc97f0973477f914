"""What every command checks before it begins: outputs that nobody loses, devices that exist."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import nn

    from sammed3d_backbone.data.volume import Volume

    Network = TypeVar("Network", bound=nn.Module)


def require_free(targets: Sequence[Path | None], source: Path, *, force: bool) -> None:
    """Refuses outputs that would replace something.

    Args:
        targets: Files to be written; None for those that were not asked for.
        source: The input, which is never replaced.
        force: Whether other files may be.

    Raises:
        FileExistsError: If a file would be replaced unasked, or is the input.
        IsADirectoryError: If a target is a folder.
        ValueError: If two targets are one file.
    """
    asked = [target for target in targets if target is not None]
    if len({target.absolute() for target in asked}) < len(asked):
        raise ValueError(f"two outputs are named {asked[-1]}; give each its own name")
    for target in asked:
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder; give a file name in it")
        if target.exists() and (not force or (source.exists() and target.samefile(source))):
            raise FileExistsError(
                f"{target} exists; choose another name, or pass --force if it is not IN itself"
            )


def opened(source: Path, channel: int | None) -> "Volume":
    """The volume of a file, or one channel of it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be used, or it is not said which of its channels.
    """
    from sammed3d_backbone.data.volume import Volume
    from sammed3d_backbone.inference.interactive.validation import checked_range, opened_volume

    volume = Volume.load(source)
    if channel is not None and not 0 <= channel < volume.channels:
        raise ValueError(f"--channel {channel}: {source} has {volume.channels}, counted from 0")
    if channel is None and volume.channels > 1:
        raise ValueError(f"{source} has {volume.channels} channels; name one with --channel N")
    if volume.array.ndim == 4:
        volume = Volume(volume.array[channel or 0], volume.affine, volume.header)
    try:
        volume = opened_volume(volume, None)
        checked_range(volume)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return volume


def on_device(network: "Network", device: str) -> "Network":
    """The network on a device.

    Raises:
        ValueError: If the device cannot be used here.
    """
    try:
        return network.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used ({reason}); try cpu") from None
