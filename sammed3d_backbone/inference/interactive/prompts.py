"""Prompts about objects: clicks and masks, in voxels of the volume's own grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sammed3d_backbone.data.geometry import Triple
from sammed3d_backbone.files import MAX_NAME_BYTES

OBJECT = "object"  # name of the object if none is given


@dataclass(frozen=True)
class ClickPrompt:
    """One click.

    Args:
        object: Name of the object that it is about.
        point_vox: Voxel of the volume's own grid.
        positive: Whether it lies inside the object.
        window: First voxel of the window that the click opens; None for negative clicks, which
            correct existing windows.
    """

    object: str
    point_vox: Triple
    positive: bool
    window: Triple | None

    def to_dict(self) -> dict[str, Any]:
        """The click as arguments of `Predictor.click`, in plain values for JSON."""
        vox = list(self.point_vox)
        return {"object": self.object, "point_vox": vox, "positive": self.positive}


@dataclass(frozen=True, eq=False)
class MaskPrompt:
    """An earlier mask of an object, to be refined.

    Shapes:
        inside: (X, Y, Z) bool, on the volume's own grid.
    """

    object: str
    inside: NDArray[np.bool_]
    window: Triple


Prompt = ClickPrompt | MaskPrompt


def object_name(name: object) -> str:
    """The name of an object; a whole number, as other programs name objects, becomes text.

    Raises:
        TypeError: If it is neither text nor a whole number.
        ValueError: If it is empty or too long.
    """
    if isinstance(name, int | np.integer) and not isinstance(name, bool):
        return str(int(name))
    if not isinstance(name, str):
        raise TypeError(f"object={name!r}: expected text or a whole number")
    if not name.strip():
        raise ValueError(f"object={name!r} is empty; give the object a name")
    if len(name.encode(errors="replace")) > MAX_NAME_BYTES:
        raise ValueError(
            f"object={name[:40]!r}... is longer than {MAX_NAME_BYTES} bytes; give it a shorter name"
        )
    return name


def mask_values(mask: NDArray[Any], shape: Triple) -> NDArray[np.bool_]:
    """A mask prompt as bool, on the grid of a volume.

    Raises:
        TypeError: If it does not hold numbers.
        ValueError: If it is empty, has another shape, or is not finite.
    """
    values = np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask)
    if values.dtype.kind not in "biuf":
        raise TypeError(f"mask= of dtype {values.dtype}: expected numbers")
    if values.shape != shape:
        raise ValueError(f"mask= has shape {values.shape}, the volume {shape}; resample it")
    if not np.isfinite(values).all():
        raise ValueError("mask= has NaN or infinite voxels; replace them")
    inside: NDArray[np.bool_] = values != 0
    if not inside.any():
        raise ValueError("mask= is empty; click on the object instead")
    return inside
