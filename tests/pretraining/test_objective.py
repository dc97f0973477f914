"""Losses side by side: what is asked for is learned, and nothing else waits for a gradient."""

from dataclasses import replace

import pytest
import torch

from sammed3d_backbone import encoder, sam
from sammed3d_backbone.loading.variants import VARIANTS
from sammed3d_backbone.models.sam import Sam3D
from sammed3d_backbone.pretraining.click_loss import GRADED, Interaction
from sammed3d_backbone.pretraining.contrast import Contrast
from sammed3d_backbone.pretraining.dense_labels import DenseLabels
from sammed3d_backbone.pretraining.objective import Objective
from sammed3d_backbone.pretraining.reconstruction import Reconstruction

SIDE = 16


@pytest.fixture
def network():
    torch.manual_seed(0)
    return sam("tiny", pretrained=False, img_size=SIDE)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    labels = torch.zeros(2, SIDE, SIDE, SIDE, dtype=torch.int16)
    labels[:, 2:11, 2:11, 2:11] = 1
    return {
        "image": torch.randn(2, 1, SIDE, SIDE, SIDE, generator=generator),
        "objects": (labels == 1).unsqueeze(1),
        "draws": torch.rand(2, 2, 1, 3, generator=generator),
        "plan": torch.full((2, 2), GRADED),
        "hidden": torch.rand(2, 8, generator=generator),
        "labels": labels,
        "places": torch.rand(2, 64, generator=generator),
        "classes": labels.to(torch.uint8),
        "known": torch.tensor([[True, True], [False, False]]),
    }


def objective_of(network, *names, **weights):
    image_encoder = network.image_encoder
    return Objective(
        Interaction(network),
        with_clicks="clicks" in names,
        reconstruction=Reconstruction(image_encoder) if "reconstruction" in names else None,
        contrast=Contrast(image_encoder) if "contrast" in names else None,
        dense=DenseLabels(16, 2) if "dense" in names else None,
        **weights,
    )


@pytest.mark.parametrize(
    "names",
    [
        ("clicks",),
        ("reconstruction",),
        ("contrast",),
        ("dense",),
        ("clicks", "reconstruction", "contrast", "dense"),
    ],
)
def test_every_trainable_parameter_gets_a_gradient(network, batch, names):
    objective = objective_of(network, *names)
    loss, figures = objective(batch)
    loss.backward()
    said = {
        "clicks": "soft_dice_first",
        "reconstruction": "patch_error",
        "contrast": "contrast",
        "dense": "dense_loss",
    }
    assert {name for name, figure in said.items() if figure in figures} == set(names)
    idle = [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []
    assert network.mask_decoder.mask_tokens.weight.requires_grad == ("clicks" in names)


def test_losses_add_up_with_their_weights(network, batch):
    names = ("clicks", "reconstruction", "contrast", "dense")
    weights = {"reconstruction_weight": 0.5, "contrast_weight": 2.0, "dense_weight": 3.0}
    torch.manual_seed(0)
    objective = objective_of(network, *names, **weights)
    with torch.no_grad():
        total, figures = objective(batch)
        clicks, _ = objective_of(network, "clicks")(batch)
    wanted = clicks + 0.5 * figures["patch_error"] + 2 * figures["contrast"]
    wanted = wanted + 3 * figures["dense_loss"]
    torch.testing.assert_close(total, wanted)


def test_clicks_places_and_classes_share_a_pass_of_the_encoder(network, batch):
    passes = []
    network.image_encoder.register_forward_hook(lambda *_: passes.append(1))
    objective_of(network, "clicks", "contrast", "dense")(batch)
    assert len(passes) == 1


def test_no_tensor_is_held_twice(network):
    tensors = objective_of(network, "clicks", "reconstruction", "contrast").state_dict(
        keep_vars=True
    )
    assert len({id(tensor) for tensor in tensors.values()}) == len(tensors)


def test_nothing_to_learn_is_refused(network):
    with pytest.raises(ValueError, match="no loss"):
        objective_of(network)


def test_dense_labels_need_high_resolution_maps(batch):
    backbone = encoder("nano", pretrained=False, img_size=SIDE)
    plain = replace(VARIANTS["nano"].decoder, high_resolution=False)
    with pytest.raises(ValueError, match="high_resolution"):
        objective_of(Sam3D.around(backbone, **vars(plain)), "dense")
