"""A scan in which intensities are places, and networks' fields of view on it."""

from dataclasses import replace

import numpy as np

from sammed3d_backbone.data.preprocessing import SAM_MED3D
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.pretraining.views import CropPlace, FieldOfView, RawScan

SIDE = 16


def field(side_vox, spacing_mm, statistics="volume", tokens=None):
    """The view of a network with so many voxels a side."""
    preprocessing = replace(
        SAM_MED3D, spacing_mm=(spacing_mm,) * 3, statistics=statistics, crop_vox=(side_vox,) * 3
    )
    tokens = tokens or side_vox // 8
    return FieldOfView(side_vox, tokens, preprocessing.spacing_mm, preprocessing)


STUDENT = field(SIDE, 1.0)
PLACE = CropPlace((20.0, 15.0, 18.0), (1.0, 1.0, 1.0))


def _ramp():
    """A scan whose intensity is a place in mm, on a grid of its own; another array order."""
    x, y, z = np.meshgrid(*(np.arange(n) for n in (40, 30, 36)), indexing="ij")
    affine = np.diag([-1.0, 2.0, 1.0, 1.0])
    return RawScan.of(Volume((100.0 - x + 2 * y + z).astype(np.float32), affine))


RAMP = _ramp()
