"""The loss of semantic segmentation for partially annotated cases, and for overlapping regions.

In a case where a class is not annotated, its voxels are labelled as background. Its probability is
therefore added to that of the background, and the loss is Dice and cross-entropy over the annotated
classes. Voxels labelled K, which nnU-Net calls "ignore", are left out.

Regions, such as a tumour and its core, are unions of values. The network has an output per value,
and the probability of a region is the sum of those of its values, so that a core always lies in its
tumour; nnU-Net's network has an output per region, and the later one wins.

Source: the marginal loss of Shi et al., Marginal loss and exclusion loss for partially supervised
multi-organ segmentation, Medical Image Analysis 70:101979, 2021.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from monai.losses import DeepSupervisionLoss, DiceLoss
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy


def multi_scale_dice_ce(
    logits: Tensor | Sequence[Tensor],
    batch: Mapping[str, Tensor],
    *,
    foreground_weight: float,
    regions: Sequence[Sequence[int]],
) -> Tensor:
    """`partial_dice_ce` of a batch; of outputs at several resolutions, MONAI's weighted sum.

    Args:
        logits: Logits of the batch, or a list of them, fine to coarse.
        batch: "label" and "annotated", see `partial_dice_ce`.
        foreground_weight: See `partial_dice_ce`.
        regions: See `partial_dice_ce`.
    """
    loss_of: Any = partial(  # MONAI takes any callable, and names a class
        partial_dice_ce,
        annotated=batch["annotated"],
        foreground_weight=foreground_weight,
        regions=regions,
    )
    loss: Tensor = DeepSupervisionLoss(loss_of)(logits, batch["label"].float())
    return loss


def partial_dice_ce(
    logits: Tensor,
    label: Tensor,
    annotated: Tensor,
    *,
    foreground_weight: float = 1.0,
    regions: Sequence[Sequence[int]] = (),
) -> Tensor:
    """Dice and cross-entropy over the annotated classes of each case, then the mean over cases.

    Cases have equal weight, whatever is annotated in the others of their batch, so the loss does
    not depend on the distribution of cases over batches and processes.

    Args:
        foreground_weight: Weight of a labelled voxel in the cross-entropy; background has 1.
            It helps small structures whose probability is near 0, where both parts of the loss have
            nearly no gradient: Dice because softmax is flat there, cross-entropy because the
            structures are one voxel in a thousand.
        regions: Values of each region; their Dice and cross-entropy take the place of the classes'.

    Shapes:
        logits: (B, K, X, Y, Z), class 0 is background.
        label: (B, 1, X, Y, Z) integers; K is to be ignored.
        annotated: (B, K) bool; class 0 always is.
        returns: scalar.
    """
    dice_loss = DiceLoss(softmax=True, to_onehot_y=True)
    losses = []
    for values, wanted, known_classes in zip(logits, label, annotated, strict=True):
        if not (kept := wanted[0] < len(values)).all():
            values, wanted = values[:, kept], wanted[:, kept]  # (K, N) and (1, N)
            if not wanted.numel():
                losses.append(values.sum())  # 0, with a gradient of 0
                continue
        if regions:
            losses.append(region_dice_ce(values, wanted, regions, foreground_weight))
            continue
        known, target = merged(values, wanted, known_classes)
        weight = known.new_full((known.shape[1],), foreground_weight)
        weight[0] = 1
        losses.append(dice_loss(known, target) + cross_entropy(known, target[:, 0], weight=weight))
    return torch.stack(losses).mean()


def region_dice_ce(
    logits: Tensor, label: Tensor, regions: Sequence[Sequence[int]], foreground_weight: float = 1.0
) -> Tensor:
    """Dice and binary cross-entropy of one case, the mean over its regions.

    Shapes:
        logits: (K, ...).
        label: (1, ...), integers below K.
        returns: scalar.
    """
    parts, targets = [], []
    for region in regions:
        rest = [value for value in range(len(logits)) if value not in region]
        # Its sigmoid is the sum of the softmax over the region.
        parts.append(logits[[*region]].logsumexp(0) - logits[rest].logsumexp(0))
        targets.append(torch.isin(label[0], label.new_tensor(region)))
    logit = torch.stack(parts)[None]
    target = torch.stack(targets)[None].to(logit.dtype)
    weight = torch.where(label[0] > 0, foreground_weight, 1.0).to(logit.dtype)
    each = binary_cross_entropy_with_logits(logit, target, reduction="none")
    entropy = (each * weight).sum() / (weight.sum() * len(regions))
    dice: Tensor = DiceLoss(sigmoid=True)(logit, target)
    return dice + entropy


def merged(logits: Tensor, label: Tensor, annotated: Tensor) -> tuple[Tensor, Tensor]:
    """One case's logits and label over its annotated classes, numbered without gaps.

    The background's logit becomes the log-sum-exp of its own and those of the unknown classes,
    whose softmax is the sum of their probabilities.

    Shapes:
        logits: (K, ...).
        label: (1, ...).
        annotated: (K,) bool.
        returns: (1, A, ...) and (1, 1, ...), A being the number of annotated classes.
    """
    known = [k for k, is_known in enumerate(annotated.tolist()) if is_known and k]
    rest = [k for k in range(len(annotated)) if k not in known]
    background = logits[rest].logsumexp(0, keepdim=True)
    number = label.new_zeros(len(annotated), dtype=torch.long)  # among the known classes
    number[known] = torch.arange(1, 1 + len(known), device=number.device)
    return torch.cat([background, logits[known]])[None], number[label.long()][None]
