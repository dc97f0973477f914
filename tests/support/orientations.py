"""An asymmetric network, and volumes in every orientation that a file may have."""

import itertools

import numpy as np
import torch
from standin import StandIn

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive import Predictor

OPPOSITE = dict(zip("RLAPSI", "LRPAIS", strict=True))
ORIENTATIONS = [
    "".join(code if sign else OPPOSITE[code] for code, sign in zip(codes, signs, strict=True))
    for codes in itertools.permutations("RAS")
    for signs in itertools.product((True, False), repeat=3)
]


class Lopsided(StandIn):
    """Finds the bright part at a click, but only half of it towards left, and so on.

    A volume that arrives mirrored or permuted gets another mask.
    """

    def predict_masks(self, embedding, points=None, mask_logits=None):
        """The masks of `StandIn` without what lies beyond a plane that is oblique to all axes."""
        logits, rating = super().predict_masks(embedding, points, mask_logits)
        x, y, z = np.ogrid[:32, :32, :32]
        beyond = torch.from_numpy(0.5 * x + 0.3 * y - 0.2 * z > 10)
        return torch.where(beyond[None, None], -8.0, logits), rating


def oriented(volume, codes, point):
    """A RAS volume as a file with axes towards `codes` would hold it, and a voxel in it."""
    order = ["RLAPSI".index(code) // 2 for code in codes]
    backward = ["RLAPSI".index(code) % 2 == 1 for code in codes]
    array = volume.array.transpose(order)
    array = array[tuple(slice(None, None, -1 if b else 1) for b in backward)]
    affine = volume.affine[:, [*order, 3]].copy()
    moved = [point[axis] for axis in order]
    for axis, flipped in enumerate(backward):
        if flipped:
            last = array.shape[axis] - 1
            affine[:, 3] += affine[:, axis] * last
            affine[:, axis] *= -1
            moved[axis] = last - moved[axis]
    return Volume(np.ascontiguousarray(array), affine), tuple(moved)


def as_sent(volume):
    """A volume as viewers send it: one channel, axes k, j, i, and the spacing along them."""
    properties = {"spacing": list(reversed(volume.spacing_mm))}
    return np.ascontiguousarray(volume.array.T[None]), properties


def expected(model, volume, *clicks, start=None, **settings):
    """The predictor's own mask after clicks (voxel, positive), on the volume's grid."""
    predictor = Predictor(model, enforce_clicks=True, **settings)
    predictor.set_volume(volume)
    if start is not None:
        predictor.mask_prompt(start)
    for voxel, positive in clicks:
        predictor.click(voxel, positive)
    return predictor.predict().mask
