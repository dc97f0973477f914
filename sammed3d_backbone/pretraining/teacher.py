"""The answers of a frozen promptable network on crops of scans, as targets for a student.

`answer_crop` cuts a crop for both networks, encodes the teacher's, clicks it at random places in
the body and keeps the masks that are worth learning.

Letters: S voxels a side of the student's crop, (x, y, z) its tokens, s = 4 x its cells a side, K
masks, T channels of the teacher's embedding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sammed3d_backbone.models.sam import Encoding, Sam3D
from sammed3d_backbone.pretraining.views import (
    CropPlace,
    FieldOfView,
    RawScan,
    above_air,
    translated,
)

LARGEST_SHARE = 0.5  # of a crop that a mask may fill
MARGIN = 1.0  # logits between which a stable mask hardly changes
OUTSIDE = -10.0  # logit where the teacher sees nothing


class Answer(NamedTuple):
    """What is stored of a crop, on the student's grids.

    Shapes:
        image: (S, S, S) float16, normalised.
        labels: (S, S, S) uint8 or int16, 0 for no object.
        embedding: (T, x, y, z) float16, the teacher's.
        logits: (K, s, s, s) float16, its masks.
        points: (K, 3) int16, the click of each mask, in voxels of the image.
    """

    image: Tensor
    labels: Tensor
    embedding: Tensor
    logits: Tensor
    points: Tensor


@dataclass(frozen=True)
class Teacher:
    """A frozen network, and what of its answers is kept.

    Args:
        network: The teacher, in evaluation mode.
        field: Its input.
        clicks: Number of clicks on a crop, each for a mask of its own.
        stability: Least overlap of a mask at a logit of `MARGIN` with that at minus `MARGIN`, as in
            SAM's automatic mask generator; less is not confident.
        smallest_vox: Smallest size of a mask in voxels of the student.
        precision: Makes the context in which the encoder runs; by default float32.
    """

    network: Sam3D
    field: FieldOfView
    clicks: int
    stability: float
    smallest_vox: int
    precision: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext


@torch.no_grad()
def answer_crop(
    rng: np.random.Generator,
    scan: RawScan,
    place: CropPlace,
    student: FieldOfView,
    teacher: Teacher,
) -> Answer:
    """Clicks the teacher at random places of the body, and keeps the masks that can be learned.

    Args:
        rng: Draws the places.
        scan: The scan.
        place: The crop.
        student: Input of the student.
        teacher: The teacher.
    """
    raw, inside = scan.cut(place, student)
    image = scan.normalise(raw, student.preprocessing)
    body = inside & above_air(image) & teacher.field.covers(student, student.side_vox)
    found = body.nonzero()
    number = teacher.clicks if len(found) else 0
    chosen = rng.integers(max(1, len(found)), size=number)
    points = found[chosen].reshape(-1, 3)  # (K, 3)
    embedding, logits = _answers(scan, place, student, teacher, points)
    logits = logits.half()
    kept = _worth_learning(logits, points, student, teacher)
    return Answer(
        image.half(),
        scan.cut_labels(place, student),
        embedding.half(),
        logits[kept],
        points[kept].to(torch.int16),
    )


def _answers(
    scan: RawScan,
    place: CropPlace,
    student: FieldOfView,
    teacher: Teacher,
    points: Tensor,
) -> tuple[Tensor, Tensor]:
    """The teacher's embedding and logits on the student's tokens and cells.

    Shapes:
        points: (K, 3), voxels of the student.
        returns: (T, x, y, z) and (K, s, s, s).
    """
    network, field = teacher.network, teacher.field
    device = next(network.parameters()).device
    raw, _ = scan.cut(place, field)
    image = scan.normalise(raw, field.preprocessing)
    with teacher.precision():
        encoding = network.encode(image[None, None].to(device))
    encoding = Encoding(encoding.embedding.float(), tuple(m.float() for m in encoding.maps))
    embedding = field.resample(encoding.embedding[0].cpu(), student, student.tokens)
    if not len(points):
        return embedding, torch.zeros(0, *(student.cells,) * 3)
    clicks = (
        translated(points, student, field).unsqueeze(1).to(device),
        torch.ones(len(points), 1, dtype=torch.long, device=device),
    )
    logits = network.decode(encoding, clicks)[:, 0].float().cpu()
    logits = field.resample(logits, student, student.cells)
    return embedding, logits.masked_fill(~field.covers(student, student.cells), OUTSIDE)


def _worth_learning(
    logits: Tensor, points: Tensor, student: FieldOfView, teacher: Teacher
) -> Tensor:
    """Which masks hold their click, are confident, and neither tiny, cut off nor the whole crop.

    Shapes:
        logits: (K, s, s, s).
        points: (K, 3).
        returns: (K,) bool.
    """
    masks = masks_of(logits, student.side_vox)
    size = masks.flatten(1).sum(1)
    x, y, z = points.unbind(1)
    holds = masks[torch.arange(len(points)), x, y, z]
    sure, possible = ((logits > limit).flatten(1).sum(1) for limit in (MARGIN, -MARGIN))
    is_stable = sure >= teacher.stability * possible.clamp(min=1)
    is_whole = size > LARGEST_SHARE * student.side_vox**3
    # Where the teacher's view ends within the student's, a mask at the border is cut off.
    covered = teacher.field.covers(student, student.cells)
    outside = F.max_pool3d((~covered).float()[None, None], 3, 1, 1)[0, 0] > 0
    is_cut = ((logits > 0) & outside).flatten(1).any(1)
    return holds & is_stable & ~is_whole & ~is_cut & (size >= teacher.smallest_vox)


def masks_of(logits: Tensor, side_vox: int) -> Tensor:
    """Masks on the student's voxels, (K, s, s, s) -> (K, S, S, S) bool."""
    if not len(logits):
        return torch.zeros(0, *(side_vox,) * 3, dtype=torch.bool)
    size = (side_vox,) * 3
    whole = F.interpolate(logits.float()[None], size=size, mode="trilinear", align_corners=False)
    return whole[0] > 0
