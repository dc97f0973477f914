"""The loss of semantic segmentation for partially annotated cases.

In a case where a class is not annotated, its voxels are labelled as background. Its probability is
therefore added to that of the background, and the loss is Dice and cross-entropy over the annotated
classes.

Source: the marginal loss of Shi et al., Marginal loss and exclusion loss for partially supervised
multi-organ segmentation, Medical Image Analysis 70:101979, 2021.
"""

from __future__ import annotations

import torch
from monai.losses import DiceLoss
from torch import Tensor
from torch.nn.functional import cross_entropy


def partial_dice_ce(
    logits: Tensor, label: Tensor, annotated: Tensor, *, foreground_weight: float = 1.0
) -> Tensor:
    """Dice and cross-entropy over the annotated classes of each case, then the mean over cases.

    Cases have equal weight, whatever is annotated in the others of their batch, so the loss does
    not depend on the distribution of cases over batches and processes.

    Args:
        foreground_weight: Weight of a labelled voxel in the cross-entropy; background has 1.
            It helps small structures whose probability is near 0, where both parts of the loss have
            nearly no gradient: Dice because softmax is flat there, cross-entropy because the
            structures are one voxel in a thousand.

    Shapes:
        logits: (B, K, X, Y, Z), class 0 is background.
        label: (B, 1, X, Y, Z) integers.
        annotated: (B, K) bool; class 0 always is.
        returns: scalar.
    """
    dice_loss = DiceLoss(softmax=True, to_onehot_y=True)
    losses = []
    for case in zip(logits, label, annotated, strict=True):
        known, target = merged(*case)
        weight = known.new_full((known.shape[1],), foreground_weight)
        weight[0] = 1
        losses.append(dice_loss(known, target) + cross_entropy(known, target[:, 0], weight=weight))
    return torch.stack(losses).mean()


def merged(logits: Tensor, label: Tensor, annotated: Tensor) -> tuple[Tensor, Tensor]:
    """One case's logits and label over its annotated classes, numbered without gaps.

    The background's logit becomes the log-sum-exp of its own and those of the unknown classes,
    whose softmax is the sum of their probabilities.

    Shapes:
        logits: (K, X, Y, Z).
        label: (1, X, Y, Z).
        annotated: (K,) bool.
        returns: (1, A, X, Y, Z) and (1, 1, X, Y, Z), A being the number of annotated classes.
    """
    known = [k for k, is_known in enumerate(annotated.tolist()) if is_known and k]
    rest = [k for k in range(len(annotated)) if k not in known]
    background = logits[rest].logsumexp(0, keepdim=True)
    number = label.new_zeros(len(annotated), dtype=torch.long)  # among the known classes
    number[known] = torch.arange(1, 1 + len(known), device=number.device)
    return torch.cat([background, logits[known]])[None], number[label.long()][None]
