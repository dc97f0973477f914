"""What a user has said about objects: clicks and mask prompts, checked against the volume.

A click is kept as a voxel of the volume's own grid, whichever way it was given.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sammed3d_backbone.data.geometry import Triple
from sammed3d_backbone.data.volume import Volume


@dataclass(frozen=True)
class Click:
    """One click.

    Args:
        object: Name of what was clicked.
        point_vox: Of the volume's own grid.
        positive: Inside the object.
        window: Start of the window that the click asks for; None for negative clicks, which
            correct what the object's windows say and ask for none.
    """

    object: str
    point_vox: Triple
    positive: bool
    window: Triple | None


@dataclass(frozen=True, eq=False)
class MaskPrompt:
    """An earlier answer to go on from.

    Shapes:
        values: (X, Y, Z) on the volume's own grid; bool, or float logits.
    """

    object: str
    values: NDArray[Any]
    window: Triple


Prompt = Click | MaskPrompt


def voxel_of(
    volume: Volume,
    point_vox: Sequence[float] | None,
    point_mm: Sequence[float] | None,
) -> Triple:
    """The voxel that a point lies in.

    Args:
        volume: That was clicked.
        point_vox: Voxel i, j, k of the volume's own grid, counted from 0.
        point_mm: x, y, z in RAS+ mm, instead.

    Raises:
        TypeError: If a point is no sequence of numbers.
        ValueError: If not exactly one of the points is given, or it is not in the volume.
    """
    if (point_vox is None) == (point_mm is None):
        raise ValueError("a click is one point; give point_vox=(i, j, k) or point_mm=(x, y, z)")
    given = point_vox if point_mm is None else point_mm
    name = "point_vox" if point_mm is None else "point_mm"
    if isinstance(given, str):
        raise TypeError(f"{name}={given!r} is text; give three numbers")
    try:
        point = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name}={given!r} is no point; give three numbers") from None
    if point.shape != (3,) or not np.isfinite(point).all():
        raise ValueError(f"{name}={given!r} is no point; give three finite numbers")
    if point_mm is not None:
        point = (np.linalg.inv(volume.affine) @ [*point, 1])[:3]
    # Rounding to nine digits first: a point in mm on a voxel's border falls to one side whatever
    # the last digit of the affine's inverse.
    index = np.floor(np.round(np.clip(point, -1, volume.shape), 9) + 0.5)
    if not ((index >= 0) & (index < volume.shape)).all():
        raise ValueError(f"{name}={given!r} lies outside the volume; {_bounds(volume, name)}")
    i, j, k = (int(n) for n in index)
    return i, j, k


def require_consistent(clicks: Iterable[Click], new: Click, number: int) -> None:
    """Refuses a click on a voxel that the same object was clicked on with the other sign.

    Args:
        clicks: Of all objects so far, in order.
        new: The next one.
        number: Of the next one, counted from 1.

    Raises:
        ValueError: If they contradict each other; the message names both.
    """
    for earlier, click in enumerate(clicks, start=1):
        same = (click.object, click.point_vox) == (new.object, new.point_vox)
        if same and click.positive != new.positive:
            first, second = ("positive", "negative")[:: 1 if click.positive else -1]
            raise ValueError(
                f"click {number} says that voxel {new.point_vox} is {second} for {new.object!r}, "
                f"click {earlier} that it is {first}; undo one of them"
            )


def _bounds(volume: Volume, name: str) -> str:
    """What a point may be, in its own unit."""
    last = [n - 1 for n in volume.shape]
    if name == "point_vox":
        return "voxels run from (0, 0, 0) to " + str(tuple(last))
    corners = np.array([[*c, 1] for c in itertools.product(*((-0.5, n + 0.5) for n in last))])
    places = (corners @ volume.affine.T)[:, :3]
    low, high = (tuple(round(float(v), 1) for v in f(places, axis=0)) for f in (np.min, np.max))
    return f"its box in mm runs from {low} to {high}"
