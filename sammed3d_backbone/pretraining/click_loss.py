"""The loss of an interaction: several simulated clicks per object on one encoded image.

Input: volumes, objects in them and random numbers for their clicks. Output: the loss summed over
steps, and figures for the log. The encoder runs once for all objects and steps, and everything is
one module's forward pass, so that wrappers which average gradients over processes see it.

Losses, masks and errors are computed on the decoder's grid, whose voxels are called cells here: an
object is given by the share of each cell that it fills. Only clicks are voxels of the image.
Letters: B volumes, P objects of each, N steps, S voxels a side, s cells a side, Q = B P.
"""

from __future__ import annotations

import contextlib
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from numpy.typing import NDArray
from torch import Tensor, nn

from sammed3d_backbone.models.prompt_encoder import Points
from sammed3d_backbone.models.sam import Encoding, Sam3D
from sammed3d_backbone.pretraining.click_cells import next_points, shares_of_cells
from sammed3d_backbone.strategies import Click, Draws, Errors, largest_centre

# Unused in an interaction: the first step has a mask of zeros, and only the first mask is decoded.
# Without a gradient they would stall several processes, and weight decay would shrink them.
UNUSED = ("no_mask_embed", *(f"output_hypernetworks_mlps.{i}" for i in (1, 2, 3)))


GRADED, WITHOUT_POINT = 1, 2  # flags of a step: it has a loss; it only refines the last mask


class Interaction(nn.Module):
    """A promptable network with the loss of its training.

    No gradient flows through a mask that is fed back.

    Args:
        network: A promptable network; parameters that no step uses are frozen.
        clicks: "newest" gives a step its own click only, as the released weights were trained;
            "all" gives it those of earlier steps, too.
        deep_share: Share of the clicks at the deepest place of an error; the others fall on any
            wrong voxel.
        balance: Class weighting of the cross-entropy: at 0 all voxels have the same weight, at 1
            the object weighs as much as the background. At 0, a network that cannot find the object
            yet learns to predict empty masks, where the gradient of Dice vanishes.
        quality_weight: Weight of the squared error of the predicted Dice.

    Shapes:
        image: (B, 1, S, S, S).
        objects: (B, P, S, S, S) bool, none of them empty.
        draws: (B, N, P, 3), from 0 to 1, see `next_points`.
        plan: (B, N) sums of `GRADED` and `WITHOUT_POINT`; alike for all volumes of a batch. Steps
            that are not graded only prepare the graded ones, at a third of the cost; those after
            the last graded one are not run. The first step is graded and has a point.
        returns: a scalar, and scalars by name.

    Raises:
        ValueError: If the plan differs within the batch, or its first step is not graded.
    """

    def __init__(
        self,
        network: Sam3D,
        *,
        clicks: Literal["newest", "all"] = "newest",
        deep_share: float = 0.5,
        balance: float = 0.5,
        quality_weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.network = network
        self.newest_only = clicks == "newest"
        self.deep_share = deep_share
        self.balance = balance
        self.quality_weight = quality_weight
        self.dice_loss = DiceLoss(sigmoid=True)
        for name, parameter in network.named_parameters():
            if any(f".{part}." in f".{name}" for part in UNUSED):
                parameter.requires_grad_(False)

    def forward(
        self, image: Tensor, objects: Tensor, draws: Tensor, plan: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed loss of all graded steps, and figures of all steps."""
        return self.on_encoding(self.network.encode(image), objects, draws, plan)

    def on_encoding(
        self, encoding: Encoding, objects: Tensor, draws: Tensor, plan: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same as `forward` for volumes that are already encoded."""
        steps = _steps_to_run(plan)
        encoding = Encoding(encoding.embedding.float(), tuple(m.float() for m in encoding.maps))
        truth = objects.flatten(0, 1)  # (Q, S, S, S)
        share = shares_of_cells(truth, self.network.prompt_encoder.mask_size)  # (Q, s, s, s)
        target = share.unsqueeze(1)
        mask = torch.zeros_like(share, dtype=torch.bool)
        weight = (1 / target.mean((1, 2, 3, 4), keepdim=True) - 1).clamp(min=1) ** self.balance
        low_res: Tensor | None = None
        points: Points | None = None
        losses, soft, hard, off = [], [], [], []
        for step, drawn in zip(steps, draws.unbind(1), strict=False):  # drawn: (B, P, 3)
            given = None
            if not step & WITHOUT_POINT:
                newest = next_points(truth, share, mask, drawn.flatten(0, 1), self.deep_share)
                points = newest if points is None or self.newest_only else _joined(points, newest)
                given = points
            is_graded = bool(step & GRADED)
            with torch.set_grad_enabled(is_graded and torch.is_grad_enabled()), _exact(target):
                low_res, quality = self._decode(encoding, given, low_res)
            mask = low_res.detach()[:, 0] > 0
            dice = _dice(mask, share)
            hard.append(dice.mean())
            off.append((quality.detach()[:, 0] - dice).abs().mean())
            if is_graded:
                not_dice = self.dice_loss(low_res, target)
                wrong = F.binary_cross_entropy_with_logits(low_res, target, pos_weight=weight)
                misjudged = F.mse_loss(quality[:, 0], dice)
                losses.append(not_dice + wrong + self.quality_weight * misjudged)
                soft.append(1 - not_dice.detach())
            low_res = low_res.detach()
        return torch.stack(losses).sum(), {
            "soft_dice_first": soft[0],
            "soft_dice_last": soft[-1],
            "dice_first": hard[0],
            "dice_last": hard[-1],
            "quality_error": torch.stack(off).mean(),
        }

    def _decode(
        self, encoding: Encoding, points: Points | None, low_res: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logits, quality = self.network.predict_masks(encoding, points, low_res)
        return logits.float(), quality.float()


def _steps_to_run(plan: Tensor) -> list[int]:
    """The steps up to the last graded one."""
    if not (plan == plan[0]).all():
        raise ValueError("plan differs within a batch; give all volumes of a step one plan")
    steps: list[int] = plan[0].tolist()
    if steps[0] != GRADED:
        raise ValueError(f"plan={steps}: the first step is graded and has a point")
    return steps[: max(n for n, step in enumerate(steps) if step & GRADED) + 1]


def _exact(of: Tensor) -> contextlib.AbstractContextManager[object]:
    """Disables autocast on CPUs, where the decoder's many small products are slower with it."""
    if of.device.type == "cpu":
        return torch.autocast("cpu", enabled=False)
    return contextlib.nullcontext()


@torch.no_grad()
def dice_per_click(
    network: Sam3D,
    image: Tensor,
    objects: Tensor,
    clicks: int,
    *,
    given: Literal["newest", "all"] = "newest",
) -> NDArray[np.float64]:
    """Dice after each click of ``clickbench/1``, played inside a crop.

    Where nothing is wrong any more, the last mask is carried forward.

    Shapes:
        image: (1, S, S, S).
        objects: (P, S, S, S) bool, none of them empty.
        returns: (P, N).

    Args:
        network: A promptable network in evaluation mode.
        image: The normalised crop.
        objects: Masks of the objects.
        clicks: Number N of clicks.
        given: The clicks that each step gets.
    """
    encoding = network.encode(image[None])
    truth = objects.cpu().numpy()
    masks = np.zeros_like(truth)
    made: list[list[Click]] = [[] for _ in truth]
    low_res: Tensor | None = None
    points: Points | None = None
    scores = []
    for _ in range(clicks):
        found = [
            largest_centre(Errors(t, m, np.eye(4), Draws(), done))
            for t, m, done in zip(truth, masks, made, strict=True)
        ]
        places = [click.point_vox if click else (0, 0, 0) for click in found]
        labels = [int(click.positive) if click else -1 for click in found]
        newest = (
            torch.tensor(places, device=image.device)[:, None],
            torch.tensor(labels, device=image.device)[:, None],
        )
        points = newest if points is None or given == "newest" else _joined(points, newest)
        low_res = network.decode(encoding, points, low_res)
        answers = (network.upsample(low_res.float())[:, 0] > 0).cpu().numpy()
        for number, click in enumerate(found):
            if click is not None:
                made[number].append(click)
                masks[number] = answers[number]
        scores.append(_dice(torch.from_numpy(masks), torch.from_numpy(truth)).numpy())
    return np.stack(scores, axis=1)


def _joined(before: Points, newest: Points) -> Points:
    """All points so far, (Q, N, 3), and their labels."""
    return torch.cat([before[0], newest[0]], dim=1), torch.cat([before[1], newest[1]], dim=1)


def _dice(mask: Tensor, truth: Tensor) -> Tensor:
    """Dice of masks over the last three axes; the truth is not empty and may be shares."""
    last = (-3, -2, -1)
    ours, theirs = mask.float(), truth.float()  # sums of bool go through int64 and take longer
    return 2 * (ours * theirs).sum(last) / (ours.sum(last) + theirs.sum(last))
