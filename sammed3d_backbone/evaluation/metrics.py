"""Scores of one predicted mask or label volume against its reference.

What a structure scores that one of the two does not hold, the same for every metric:

=============  =====  =====  ========
held by        Dice   NSD    HD95
=============  =====  =====  ========
neither        NaN    NaN    NaN       nothing was asked and nothing was said
only one       0      0      infinity  missed, or invented
=============  =====  =====  ========
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial

import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from torch import Tensor

from sammed3d_backbone.data.geometry import TripleMm
from sammed3d_backbone.data.regions import Mask, bounding_box


def dice(prediction: Mask, label: Mask) -> float:
    """Overlap of two masks, 0 to 1; NaN if both are empty.

    Shapes:
        prediction: (X, Y, Z).
        label: (X, Y, Z).
    """
    voxels = prediction.sum() + label.sum()
    return float(2 * (prediction & label).sum() / voxels) if voxels else math.nan


def dice_per_class(
    prediction: Tensor, label: Tensor, classes: int, annotated: Tensor | None = None
) -> list[float]:
    """Dice of every class but background.

    A class that neither holds scores NaN (nothing was asked, nothing was said) and is left out of
    means; a class that only one of them holds scores 0. A class that was not looked for in this
    case scores NaN too.

    Shapes:
        prediction: (X, Y, Z) integers.
        label: (X, Y, Z) integers.
        annotated: (K,) bool, background included.

    Args:
        prediction: Predicted labels.
        label: Reference labels.
        classes: Number of classes K, background included.
        annotated: Classes that were looked for; None for all.
    """
    ours, theirs = (x.flatten().int() for x in (prediction, label))
    voxels = (ours, theirs, ours[ours == theirs])
    mine, its, both = (torch.bincount(x, minlength=classes)[:classes] for x in voxels)
    dice = 2 * both / (mine + its)  # of what neither holds: 0 / 0, NaN
    if annotated is not None:
        dice[~annotated] = math.nan
    scores: list[float] = dice[1:].tolist()
    return scores


def surface_dice(prediction: Mask, label: Mask, spacing_mm: TripleMm, tolerance_mm: float) -> float:
    """Normalised surface Dice: the share of both surfaces within a tolerance of the other one.

    Surface elements and their areas are those of DeepMind's `surface-distance`, which most
    challenges score with: they lie between voxels, and distances go from centre to centre.

    Shapes:
        prediction: (X, Y, Z).
        label: (X, Y, Z).

    Args:
        prediction: Predicted mask.
        label: Reference mask.
        spacing_mm: Of the voxels, along X, Y, Z.
        tolerance_mm: Distance that still counts as right.
    """
    score = partial(compute_surface_dice, class_thresholds=[tolerance_mm], use_subvoxels=True)
    return _of_pair(score, prediction, label, spacing_mm, one_empty=0.0)


def hausdorff95_mm(prediction: Mask, label: Mask, spacing_mm: TripleMm) -> float:
    """The 95th percentile of the distances between two surfaces, the larger of both directions.

    Surfaces are the outermost voxels of the masks; distances go from centre to centre.

    Shapes:
        prediction: (X, Y, Z).
        label: (X, Y, Z).

    Args:
        prediction: Predicted mask.
        label: Reference mask.
        spacing_mm: Of the voxels, along X, Y, Z.
    """
    score = partial(compute_hausdorff_distance, percentile=95)
    return _of_pair(score, prediction, label, spacing_mm, one_empty=math.inf)


def mean_of_known(scores: list[float]) -> float:
    """Mean of the scores that are numbers; NaN if there is none."""
    known = [score for score in scores if not math.isnan(score)]
    return sum(known) / len(known) if known else math.nan


def _of_pair(
    score: Callable[..., Tensor],
    prediction: Mask,
    label: Mask,
    spacing_mm: TripleMm,
    *,
    one_empty: float,
) -> float:
    """MONAI's score of two masks, computed on the box that both fill.

    MONAI crops as well, but only after several passes over the whole grid.
    """
    if prediction.shape != label.shape:
        raise ValueError(
            f"the prediction has {prediction.shape} voxels, the reference {label.shape}; bring "
            "both onto one grid"
        )
    if not (prediction.any() and label.any()):
        return one_empty if prediction.any() or label.any() else math.nan
    box = bounding_box(prediction | label)
    ours, theirs = (torch.from_numpy(mask[box])[None, None] for mask in (prediction, label))
    spacing = [float(value) for value in spacing_mm]
    with warnings.catch_warnings():
        # MONAI passes itself an argument that it has deprecated.
        warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
        return float(score(ours, theirs, include_background=True, spacing=spacing))
