"""Click, look, click again as one loss."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sammed3d_backbone import encoder
from sammed3d_backbone.loading.variants import VARIANTS
from sammed3d_backbone.models.sam import Sam3D
from sammed3d_backbone.pretraining.click_loss import (
    GRADED,
    UNUSED,
    WITHOUT_POINT,
    Interaction,
    dice_per_click,
)

SIDE = 16


@pytest.fixture(params=[True, False], ids=["high_resolution", "plain"])
def network(request):
    torch.manual_seed(0)
    sizes = replace(VARIANTS["nano"].decoder, high_resolution=request.param)
    return Sam3D.around(encoder("nano", pretrained=False, img_size=SIDE), **vars(sizes))


def batch(volumes=1, objects=3, steps=3):
    generator = torch.Generator().manual_seed(1)
    truth = torch.zeros(volumes, objects, SIDE, SIDE, SIDE, dtype=torch.bool)
    for number in range(objects):
        truth[:, number, 2 + number : 9 + number, 3:9, 4:10] = True
    image = truth.any(1, keepdim=True) + 0.1 * torch.randn(
        volumes, 1, SIDE, SIDE, SIDE, generator=generator
    )
    draws = torch.rand(volumes, steps, objects, 3, generator=generator)
    return image, truth, draws, torch.full((volumes, steps), GRADED)


@pytest.mark.parametrize("clicks", ["newest", "all"])
def test_the_loss_reaches_every_part_that_an_interaction_reads(network, clicks):
    interaction = Interaction(network, clicks=clicks)
    image, truth, draws, _ = batch()
    plan = torch.tensor([[GRADED, GRADED, GRADED | WITHOUT_POINT]])
    loss, figures = interaction(image, truth, draws, plan)
    loss.backward()
    for name, parameter in network.named_parameters():
        is_unread = any(f".{part}." in f".{name}" for part in UNUSED)
        assert parameter.requires_grad != is_unread, name
        assert (parameter.grad is not None) != is_unread, name
    for part in ("image_encoder.patch_embed", "prompt_encoder.mask_down", "mask_decoder.iou_pred"):
        grads = [p.grad for n, p in network.named_parameters() if n.startswith(part)]
        assert grads
        assert all(grad.abs().max() > 0 for grad in grads)
    assert set(figures) == {
        "soft_dice_first",
        "soft_dice_last",
        "dice_first",
        "dice_last",
        "quality_error",
    }


def test_volumes_of_a_batch_do_not_mix(network):
    image, truth, draws, plan = batch(volumes=2)
    interaction = Interaction(network)
    with torch.no_grad():
        both, _ = interaction(image, truth, draws, plan)
        each = [interaction(image[[i]], truth[[i]], draws[[i]], plan[[i]])[0] for i in range(2)]
    assert float(both) == pytest.approx(float(sum(each)) / 2, rel=1e-5)


def test_the_encoder_runs_once_for_all_objects_and_steps(network):
    shapes = []
    network.image_encoder.register_forward_hook(lambda *call: shapes.append(call[1][0].shape))
    Interaction(network)(*batch(objects=5, steps=4))
    assert shapes == [(1, 1, SIDE, SIDE, SIDE)]


def test_ungraded_steps_lead_to_later_ones_and_are_no_part_of_the_loss(network):
    image, truth, draws, plan = batch(steps=4)
    passes = []
    network.mask_decoder.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    some = torch.tensor([[GRADED, 0, GRADED, 0]])
    loss, _ = Interaction(network)(image, truth, draws, some)
    assert passes == [True, False, True]  # nothing comes after the last graded step
    whole, _ = Interaction(network)(image, truth, draws, plan)
    assert 0 < float(loss.detach()) < float(whole.detach())


@pytest.mark.parametrize("plan", [[[0, 1]], [[3, 1]], [[1, 1], [1, 0]]])
def test_plans_begin_with_a_click_and_a_loss_and_are_alike_in_a_batch(network, plan):
    image, truth, draws, _ = batch(volumes=len(plan), steps=2)
    with pytest.raises(ValueError, match="plan"):
        Interaction(network)(image, truth, draws, torch.tensor(plan))


class Oracle(nn.Module):
    """Answers the object of a click exactly, from the second click on."""

    def __init__(self, objects):
        super().__init__()
        self.objects = objects
        self.calls = 0

    def encode(self, image):
        return image

    def decode(self, encoding, points, mask_logits):
        self.calls += 1
        self.seen = points
        return self.objects[:, None].float() - 0.5 if self.calls > 1 else -torch.ones(2, 1, 4, 4, 4)

    def upsample(self, low_res):
        return low_res


def test_validation_follows_the_clicks_and_stops_where_all_is_right():
    objects = torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    objects[0, 1:4, 1:4, 1:4] = True
    objects[1, :2, :2, :2] = True
    oracle = Oracle(objects)
    dice = dice_per_click(oracle, torch.zeros(1, 4, 4, 4), objects, clicks=3)
    assert dice.tolist() == [[0, 1, 1], [0, 1, 1]]
    assert oracle.seen[1].tolist() == [[-1], [-1]]  # nothing left to click
