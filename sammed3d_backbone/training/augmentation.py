"""Random changes of a crop that keep the meaning of its labels."""

import math
from collections.abc import Sequence

from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
)


def augmentation(flip_axes: Sequence[int]) -> Compose:
    """MONAI's transforms of `image` and `label`: flips, affine, noise, blur, intensity.

    Args:
        flip_axes: Axes along which no class becomes another when it is mirrored.
    """
    both = ["image", "label"]
    angle, zoom = math.radians(15), 0.15
    return Compose(
        [
            *(RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in flip_axes),
            RandAffined(
                both,
                prob=0.5,
                rotate_range=(angle, angle, angle),
                scale_range=(zoom, zoom, zoom),
                mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
            RandGaussianNoised("image", prob=0.15, std=0.1),
            RandGaussianSmoothd(
                "image", prob=0.15, sigma_x=(0.3, 0.9), sigma_y=(0.3, 0.9), sigma_z=(0.3, 0.9)
            ),
            RandScaleIntensityd("image", prob=0.3, factors=0.25),
            RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
        ]
    )
