"""Scores of a predicted mask or label volume against its reference.

To add a metric, add an entry to `METRICS`: tables, summaries, reports and model cards follow.

Scores of a structure that is absent from the prediction or from the reference:

=============  =====  =====  ========
present in     Dice   NSD    HD95
=============  =====  =====  ========
neither        NaN    NaN    NaN
only one       0      0      infinity
=============  =====  =====  ========
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
    prediction: Tensor,
    label: Tensor,
    classes: int,
    annotated: Tensor | None = None,
    *,
    targets: Iterable[Sequence[int]] | None = None,
) -> list[float]:
    """Dice of every class but background, or of every target.

    A class that neither contains scores NaN and is left out of means; a class that only one of
    them contains scores 0. A class that is not annotated in this case scores NaN too. Voxels whose
    reference is K or more are left out.

    Shapes:
        prediction: (X, Y, Z) integers.
        label: (X, Y, Z) integers.
        annotated: (K,) bool, background included.

    Args:
        prediction: Predicted labels.
        label: Reference labels.
        classes: Number of classes K, background included.
        annotated: Classes that are annotated in this case; None for all.
        targets: Values of each target, see `Dataset`; None for all classes.
    """
    ours, theirs = (x.flatten().int() for x in (prediction, label))
    ours, theirs = ours[theirs < classes], theirs[theirs < classes]
    # Row: in the prediction, column: in the reference.
    counts = torch.bincount(ours * classes + theirs, minlength=classes**2).reshape(classes, classes)
    groups = [[value] for value in range(1, classes)]
    if targets is not None:
        groups = [[*values] for values in targets]
    both = torch.stack([counts[values][:, values].sum() for values in groups])
    either = torch.stack([counts[values].sum() + counts[:, values].sum() for values in groups])
    found = 2 * both / either  # 0 / 0 = NaN where neither contains the class
    if annotated is not None:
        found[[not annotated[values].all() for values in groups]] = math.nan
    scores: list[float] = found.tolist()
    return scores


def surface_dice(prediction: Mask, label: Mask, spacing_mm: TripleMm, tolerance_mm: float) -> float:
    """Normalised surface Dice: the share of both surfaces within a tolerance of the other one.

    Surface elements and their areas are those of DeepMind's `surface-distance`, which most
    challenges score with: they lie between voxels, and distances go from centre to centre.

    Shapes:
        prediction: (X, Y, Z).
        label: (X, Y, Z).
    """
    score = partial(compute_surface_dice, class_thresholds=[tolerance_mm], use_subvoxels=True)
    return _of_pair(score, prediction, label, spacing_mm, one_empty=0.0)


def hausdorff95_mm(prediction: Mask, label: Mask, spacing_mm: TripleMm) -> float:
    """The 95th percentile of the distances between two surfaces, the larger of both directions.

    Surfaces are the outermost voxels of the masks; distances go from centre to centre.

    Shapes:
        prediction: (X, Y, Z).
        label: (X, Y, Z).
    """
    score = partial(compute_hausdorff_distance, percentile=95)
    return _of_pair(score, prediction, label, spacing_mm, one_empty=math.inf)


def mean_of_known(scores: list[float]) -> float:
    """Mean of the scores that are numbers; NaN if there is none."""
    known = [score for score in scores if not math.isnan(score)]
    return sum(known) / len(known) if known else math.nan


@dataclass(frozen=True)
class Metric:
    """A score of one class in one case, and how tables show it."""

    name: str  # key in scores.csv and scores.json
    title: str
    meaning: str  # for legends; {tolerance} is the tolerance in mm
    function: Callable[
        [Mask, Mask, TripleMm, float], float
    ]  # prediction, label, spacing, tolerance
    higher_is_better: bool = True
    unit: str = ""
    form: str = ".3f"

    @property
    def head(self) -> str:
        """Title and unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


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


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "dice",
            "Dice",
            "overlap of the volumes, 0 to 1",
            lambda prediction, label, *_: dice(prediction, label),
        ),
        Metric(
            "nsd",
            "NSD",
            "share of both surfaces that lies within {tolerance:g} mm of the other one, 0 to 1",
            surface_dice,
        ),
        Metric(
            "hd95_mm",
            "HD95",
            "95th percentile of the distances between the surfaces, in mm, smaller is better",
            lambda prediction, label, spacing_mm, _: hausdorff95_mm(prediction, label, spacing_mm),
            higher_is_better=False,
            unit="mm",
            form=".2f",
        ),
    )
}
