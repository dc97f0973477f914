"""Semantic segmentation as an auxiliary loss: a linear layer on the finer high-resolution map.

Input: an encoding with high-resolution maps, label maps, and the classes that are annotated in each
volume. A click trains one object at a time, this loss all voxels at once, on the same pass of the
encoder. Letters:
B volumes, K classes beside the background, S voxels a side, s cells a side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sammed3d_backbone.models.sam import Encoding
from sammed3d_backbone.pretraining.click_cells import shares_of_cells

FOREGROUND_WEIGHT = 5.0  # weight of a labelled cell in the cross-entropy; background has 1


class DenseLabels(nn.Module):
    """Dice and cross-entropy over the annotated classes; others count as background.

    Args:
        width: Channels of the finer map.
        classes: Number K.

    Shapes:
        encoding: of B volumes.
        classes: (B, S, S, S) integers, 0 for the background.
        known: (B, K) bool; a volume without any counts as 0.
        returns: scalars, the loss and the mean soft Dice of the known classes.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.to_classes = nn.Linear(width, 1 + classes)

    def forward(self, encoding: Encoding, classes: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and soft Dice."""
        fine = encoding.maps[1].movedim(1, -1)  # (B, s, s, s, C)
        x, y, z = fine.shape[1:4]
        log_share = self.to_classes(fine).float().log_softmax(-1)
        numbers = torch.arange(1, 1 + self.classes, device=classes.device)
        is_class = classes.unsqueeze(1) == numbers.view(-1, 1, 1, 1)  # (B, K, S, S, S)
        target = shares_of_cells(is_class.flatten(0, 1), (x, y, z)).unflatten(0, (-1, self.classes))
        mask = known[:, :, None, None, None]  # (B, K, 1, 1, 1)
        target = target * mask
        is_rest = torch.cat([torch.ones_like(known[:, :1]), ~known], dim=1)  # (B, 1 + K)
        rest = log_share.masked_fill(~is_rest[:, None, None, None], -torch.inf).logsumexp(-1)
        log_class = log_share[..., 1:].movedim(-1, 1)  # (B, K, s, s, s)
        wrong = -(FOREGROUND_WEIGHT * target * log_class).sum(1) - (1 - target.sum(1)) * rest
        last = (-3, -2, -1)
        share = log_class.exp()
        overlap = (share * target).sum(last)
        dice = (2 * overlap + 1) / (share.sum(last) + target.sum(last) + 1)  # (B, K)
        counted = known.sum(1).clamp(min=1)
        soft_dice = (dice * known).sum(1) / counted
        has_any = known.any(1)
        loss = (wrong.mean(last) + 1 - soft_dice) * has_any
        return loss.mean(), soft_dice.detach().sum() / has_any.sum().clamp(min=1)
