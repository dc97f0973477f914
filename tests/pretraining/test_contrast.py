"""Places of objects: who is compared with whom, and what it comes to."""

import math

import pytest
import torch

from sammed3d_backbone import sam
from sammed3d_backbone.pretraining.contrast import Contrast

SIDE = 16  # 2 x 2 x 2 tokens, 64 parts of 4 voxels a side


@pytest.fixture
def network():
    torch.manual_seed(0)
    return sam("nano", pretrained=False, img_size=SIDE)


@pytest.fixture
def labels():
    """Two objects of 8 parts each, on the token grid's corners, and nothing else."""
    label = torch.zeros(1, SIDE, SIDE, SIDE, dtype=torch.int16)
    label[:, :8, :8, :8] = 1
    label[:, 8:, 8:, 8:] = 2
    return label


def draws(volumes=1):
    return torch.rand(volumes, 64, generator=torch.Generator().manual_seed(1))


def telling(contrast, *codes):
    """An embedding and a linear layer in which all parts of token number i have the i-th code."""
    weight = torch.zeros(8, contrast.to_parts.out_features // 8, 64)
    weight[:, :8, :8] = torch.eye(8)
    with torch.no_grad():
        contrast.to_parts.weight.copy_(weight.flatten(0, 1))
        contrast.to_parts.bias.zero_()
    embedding = torch.zeros(1, 64, 8)
    embedding[0, :8] = torch.eye(8)[:, list(codes)]
    return embedding.view(1, 64, 2, 2, 2)


def test_objects_that_are_told_apart_cost_little_and_find_their_own(network, labels):
    contrast = Contrast(network.image_encoder, temperature=0.1)
    loss, nearest = contrast(telling(contrast, 1, 0, 0, 0, 0, 0, 0, 2), labels, draws())
    # Seven partners at cosine 1; 56 others at cosine 0 are each exp(-10) of a partner.
    assert float(loss.detach()) == pytest.approx(math.log(7 + 56 * math.exp(-10)), abs=1e-4)
    assert float(nearest) == 1


def test_objects_that_look_alike_cost_more(network, labels):
    contrast = Contrast(network.image_encoder)
    apart, _ = contrast(telling(contrast, 1, 0, 0, 0, 0, 0, 0, 2), labels, draws())
    alike, _ = contrast(telling(contrast, 1, 0, 0, 0, 0, 0, 0, 1), labels, draws())
    assert float(alike.detach()) == pytest.approx(math.log(15 + 48 * math.exp(-10)), abs=1e-4)
    assert alike > apart + 0.5


def test_parts_that_objects_share_are_not_compared(network, labels):
    contrast = Contrast(network.image_encoder)
    labels[:, 0:4, 0:4, 0:2] = 2  # half of a part
    assert (contrast._owners(labels) == -1).sum() == 1
    assert (contrast._owners(labels) == 1).sum() == 7


@pytest.mark.parametrize(("most", "compared"), [(3, 3 + 3 + 6), (200, 64)])
def test_large_objects_are_compared_in_part(network, labels, most, compared, monkeypatch):
    contrast = Contrast(network.image_encoder, most=most)
    shapes = []
    argmax = torch.Tensor.argmax

    def spied(tensor, *arguments, **options):
        shapes.append(tuple(tensor.shape))
        return argmax(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "argmax", spied)
    contrast(torch.randn(1, 64, 2, 2, 2), labels, draws())
    assert shapes == [(compared, compared)]


def test_a_volume_without_objects_counts_as_nothing_and_keeps_its_gradient(network, labels):
    contrast = Contrast(network.image_encoder)
    loss, nearest = contrast(torch.randn(1, 64, 2, 2, 2), torch.zeros_like(labels), draws())
    loss.backward()
    assert (float(loss.detach()), float(nearest)) == (0, 0)
    assert not contrast.to_parts.weight.grad.any()


def test_a_batch_is_the_mean_of_its_volumes(network, labels):
    contrast = Contrast(network.image_encoder)
    both_labels = torch.cat([labels, labels.flip(1)])
    embedding, places = torch.randn(2, 64, 2, 2, 2), draws(2)
    both = torch.stack(contrast(embedding, both_labels, places)).detach()
    each = [
        torch.stack(contrast(embedding[[i]], both_labels[[i]], places[[i]])).detach()
        for i in range(2)
    ]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


def test_training_tells_bright_from_dark(network, labels):
    contrast = Contrast(network.image_encoder)
    image = torch.where(labels == 1, 2.0, torch.where(labels == 2, -2.0, 0.0)).unsqueeze(1)
    image = image + 0.3 * torch.randn(image.shape, generator=torch.Generator().manual_seed(2))
    parameters = [*network.image_encoder.parameters(), *contrast.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for _ in range(8):
        loss, _ = contrast(network.image_encoder(image), labels, draws())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
