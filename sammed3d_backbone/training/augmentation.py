"""Random changes of a crop that keep the meaning of its labels."""

import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import Literal

from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
    RandSimulateLowResolutiond,
)

Kind = Literal["rotation", "scaling", "noise", "blur", "contrast", "low_resolution", "gamma"]


def augmentation(flip_axes: Sequence[int], strong: Collection[Kind] = ()) -> Compose:
    """MONAI's transforms of `image` and `label`: flips, affine, noise, blur, intensity.

    Source: the strong kinds have the ranges of nnU-Net's `nnUNetTrainer.get_training_transforms`.

    Args:
        flip_axes: Axes along which no class becomes another when it is mirrored.
        strong: What is done as strongly as in nnU-Net, the last three instead of nothing or in
            addition; brightness is as strong in any case.
    """
    both, image = ["image", "label"], "image"
    angle = math.radians(30 if "rotation" in strong else 15)
    zoom = (-0.3, 0.4) if "scaling" in strong else (-0.15, 0.15)
    likely, sigma = (0.2, (0.5, 1.0)) if "blur" in strong else (0.15, (0.3, 0.9))
    change = partial(RandAdjustContrastd, image, gamma=(0.7, 1.5), retain_stats="gamma" in strong)
    further = {
        "contrast": RandScaleIntensityFixedMeand(image, 0.25, preserve_range=True, prob=0.15),
        "low_resolution": RandSimulateLowResolutiond(image, prob=0.25, zoom_range=(0.5, 1.0)),
        "gamma": change(prob=0.1, invert_image=True),
    }
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
            RandGaussianNoised(image, prob=0.15, std=math.sqrt(0.1) if "noise" in strong else 0.1),
            RandGaussianSmoothd(image, prob=likely, sigma_x=sigma, sigma_y=sigma, sigma_z=sigma),
            RandScaleIntensityd(image, prob=0.3, factors=0.25),
            change(prob=0.3),
            *(transform for kind, transform in further.items() if kind in strong),
        ]
    )
