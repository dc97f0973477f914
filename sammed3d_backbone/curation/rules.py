"""Limits of the size of a mask, its measures, and removal of islands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sammed3d_backbone.data.geometry import Triple, TripleMm
from sammed3d_backbone.data.regions import Mask, bounding_box, components
from sammed3d_backbone.data.volume import Volume

ROUNDING = 1e-6  # tolerance of limits, since spacings are stored as float32


@dataclass(frozen=True)
class CurationRules:
    """Limits of one preset; None for unlimited."""

    source: str
    min_ml: float = 1.0
    min_side_mm: float = 15.0  # smallest side of the box around the mask
    max_side_mm: float | None = None
    max_background: float | None = None  # share of the volume's voxels
    max_parts: int = 5  # the largest ones; all others are islands
    max_island_share: float | None = None  # larger shares of a mask are not removed

    def __post_init__(self) -> None:
        if not 0 <= self.min_side_mm < math.inf:
            raise ValueError(f"min_side_mm={self.min_side_mm:g}; give a number of 0 or more")

    def small(self, extent: Extent) -> str:
        """The reason to drop a mask for its size; empty if there is none."""
        if extent.ml < self.min_ml * (1 - ROUNDING):
            return f"{extent.ml:.3g} ml is less than {self.min_ml:g} ml"
        if min(extent.sides_mm) < self.min_side_mm * (1 - ROUNDING):
            return f"a side of {min(extent.sides_mm):.3g} mm is less than {self.min_side_mm:g} mm"
        limit_mm = self.max_side_mm
        if limit_mm is not None and max(extent.sides_mm) > limit_mm * (1 + ROUNDING):
            return f"a side of {max(extent.sides_mm):.4g} mm is more than {limit_mm:g} mm"
        return ""

    def sparse(self, extent: Extent) -> str:
        """The reason to drop a mask for the share of background; empty if there is none."""
        limit = self.max_background
        if limit is None or extent.background <= limit:
            return ""
        return f"{extent.background:.2%} of the volume is background, more than {limit:.0%}"


PRESETS: Mapping[str, CurationRules] = {
    # Scattered lesions are many parts by nature; the paper's rule would take a fifth of them.
    "default": CurationRules(
        source="the paper's rules, but no limit on background, and scattered targets stay whole",
        max_island_share=0.05,
    ),
    "paper": CurationRules(
        source="Wang et al., SAM-Med3D, section 3.2, taken literally on whole volumes",
        max_background=0.99,
    ),
    # In voxels of 1.5 mm there: 1000 of them, sides of 10 to 121. The upper limit is computed in
    # his code, but not seen to be used.
    "author-list": CurationRules(
        source="the first author's filter of file lists, uni-medical/SAM-Med3D issue 20",
        min_ml=1000 * 1.5**3 / 1000,
        max_side_mm=121 * 1.5,
    ),
}


def preset(name: str) -> CurationRules:
    """The rules of that name.

    Raises:
        ValueError: If there are none.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


@dataclass(frozen=True)
class Extent:
    """Size of a mask."""

    ml: float
    sides_mm: TripleMm  # sides of its box along the volume's axes
    background: float  # share of the volume's voxels outside the mask


@dataclass(frozen=True, eq=False)
class ClassMask:
    """One class of one case: a mask, kept in the box around it.

    Shapes:
        mask: (X', Y', Z') bool; it touches all six sides of the box.
        start: first voxel of the box in the volume.
    """

    name: str
    mask: Mask
    start: Triple

    @classmethod
    def cropped(cls, name: str, mask: Mask, start: Triple = (0, 0, 0)) -> ClassMask:
        """The class of a non-empty mask (X, Y, Z) whose first voxel is `start` in the volume."""
        box = bounding_box(mask)
        assert box is not None
        x, y, z = (int(side.start) + first for side, first in zip(box, start, strict=True))
        return cls(name, mask[box], (x, y, z))

    def extent(self, grid: Volume) -> Extent:
        """Its measures in a volume."""
        voxels = int(self.mask.sum())
        x, y, z = (float(n * mm) for n, mm in zip(self.mask.shape, grid.spacing_mm, strict=True))
        return Extent(
            ml=voxels * grid.voxel_ml,
            sides_mm=(x, y, z),
            background=1 - voxels / float(np.prod(grid.shape)),
        )

    def on(self, grid: Volume) -> Volume:
        """A volume of 0 and 1 with the grid and header of another."""
        array = np.zeros(grid.shape, np.uint8)
        array[tuple(slice(s, s + n) for s, n in zip(self.start, self.mask.shape, strict=True))] = (
            self.mask
        )
        return Volume(array, grid.affine, grid.header)


def without_islands(
    target: ClassMask, rules: CurationRules, voxel_ml: float = 1.0
) -> tuple[ClassMask, dict[str, Any]]:
    """The target with its largest 26-connected parts only, and the record of this step.

    Of equally large parts the first are kept. The record says whether islands were removed
    (``did``), the number of ``parts``, and number and volume of those ``beyond`` the largest ones.
    """
    labels, sizes = components(target.mask)
    order = np.argsort(-sizes, kind="stable")
    islands = order[rules.max_parts :]
    voxels = int(sizes[islands].sum())
    limit = rules.max_island_share
    is_debris = voxels > 0 and (limit is None or voxels <= limit * sizes.sum())
    record = {
        "did": "changed" if is_debris else "kept",
        "parts": len(sizes),
        "beyond": len(islands),
        "beyond_ml": voxels * voxel_ml,
    }
    if not is_debris:
        return target, record
    is_kept = np.zeros(1 + len(sizes), np.bool_)
    is_kept[order[: rules.max_parts] + 1] = True
    return ClassMask.cropped(target.name, is_kept[labels], target.start), record
