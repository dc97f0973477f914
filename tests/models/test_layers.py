"""The shared layers."""

import torch

from sammed3d_backbone.models.layers import LayerNorm3d


def test_layer_norm_centres_and_scales_every_voxel_over_its_channels(generator):
    norm = LayerNorm3d(5)
    x = 3 + 2 * torch.randn(2, 5, 3, 4, 2, generator=generator)
    y = norm(x)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 3, 4, 2), rtol=0, atol=1e-6)
    torch.testing.assert_close(y.var(1, correction=0), torch.ones(2, 3, 4, 2), rtol=1e-4, atol=0)


def test_layer_norm_survives_a_constant_voxel():
    assert torch.equal(LayerNorm3d(4)(torch.full((1, 4, 2, 2, 2), 7.0)), torch.zeros(1, 4, 2, 2, 2))
