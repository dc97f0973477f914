"""An interaction as one loss: click, look, click where the mask is wrong, on one embedding.

Comes in: volumes, objects in them and the random numbers of their clicks; goes out: the loss summed
over all steps, and figures. The encoder runs once for all objects and steps, and everything is one
module's forward pass, so that wrappers which average gradients over processes see it.

An object whose mask is right in every voxel is clicked in its foreground once more. A voxel is in
the mask where its logit is above 0. Letters: B volumes, P objects of each, N steps, S voxels a
side, Q = B P.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from numpy.typing import NDArray
from torch import Tensor, nn

from sammed3d_backbone.models.prompt_encoder import Points
from sammed3d_backbone.models.sam import Sam3D
from sammed3d_backbone.strategies import Click, Draws, Errors, largest_centre

# Nothing in an interaction reads them: the first step has a mask of zeros, and one mask is asked
# for. Without a gradient they would stall several processes, and weight decay would shrink them.
UNREAD = ("no_mask_embed", *(f"output_hypernetworks_mlps.{i}" for i in (1, 2, 3)))


class Interaction(nn.Module):
    """A promptable network with the loss of its training.

    Args:
        network: Promptable; what no step reads is frozen.
        without_point: Steps, counted from 0, in which the network has only its own last mask.
        clicks: "newest" gives a step its own click only, as the released weights were trained;
            "all" those of the steps before it, too.
        detach: Whether no gradient flows through a mask that is fed back.
        balance: How far the voxels of an object make up in the cross-entropy for being few: 0 is
            not at all, and 1 lets them weigh as much as all others together. At 0, a network that
            cannot find the object yet learns to answer with nothing, where Dice is flat.
        quality_weight: Of the squared error of the predicted Dice.

    Shapes:
        image: (B, 1, S, S, S).
        objects: (B, P, S, S, S) bool, none of them empty.
        draws: (B, N, P), from 0 to 1.
        returns: a scalar, and scalars by name.

    Raises:
        ValueError: If the first step is to have no point.
    """

    def __init__(
        self,
        network: Sam3D,
        *,
        without_point: Collection[int] = (),
        clicks: Literal["newest", "all"] = "newest",
        detach: bool = True,
        balance: float = 0.5,
        quality_weight: float = 0.1,
    ) -> None:
        super().__init__()
        if 0 in without_point:
            raise ValueError(
                "step 0 without a point asks for nothing; give without_point= later steps"
            )
        self.network = network
        self.without_point = frozenset(without_point)
        self.newest_only = clicks == "newest"
        self.detach = detach
        self.balance = balance
        self.quality_weight = quality_weight
        self.dice_loss = DiceLoss(sigmoid=True)
        for name, parameter in network.named_parameters():
            if any(f".{part}." in f".{name}" for part in UNREAD):
                parameter.requires_grad_(False)

    def forward(
        self, image: Tensor, objects: Tensor, draws: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of all steps together, and figures of them."""
        return self.on_embedding(self.network.image_encoder(image), objects, draws)

    def on_embedding(
        self, embedding: Tensor, objects: Tensor, draws: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same from what the encoder has made of the volumes, (B, F, x, y, z)."""
        truth = objects.flatten(0, 1).unsqueeze(1)  # (Q, 1, S, S, S)
        if len(embedding) > 1:
            embedding = embedding.repeat_interleave(objects.shape[1], dim=0)
        low_res: Tensor | None = None
        points: Points | None = None
        mask = torch.zeros_like(truth)
        share_inside = truth.float().mean((1, 2, 3, 4), keepdim=True)
        weight = (1 / share_inside - 1) ** self.balance
        losses, soft, hard, off = [], [], [], []
        for step, share in enumerate(draws.unbind(1)):  # (B, P)
            if step in self.without_point:
                given = None
            else:
                newest = next_points(truth[:, 0], mask[:, 0], share.flatten())
                points = newest if points is None or self.newest_only else _joined(points, newest)
                given = points
            low_res, quality = self.network.predict_masks(embedding, given, low_res)
            logits = self.network.upsample(low_res.float())  # (Q, 1, S, S, S)
            mask = logits.detach() > 0
            dice = _dice(mask, truth)  # (Q, 1)
            not_dice = self.dice_loss(logits, truth)
            wrong = F.binary_cross_entropy_with_logits(logits, truth.float(), pos_weight=weight)
            misjudged = F.mse_loss(quality.float(), dice)
            losses.append(not_dice + wrong + self.quality_weight * misjudged)
            soft.append(1 - not_dice)
            hard.append(dice.mean())
            off.append((quality.detach() - dice).abs().mean())
            if self.detach:
                low_res = low_res.detach()
        return torch.stack(losses).sum(), {
            "soft_dice_first": soft[0],
            "soft_dice_last": soft[-1],
            "dice_first": hard[0],
            "dice_last": hard[-1],
            "quality_error": torch.stack(off).mean(),
        }


def next_points(truth: Tensor, mask: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """A click on each object: any wrong voxel, each as likely; if there is none, any of the object.

    Shapes:
        truth, mask: (Q, S, S, S) bool.
        share: (Q,), from 0 to 1, decides which voxel.
        returns: voxel indices (Q, 1, 3) and labels (Q, 1).
    """
    wrong = truth ^ mask
    is_right = ~wrong.flatten(1).any(1)
    region = torch.where(is_right.view(-1, 1, 1, 1), truth, wrong).flatten(1)  # (Q, S ** 3)
    # Voxels of the region up to each one; the default, int64, takes five times as long.
    upto = region.cumsum(1, dtype=torch.int32)
    count = upto[:, -1]
    number = torch.minimum((share * count).long(), count - 1)
    place = torch.searchsorted(upto, number.unsqueeze(1), right=True)  # (Q, 1)
    labels = truth.flatten(1).gather(1, place).long()
    return torch.stack(torch.unravel_index(place, truth.shape[1:]), dim=-1), labels


@torch.no_grad()
def dice_per_click(
    network: Sam3D, image: Tensor, objects: Tensor, clicks: int
) -> NDArray[np.float64]:
    """Dice after each click of ``clickbench/1``, played inside a crop.

    Where nothing is wrong any more, the last mask is carried forward.

    Shapes:
        image: (1, S, S, S).
        objects: (P, S, S, S) bool, none of them empty.
        returns: (P, N).

    Args:
        network: Promptable, in evaluation mode; each step is given the newest click.
        image: Normalised.
        objects: To be segmented.
        clicks: Their number N.
    """
    embedding = network.image_encoder(image[None])
    truth = objects.cpu().numpy()
    masks = np.zeros_like(truth)
    made: list[list[Click]] = [[] for _ in truth]
    low_res: Tensor | None = None
    scores = []
    for _ in range(clicks):
        found = [
            largest_centre(Errors(t, m, np.eye(4), Draws(), done))
            for t, m, done in zip(truth, masks, made, strict=True)
        ]
        points = [click.point_vox if click else (0, 0, 0) for click in found]
        labels = [int(click.positive) if click else -1 for click in found]
        low_res = network.decode(
            embedding,
            (
                torch.tensor(points, device=image.device)[:, None],
                torch.tensor(labels, device=image.device)[:, None],
            ),
            low_res,
        )
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
    """Dice of masks over the last three axes; the truth is not empty."""
    last = (-3, -2, -1)
    ours, theirs = mask.float(), truth.float()  # sums of bool go through int64 and take longer
    return 2 * (ours * theirs).sum(last) / (ours.sum(last) + theirs.sum(last))
