"""Features at single voxels, and tokens as colours."""

import numpy as np
import pytest
import torch

from sammed3d_backbone.evaluation.voxel_features import draw_voxels, pca_colours, sampled


def test_sampling_hits_tokens_and_stays_at_the_border(generator):
    tokens = torch.rand(5, 2, 3, 4, generator=generator)
    places = torch.tensor([[1.0, 2, 3], [0, 1, 2], [-4, 1, 9], [0.5, 1, 2]])
    found = sampled(tokens, places)
    expected = [
        tokens[:, 1, 2, 3],
        tokens[:, 0, 1, 2],
        tokens[:, 0, 1, 3],
        (tokens[:, 0, 1, 2] + tokens[:, 1, 1, 2]) / 2,
    ]
    assert torch.allclose(found, torch.stack(expected), atol=1e-6)


def test_classes_are_drawn_in_equal_number_where_they_can_be(rng):
    label = np.zeros((6, 7, 8), int)
    label[0] = 1
    label[1, 1, :3] = 2
    drawn = draw_voxels(label, [0, 1, 2, 3], 20, rng)
    assert np.unique(label[tuple(drawn.T)], return_counts=True)[1].tolist() == [20, 20, 3]
    assert len(np.unique(drawn, axis=0)) == len(drawn)


def test_draws_depend_on_the_seed_only():
    label = np.arange(6 * 7 * 8).reshape(6, 7, 8) % 2
    one, same, other = (
        draw_voxels(label, [0, 1], 5, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert draw_voxels(label, [], 5, np.random.default_rng(0)).shape == (0, 3)


def test_colours_follow_the_largest_differences(generator):
    tokens = 0.01 * torch.randn(10, 4, 4, 4, generator=generator)
    tokens[:6, :2] += 5  # the halves differ in most channels, and in hardly anything else
    red = pca_colours(tokens)[0]
    assert red.min() >= 0
    assert red.max() <= 1
    assert (red[:2].mean() - red[2:].mean()).abs() > 0.8


def test_colours_do_not_depend_on_the_order_of_tokens_or_on_chance(generator):
    tokens = torch.randn(10, 4, 4, 4, generator=generator)
    torch.manual_seed(1)
    colours = pca_colours(tokens)
    torch.manual_seed(2)
    assert torch.equal(colours, pca_colours(tokens))
    assert torch.allclose(colours.flip(1), pca_colours(tokens.flip(1)), atol=1e-5)


def test_colours_do_not_depend_on_the_scale_of_channels(generator):
    tokens = torch.randn(10, 4, 4, 4, generator=generator, dtype=torch.float64)
    scaled = tokens.clone()
    scaled[3] = 1e4 * scaled[3] + 1e5
    assert torch.allclose(pca_colours(tokens), pca_colours(scaled), atol=1e-5)


def test_three_colours_need_three_channels():
    with pytest.raises(ValueError, match="give three of each or more"):
        pca_colours(torch.zeros(2, 4, 4, 4))
