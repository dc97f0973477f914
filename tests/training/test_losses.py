"""The loss over annotated classes."""

import math

import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss

from sammed3d_backbone.training.losses import merged, partial_dice_ce


@pytest.fixture
def batch(generator):
    """Logits of two cases and four classes, labels, and everything annotated."""
    logits = torch.randn(2, 4, 5, 4, 3, generator=generator, dtype=torch.float64)
    label = torch.randint(0, 4, (2, 1, 5, 4, 3), generator=generator)
    return logits.requires_grad_(), label, torch.ones(2, 4, dtype=torch.bool)


def test_with_everything_annotated_it_is_dice_and_cross_entropy(batch):
    logits, label, annotated = batch
    whole = DiceCELoss(softmax=True, to_onehot_y=True)(logits, label)
    assert partial_dice_ce(logits, label, annotated).item() == pytest.approx(whole.item())


def test_a_labelled_voxel_can_count_more_by_hand():
    logits = torch.log(torch.tensor([[0.8, 0.3], [0.2, 0.7]])).reshape(1, 2, 2, 1, 1)
    label = torch.tensor([0, 1]).reshape(1, 1, 2, 1, 1)
    annotated = torch.ones(1, 2, dtype=torch.bool)
    plain, weighted = (
        partial_dice_ce(logits, label, annotated, foreground_weight=weight).item()
        for weight in (1.0, 3.0)
    )
    background, foreground = -math.log(0.8), -math.log(0.7)
    change = (background + 3 * foreground) / 4 - (background + foreground) / 2
    assert weighted - plain == pytest.approx(change, abs=1e-6)


def test_an_unknown_class_counts_as_background(batch):
    logits, label, _ = batch
    annotated = torch.tensor([True, False, True, False])
    few, mapped = merged(logits[0], label[0], annotated)
    probs, few_probs = logits[0].softmax(0), few[0].softmax(0)
    assert torch.allclose(few_probs[0], probs[0] + probs[1] + probs[3])
    assert torch.allclose(few_probs[1], probs[2])
    assert torch.equal(mapped[0], (label[0] == 2).long())


def test_one_voxel_by_hand():
    logits = torch.log(torch.tensor([0.2, 0.3, 0.5])).reshape(1, 3, 1, 1, 1)
    label = torch.zeros(1, 1, 1, 1, 1, dtype=torch.long)
    loss = partial_dice_ce(logits, label, torch.tensor([[True, False, True]]))
    # background is 0.2 + 0.3: cross-entropy ln 2; Dice 2 * 0.5 / 1.5 for it, 0 for class 2
    expected = math.log(2) + ((1 - 1 / 1.5) + 1) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-4)


def test_what_is_predicted_for_an_unknown_class_costs_nothing_on_background(batch):
    logits, _, annotated = batch
    annotated[:, 3] = False
    label = torch.zeros(2, 1, 5, 4, 3, dtype=torch.long)
    loss = partial_dice_ce(logits, label, annotated)
    (gradient,) = torch.autograd.grad(loss, logits)
    probs = logits.detach().softmax(1)
    # moving mass between background and the unknown class leaves the loss as it is
    direction = torch.zeros_like(probs)
    direction[:, 0], direction[:, 3] = 1 / probs[:, 0], -1 / probs[:, 3]
    assert (gradient * direction).sum(1).abs().max() < 1e-12
    assert gradient[:, 3].abs().max() > 1e-4


def test_cases_count_alike_however_they_are_spread(batch):
    logits, label, annotated = batch
    annotated[0, 1:3] = False
    together = partial_dice_ce(logits, label, annotated)
    apart = [
        partial_dice_ce(logits[i : i + 1], label[i : i + 1], annotated[i : i + 1]) for i in (0, 1)
    ]
    assert together.item() == pytest.approx((apart[0] + apart[1]).item() / 2)


def test_ignored_voxels_count_for_nothing(batch):
    logits, label, annotated = batch
    label[0, 0, :2] = 4
    loss = partial_dice_ce(logits, label, annotated)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, :, :2].abs().max() == 0
    assert gradient[0, :, 2:].abs().min() > 0
    alone = partial_dice_ce(logits[:1, :, 2:], label[:1, :, 2:], annotated[:1])
    other = partial_dice_ce(logits[1:], label[1:], annotated[1:])
    assert loss.item() == pytest.approx((alone + other).item() / 2)


@pytest.mark.parametrize("regions", [(), ([1, 2, 3], [2])])
def test_a_crop_without_a_known_voxel_has_no_gradient(batch, regions):
    logits, label, annotated = batch
    loss = partial_dice_ce(logits, torch.full_like(label, 4), annotated, regions=regions)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == gradient.abs().max().item() == 0


def test_regions_are_scored_on_the_sums_of_their_probabilities(batch):
    logits, label, annotated = batch
    regions = [[1, 2, 3], [2, 3], [2]]
    loss = partial_dice_ce(logits, label, annotated, regions=regions)
    probs = logits.softmax(1)
    region = torch.stack([probs[:, values].sum(1) for values in regions], dim=1)
    truth = torch.stack([torch.isin(label[:, 0], torch.tensor(v)) for v in regions], dim=1)
    dice = DiceLoss()(region, truth.double())
    entropy = torch.nn.functional.binary_cross_entropy(region, truth.double())
    assert loss.item() == pytest.approx((dice + entropy).item())
