"""How far an answer can be trusted: does it stand when the clicks fall a little elsewhere?

The network's own quality output (`Prediction.predicted_dice`) got no training signal in the
released weights, so it is not used here. Instead the same object is segmented again with every
click moved by a few millimetres, as a second person would click; only the decoder runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sammed3d_backbone.data.geometry import Triple
from sammed3d_backbone.data.volume import Volume


@dataclass(frozen=True, eq=False)
class Quality:
    """Agreement of an answer with those to slightly different clicks.

    Args:
        agreement: Mean Dice with them: 1 is an answer that does not depend on the exact click.
        worst: Lowest Dice with one of them.
        answers: Number of answers, the original included.
        votes: How many of them hold a voxel for part of the object.

    Shapes:
        votes: (X, Y, Z) uint8, on the volume's own grid.
    """

    agreement: float
    worst: float
    answers: int
    votes: NDArray[np.uint8] = field(repr=False)

    def uncertainty(self) -> NDArray[np.float32]:
        """Per voxel, 0 where all answers are one to 1 where they are divided, (X, Y, Z)."""
        divided: NDArray[np.float32] = 1 - np.abs(
            2 * self.votes.astype(np.float32) / self.answers - 1
        )
        return divided


def compare(mask: NDArray[np.bool_], others: Sequence[NDArray[np.bool_]]) -> Quality:
    """The quality of a mask from those of moved clicks."""
    votes = mask.astype(np.uint8)
    scores = []
    for other in others:
        votes += other
        total = int(mask.sum()) + int(other.sum())
        scores.append(2 * int((mask & other).sum()) / total if total else 1.0)
    return Quality(float(np.mean(scores)), min(scores), 1 + len(others), votes)


def voxel_near(
    point_vox: Triple, volume: Volume, radius_mm: float, rng: np.random.Generator
) -> Triple:
    """A random voxel of the ball around a voxel, each part of it as likely, inside the volume."""
    direction = rng.normal(size=3)
    offset_mm = direction / np.linalg.norm(direction) * radius_mm * rng.random() ** (1 / 3)
    offset = np.linalg.solve(volume.affine[:3, :3], offset_mm)
    i, j, k = np.clip(np.rint(point_vox + offset), 0, np.array(volume.shape) - 1).astype(int)
    return int(i), int(j), int(k)
