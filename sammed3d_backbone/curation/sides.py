"""Left and right: in the names of classes, and along the affine's first world axis.

World coordinates are RAS+, so that the patient's right has the larger x, whatever the order and
direction of the voxel axes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from sammed3d_backbone.curation.rules import ClassMask
from sammed3d_backbone.data.regions import components

SIDE = re.compile("left|right", re.IGNORECASE)
OTHER = {"left": "right", "right": "left"}
MARGIN_MM = 5.0  # closer together, neither of two is on the wrong side
MIN_SHARE = 0.2  # share of the larger half below which the second part is an island


def _words(name: str) -> str:
    """``ParotidGlands`` and ``parotid_gland`` -> ``parotid gland``."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    return " ".join(word.lower().removesuffix("s") for word in words)


# The whole name has to be one of these: a tumour of a kidney is not a pair.
PAIRED_ORGANS = (
    "adrenal gland, autochthon, breast, clavicle, clavicula, cochlea, eye, eyeball, femoral "
    "head, femur, gluteus maximus, gluteus medius, gluteus minimus, hip, hippocampus, humerus, "
    "iliac artery, iliac vein, iliopsoas, kidney, lacrimal gland, lung, optic nerve, parotid, "
    "parotid gland, scapula, submandibular gland"
)
PAIRED = set(map(_words, PAIRED_ORGANS.split(", ")))


def is_pair(name: str) -> bool:
    """Whether a class holds a left and a right organ together."""
    return _words(name) in PAIRED


def counterpart(name: str) -> str | None:
    """``RightParotid`` -> ``LeftParotid``; None for a name without a side, or with both."""
    if len({side.lower() for side in SIDE.findall(name)}) != 1:
        return None
    return SIDE.sub(_other, name)


def _other(match: re.Match[str]) -> str:
    """The other side in the same capitals."""
    found = match[0]
    other = OTHER[found.lower()]
    return other.upper() if found.isupper() else other.title() if found.istitle() else other


def separations_mm(x_mm: Mapping[str, float]) -> dict[str, float]:
    """Distance of a pair along the left-right axis, positive if the right one lies right.

    Args:
        x_mm: World x of the centre of every class.
    """
    found = {}
    for name, x in x_mm.items():
        other = counterpart(name)
        if other is not None and other in x_mm:
            is_right = "right" in name.lower()
            found[name] = (x - x_mm[other]) * (1 if is_right else -1)
    return found


def split(target: ClassMask, affine: NDArray[np.float64]) -> tuple[ClassMask, ClassMask] | None:
    """The left and the right half of a pair; None where there are no two parts side by side.

    The two largest 26-connected parts are the halves; every other part goes to the nearer one.
    """
    labels, sizes = components(target.mask)
    order = np.argsort(-sizes, kind="stable")
    if len(order) < 2 or sizes[order[1]] < MIN_SHARE * sizes[order[0]]:
        return None
    middles = ndimage.center_of_mass(target.mask, labels, range(1, len(sizes) + 1))
    centres = _world_mm(middles, target, affine)
    left, right = sorted(order[:2], key=lambda part: float(centres[part, 0]))
    apart = centres[right] - centres[left]
    if apart[0] < max(MARGIN_MM, *np.abs(apart[1:])):
        return None  # one above or behind the other: not a pair
    to_left, to_right = (np.linalg.norm(centres - centres[half], axis=1) for half in (left, right))
    is_right = np.concatenate([[False], to_right < to_left])[labels]
    return (
        ClassMask.cropped(f"{target.name} left", target.mask & ~is_right, target.start),
        ClassMask.cropped(f"{target.name} right", target.mask & is_right, target.start),
    )


def centre_mm(target: ClassMask, affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """World coordinates of the middle of a target, (3,)."""
    return _world_mm(ndimage.center_of_mass(target.mask), target, affine)


def _world_mm(
    voxels: ArrayLike, target: ClassMask, affine: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Voxels of the box of a target, (..., 3), in the world."""
    world: NDArray[np.float64] = (np.asarray(voxels) + target.start) @ affine[:3, :3].T
    return world + affine[:3, 3]
