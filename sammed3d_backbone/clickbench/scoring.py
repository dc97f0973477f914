"""The scores of one prediction, as in a line of the result file.

===============  =================================================================================
dice             overlap, 0 to 1
nsd_2mm          share of both surfaces that lie within 2 mm of each other, 0 to 1
nsd              the same within `tolerance_mm`, the larger of 2 mm and the largest spacing
hd95_mm          95th percentile of the distances between the surfaces
volume_error     voxels of the mask over those of the truth, minus 1
slices           along R, A and S: how alike neighbouring slices of the mask are (their mean Dice),
                 minus the same of the truth; far below 0 where a mask flickers from slice to slice
agreement        share of this step's clicks that the mask agrees with
agreement_all    share of all clicks so far that it agrees with
===============  =================================================================================

An empty mask, and a failure counts as one, has Dice and NSD 0 and the volume's diagonal as HD95.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np

from sammed3d_backbone.clickbench.protocol import ClickStep
from sammed3d_backbone.data.geometry import nearest_ras
from sammed3d_backbone.data.regions import Mask
from sammed3d_backbone.evaluation.metrics import dice, hausdorff95_mm, surface_dice

TOLERANCE_MM = 2.0
DIGITS = 6  # so that a file does not depend on the last bit


def score(step: ClickStep) -> dict[str, Any]:
    """The scores of a step, ready for JSON: no NaN, six digits."""
    mask, truth, spacing_mm = step.mask, step.truth, step.spacing_mm
    tolerance_mm = max(TOLERANCE_MM, *spacing_mm)
    if mask.any():
        nsd_2mm = surface_dice(mask, truth, spacing_mm, TOLERANCE_MM)
        is_wider = tolerance_mm > TOLERANCE_MM
        nsd = surface_dice(mask, truth, spacing_mm, tolerance_mm) if is_wider else nsd_2mm
        hd95_mm = hausdorff95_mm(mask, truth, spacing_mm)
    else:
        nsd_2mm = nsd = 0.0
        hd95_mm = math.hypot(*(n * s for n, s in zip(mask.shape, spacing_mm, strict=True)))
    axes, _ = nearest_ras(step.affine)
    alike = [slice_likeness(mask, axis) - slice_likeness(truth, axis) for axis in axes]
    figures = {
        "dice": dice(mask, truth),
        "nsd_2mm": nsd_2mm,
        "nsd": nsd,
        "tolerance_mm": tolerance_mm,
        "hd95_mm": hd95_mm,
        "volume_error": float(mask.sum() / truth.sum() - 1),
        "agreement": _share(step.agreement),
        "agreement_all": _share(step.agreement_all),
    }
    return {
        **{name: plain(value) for name, value in figures.items()},
        "slices": [plain(value) for value in alike],
        "mask_sha256": hashlib.sha256(np.packbits(mask).tobytes()).hexdigest(),
    }


def slice_likeness(mask: Mask, axis: int) -> float:
    """Mean Dice of neighbouring slices along an axis; pairs of empty slices do not count.

    NaN where there is no pair.

    Shapes:
        mask: (X, Y, Z).
    """
    others = tuple(a for a in range(3) if a != axis)
    slices = np.moveaxis(mask, axis, 0)
    sizes = mask.sum(axis=others)
    shared = (slices[1:] & slices[:-1]).sum(axis=(1, 2))
    both = sizes[1:] + sizes[:-1]
    held = both > 0
    return float((2 * shared[held] / both[held]).mean()) if held.any() else math.nan


def plain(value: float) -> float | None:
    """Six digits; None for NaN and infinity, which JSON does not have."""
    return round(value, DIGITS) if math.isfinite(value) else None


def _share(agreed: tuple[bool, ...]) -> float:
    return sum(agreed) / len(agreed) if agreed else math.nan
