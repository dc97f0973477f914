"""Click protocols by name: `clickbench/1`, and published ones as their code runs them.

A published protocol that uses the truth beyond the clicks is marked as an oracle: users cannot
reach its scores. `ClickRules.differs` says what is not as it was published;
random clicks are drawn as published, but from other random numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage

from sammed3d_backbone.clickbench.cases import ClickTarget
from sammed3d_backbone.clickbench.protocol import ClickRules, ClickStep, Player, interact
from sammed3d_backbone.data.geometry import Geometry, nearest_ras
from sammed3d_backbone.data.regions import Mask
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.strategies import (
    Draws,
    Strategy,
    deep,
    joint_centre,
    largest_centre,
    uniform,
)

CROP_VOX = 128
CROP_SPACING_MM = (1.5, 1.5, 1.5)
CVPR25_DIFFERS = (
    "no box before the clicks, as for the challenge's cases without one; classes do not overwrite "
    "each other; no time limit"
)


def whole_volume(
    player: Player, target: ClickTarget, strategies: Sequence[Strategy], draws: Draws, steps: int
) -> Iterator[ClickStep]:
    """The model gets the volume as it is stored, and is scored there."""
    image, truth = target.image, target.truth
    return interact(player, image, truth, target.modality, strategies, draws, steps)


def label_crop(
    player: Player, target: ClickTarget, strategies: Sequence[Strategy], draws: Draws, steps: int
) -> Iterator[ClickStep]:
    """The model gets 128 voxels of 1.5 mm around the truth, and is scored in them."""
    geometry, truth = _around_label(target)
    if not truth.any():
        return iter(())
    crop = Volume(geometry.apply(target.image.array)[0].numpy(), geometry.affine)
    return interact(player, crop, truth, target.modality, strategies, draws, steps)


def label_crop_scored_outside(
    player: Player, target: ClickTarget, strategies: Sequence[Strategy], draws: Draws, steps: int
) -> Iterator[ClickStep]:
    """The model gets the same crop; its mask is brought back by nearest voxels and scored there.

    Outside the crop, the mask is empty.
    """
    geometry, _ = _around_label(target)
    for step in label_crop(player, target, strategies, draws, steps):
        classes = torch.from_numpy(np.stack([~step.mask, step.mask])).float()
        mask = geometry.invert_labels(classes, nearest=True).numpy() > 0
        yield replace(step, mask=mask, truth=target.truth, affine=target.image.affine)


def slice_by_slice(
    player: Player, target: ClickTarget, strategies: Sequence[Strategy], draws: Draws, steps: int
) -> Iterator[ClickStep]:
    """The model gets the axial slices that hold the truth, one by one, each with its own clicks.

    Step n is the stack of all slices after n clicks each; the other slices are empty.
    """
    image, truth = target.image, target.truth
    axes, _ = nearest_ras(image.affine)
    axial = axes[2]
    held = np.flatnonzero(truth.any(axis=tuple(a for a in range(3) if a != axial)))
    stacked = [
        ClickStep(np.zeros_like(truth), truth, image.affine, (), image.affine, (), ())
        for _ in range(steps)
    ]
    for index in held.tolist():
        one = tuple(slice(index, index + 1) if a == axial else slice(None) for a in range(3))
        affine = image.affine.copy()
        affine[:3, 3] += index * affine[:3, axial]
        own = draws.part("slice", index)
        volume = Volume(image.array[one], affine)
        played = interact(player, volume, truth[one], target.modality, strategies, own, steps)
        for number, step in enumerate(played):
            stacked[number].mask[one] = step.mask
            stacked[number] = _with_slice(stacked[number], step, axial, index)
    yield from stacked


RULES = {
    rules.name: rules
    for rules in (
        ClickRules(
            "clickbench/1",
            steps=10,
            tracks={"centre": (largest_centre,), "random": (uniform, largest_centre)},
            show=whole_volume,
            source="this package",
            min_voxels=27,
        ),
        ClickRules(
            "sammed3d-2023",
            steps=10,
            tracks={"deep": (deep, deep, uniform)},
            show=label_crop,
            source="SAM-Med3D validation.py at 84079e6",
            oracle="crop around the label, scored in that crop only, best of all clicks",
            published="best_dice",
            differs="errors are those of the mask, not of logits above 0.5",
        ),
        ClickRules(
            "sammed3d-main",
            steps=1,
            tracks={"random": (uniform,)},
            show=label_crop_scored_outside,
            source="SAM-Med3D utils/infer_utils.py at f3de1fa",
            oracle="crop around the label",
            published="class_mean_dice",
            differs="classes do not overwrite each other",
        ),
        ClickRules(
            "cvpr25",
            steps=5,
            tracks={"centre": (joint_centre,)},
            show=whole_volume,
            source="CVPR-MedSegFMCompetition CVPR25_iter_eval.py at 748e862",
            published="cvpr25",
            differs=CVPR25_DIFFERS,
        ),
        ClickRules(
            "cvpr25-xyz",
            steps=5,
            tracks={"centre": (joint_centre,)},
            show=whole_volume,
            source="as cvpr25, with the spacing of npz files read as x, y, z",
            published="cvpr25",
            differs=CVPR25_DIFFERS,
            spacing_is_xyz=True,
        ),
    )
}


def rules_of(name: str) -> ClickRules:
    """The rules of a protocol; ``slicewise-N`` for N clicks per slice.

    Raises:
        ValueError: If the name is unknown.
    """
    if name in RULES:
        return RULES[name]
    slicewise = re.fullmatch(r"slicewise-([1-9]\d*)", name)
    if slicewise:
        return ClickRules(
            name,
            steps=int(slicewise[1]),
            tracks={"random": (uniform,)},
            show=slice_by_slice,
            source="the 2-D models in SAM-Med3D validation.py at 84079e6",
            oracle="clicks in every slice that holds the object, all other slices known as empty, "
            "best of all clicks",
            published="best_dice",
            differs="whole slices at their own spacing instead of a crop at 1.5 mm",
        )
    raise ValueError(f"unknown protocol {name!r}; choose {', '.join(RULES)} or slicewise-N")


def _around_label(target: ClickTarget) -> tuple[Geometry, Mask]:
    """The crop around a target, and the truth in it, by nearest voxels as in the published code."""
    image = target.image
    whole = Geometry.plan(image.shape, image.affine, CROP_SPACING_MM)
    truth = ndimage.affine_transform(
        target.truth.view(np.uint8),
        np.linalg.inv(image.affine) @ whole.affine,
        output_shape=whole.resampled_shape,
        order=0,
        mode="nearest",
    )
    x, y, z = (
        (int(voxels.min()) + int(voxels.max()) + 1) // 2 - CROP_VOX // 2 if len(voxels) else 0
        for voxels in np.nonzero(truth)
    )
    geometry = whole.boxed((x, y, z), (CROP_VOX,) * 3)
    return geometry, geometry.to_box(torch.from_numpy(truth)[None])[0].numpy() > 0


def _with_slice(stack: ClickStep, step: ClickStep, axis: int, index: int) -> ClickStep:
    """The step of a stack with the clicks, failures and seconds of one more slice."""
    seconds = dict(stack.seconds)
    for part, value in step.seconds.items():
        seconds[part] = seconds.get(part, 0.0) + value
    clicks = []
    for click in step.clicks:
        i, j, k = (index if a == axis else v for a, v in enumerate(click.point_vox))
        clicks.append(replace(click, point_vox=(i, j, k)))
    return replace(
        stack,
        clicks=(*stack.clicks, *clicks),
        agreement=(*stack.agreement, *step.agreement),
        agreement_all=(*stack.agreement_all, *step.agreement_all),
        failure=stack.failure or step.failure,
        seconds=seconds,
    )
