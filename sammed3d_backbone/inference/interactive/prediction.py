"""The result of the predictor: one object's mask on the volume's own grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive.logit_field import LogitField
from sammed3d_backbone.inference.interactive.prompts import ClickPrompt

BALL_MM = 3.0  # radius around a click that the mask contradicts


@dataclass(frozen=True, eq=False)
class Prediction:
    """One object's mask.

    Args:
        mask: The mask.
        source: The segmented volume.
        clicks: Number of clicks on this object.
        clicks_agreed: Number of clicks with which the network's own mask agrees.
        windows: Number of windows in which the object was segmented.
        predicted_dice: Dice to expect, from the confidence of the network's own mask, the number of
            clicks and the calibration in the record of the weights; None without a calibration
            (the released weights have none).
        notes: Remarks on volume, weights and clicks that concern the trust in the mask.
        logits: The network's logits, for `probs`.

    Shapes:
        mask: (X, Y, Z) bool, on the volume's own grid.
    """

    mask: NDArray[np.bool_] = field(repr=False)
    source: Volume = field(repr=False)
    clicks: int
    clicks_agreed: int
    windows: int
    predicted_dice: float | None
    notes: tuple[str, ...]
    logits: LogitField = field(repr=False)

    @property
    def volume(self) -> Volume:
        """The mask as a volume of 0 and 1 with exactly the affine of the input."""
        return Volume(self.mask.astype(np.uint8), self.source.affine, self.source.header)

    def probs(self) -> NDArray[np.float32]:
        """The network's probability per voxel, (X, Y, Z); 0 outside the windows.

        Enforced clicks change the mask and not the probabilities.
        """
        return self.logits.probs()


def enforce_clicks(mask: NDArray[np.bool_], clicks: Sequence[ClickPrompt], volume: Volume) -> None:
    """Changes a mask so that it contains every positive click and no negative one, in place.

    Around a click that the mask contradicts, a ball is added or removed; it ends before half of the
    distance to the nearest click of the other sign.

    Shapes:
        mask: (X, Y, Z), on the volume's own grid.
    """
    axes_mm = volume.affine[:3, :3]
    wrong = [click for click in clicks if bool(mask[click.point_vox]) != click.positive]
    for click in wrong:
        centre = np.array(click.point_vox)
        others = [c.point_vox for c in clicks if c.positive != click.positive]
        gaps_mm = [float(np.linalg.norm(axes_mm @ (np.array(o) - centre))) for o in others]
        radius_mm = min([BALL_MM, *(gap / 2.001 for gap in gaps_mm)])
        # How far the ball reaches along each voxel axis, whatever the axes' angles.
        reach = np.floor(radius_mm * np.linalg.norm(np.linalg.inv(axes_mm), axis=1)).astype(int)
        low = np.maximum(centre - reach, 0)
        high = np.minimum(centre + reach + 1, mask.shape)
        offsets = np.stack(np.meshgrid(*map(np.arange, low - centre, high - centre), indexing="ij"))
        inside = np.linalg.norm(np.tensordot(axes_mm, offsets, 1), axis=0) <= radius_mm
        region = tuple(map(slice, low, high))
        mask[region] = np.where(inside, click.positive, mask[region])
