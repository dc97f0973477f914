"""Prompts about objects: clicks and masks, in voxels of the volume's own grid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sammed3d_backbone.data.geometry import Triple
from sammed3d_backbone.data.volume import Volume

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
        values: (X, Y, Z) on the volume's own grid; bool, or floating logits.
    """

    object: str
    values: NDArray[Any]
    window: Triple


Prompt = ClickPrompt | MaskPrompt


def object_name(name: object) -> str:
    """The name of an object; a whole number, as other programs name objects, becomes text.

    Raises:
        TypeError: If it is neither text nor a whole number.
    """
    if isinstance(name, int | np.integer) and not isinstance(name, bool):
        return str(int(name))
    if not isinstance(name, str):
        raise TypeError(f"object={name!r}: expected text or a whole number")
    return name


def require_positive(clicks: Iterable[Mapping[str, Any]]) -> None:
    """Checks that each object has a click inside it, without which there is nothing to segment.

    Args:
        clicks: Arguments of `Predictor.click` that name the object, "object" if they do not.

    Raises:
        ValueError: If an object has negative clicks only.
    """
    positive = {True: set[str](), False: set[str]()}
    for click in clicks:
        positive[bool(click.get("positive", True))].add(object_name(click.get("object", OBJECT)))
    if lacking := sorted(positive[False] - positive[True]):
        raise ValueError(f"object {lacking[0]!r} has no positive click; click inside it first")


def mask_values(
    volume: Volume, logits: NDArray[Any] | None, mask: NDArray[Any] | Volume | None
) -> NDArray[Any]:
    """A mask prompt as floating logits or as bool, on the volume's grid.

    Raises:
        TypeError: If the logits are not floating-point numbers.
        ValueError: If not exactly one of both is given, it is on another grid or not finite.
    """
    if (logits is None) == (mask is None):
        raise ValueError("give either logits= or mask=")
    if isinstance(mask, Volume):
        if not np.allclose(mask.affine, volume.affine, atol=1e-3):
            raise ValueError("mask= has another affine than the volume; resample it")
        mask = mask.array
    values = np.asarray(mask if logits is None else logits)
    if values.shape != volume.shape:
        raise ValueError(
            f"the mask prompt has shape {values.shape}, the volume {volume.shape}; resample it"
        )
    name = "mask=" if logits is None else "logits="
    if values.dtype.kind not in "biuf":
        raise TypeError(f"{name} of dtype {values.dtype}: expected numbers")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has NaN or infinite voxels; replace them")
    if logits is None:
        inside: NDArray[np.bool_] = values != 0
        return inside
    if values.dtype.kind != "f":
        raise TypeError(f"logits= of dtype {values.dtype}: expected floating; or pass it as mask=")
    return values
