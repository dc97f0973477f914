"""The loss that pretrains a segmentation decoder on label maps of many sources.

Where classes are annotated, Dice and cross-entropy over them. In every volume, also where labels
have no class (synthetic ones), the boundaries of the labels: per axis, whether a voxel and the next
one carry different labels.

Letters: B volumes, K classes beside the background, S voxels a side.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sammed3d_backbone.training.losses import partial_dice_ce

AXES = 3  # boundary maps, one per axis, behind the K + 1 maps of the classes


def decoder_loss(
    logits: Tensor, batch: Mapping[str, Tensor], *, foreground_weight: float, boundary_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and its two parts by name; a batch without classes has 0 for them.

    Args:
        logits: Classes with the background first, then boundaries.
        batch: ``classes``, ``known`` and ``labels`` of `object_crops.ObjectStream`.
        foreground_weight: See `partial_dice_ce`.
        boundary_weight: Weight of the boundaries; the classes have 1.

    Shapes:
        logits: (B, 1 + K + 3, S, S, S).
        returns: scalars.
    """
    known = batch["known"]
    in_class, edges = logits.float().split([1 + known.shape[1], AXES], dim=1)
    rows = known.any(1)
    class_loss = logits.new_zeros((), dtype=torch.float32)
    if rows.any():
        annotated = torch.cat([torch.ones_like(known[:, :1]), known], dim=1)
        class_loss = partial_dice_ce(
            in_class[rows],
            batch["classes"][rows].unsqueeze(1).float(),
            annotated[rows],
            foreground_weight=foreground_weight,
        )
        class_loss = class_loss * rows.float().mean()
    boundary = boundary_loss(edges, batch["labels"])
    loss = class_loss + boundary_weight * boundary
    return loss, {"class_loss": class_loss, "boundary_loss": boundary}


def boundary_loss(edges: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of boundaries, which weigh as much as all other pairs of voxels.

    Pairs of unlabelled voxels do not count, as an unlabelled boundary may lie between them.

    Shapes:
        edges: (B, 3, S, S, S), logits; map a tells voxels from their next along axis a.
        labels: (B, S, S, S) integers.
        returns: scalar.
    """
    losses = []
    for axis in range(AXES):
        size = labels.shape[1 + axis]
        here = labels.narrow(1 + axis, 0, size - 1)
        following = labels.narrow(1 + axis, 1, size - 1)
        logits = edges[:, axis].narrow(1 + axis, 0, size - 1)
        differs, counts = here != following, (here != 0) | (following != 0)
        wrong = F.binary_cross_entropy_with_logits(logits, differs.float(), reduction="none")
        for chosen in (differs, counts & ~differs):
            losses.append((wrong * chosen).sum() / chosen.sum().clamp(min=1))
    return torch.stack(losses).mean()
