"""What the predictor gives back: one object's mask on the caller's grid, and how it came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive.logit_field import Field
from sammed3d_backbone.inference.interactive.prompts import Click

BALL_MM = 3.0  # around a click that the mask contradicts


@dataclass(frozen=True, eq=False)
class Prediction:
    """One object's mask.

    Args:
        mask: What was found.
        source: The volume that was segmented, for its grid.
        clicks: On this object.
        clicks_agreed: Clicks with which the network's own mask agreed.
        windows: In how many windows the object was looked for.
        predicted_dice: The Dice that the network expects of its own mask in the window around the
            newest click; None where that lies in no window of the object. It means something where
            training taught it, which that of the released weights did not.
        notes: What the reader has to know before believing it.
        seconds: Since the last prediction: "image" (resampling, normalisation), "encode",
            "decode" and "mask" (the way back to the volume's grid).
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
    seconds: Mapping[str, float]
    logits: Field = field(repr=False)

    @property
    def volume(self) -> Volume:
        """The mask as a volume of 0 and 1, with the affine of the input bit for bit."""
        return Volume(self.mask.astype(np.uint8), self.source.affine, self.source.header)

    def probs(self) -> NDArray[np.float32]:
        """The network's probability per voxel, (X, Y, Z); 0 where it has not looked.

        Clicks that were enforced change the mask and not the probabilities.
        """
        return self.logits.probs()


def agreeing(mask: NDArray[np.bool_], clicks: Sequence[Click]) -> int:
    """The number of clicks with which a mask agrees."""
    return sum(bool(mask[click.point_vox]) == click.positive for click in clicks)


def honour(mask: NDArray[np.bool_], clicks: Sequence[Click], volume: Volume) -> None:
    """Puts every positive click inside the mask and every negative one outside, in place.

    A click that the mask contradicts is given the ball around it, short of half the way to the
    nearest click of the other sign; the rest of the mask stays as it is.

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
