"""Features at single voxels, and tokens as colours."""

import numpy as np
import pytest
import torch

from sammed3d_backbone import encoder
from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.evaluation.voxel_features import (
    draw_voxels,
    feature_grid,
    features_at,
    pca_colours,
    sampled,
)


class Averages(torch.nn.Module):
    """An encoder whose block b says the mean of a patch, times b + 1."""

    img_size = (8, 8, 8)
    patch_size = 2
    embed_dim = 1

    def forward_intermediates(self, x, indices=None, *, intermediates_only=False):
        tokens = torch.nn.functional.avg_pool3d(x, self.patch_size)
        return [tokens * (index + 1) for index in indices]


@pytest.fixture
def ramp():
    """An image that rises linearly along every axis, and the function that it is made of."""

    def height(places):
        return np.asarray(places) @ [1.0, 10.0, 100.0]

    places = np.stack(np.indices((12, 8, 20)), axis=-1)
    return torch.from_numpy(height(places)).float()[None], height


def test_a_linear_image_is_read_back_between_tokens_and_across_windows(ramp, rng):
    image, height = ramp
    places = rng.uniform(0.5, np.array(image.shape[1:]) - 1.5, (200, 3))  # between token centres
    inner = places[np.all(np.abs(places % 4 - 1.5) < 1.0, axis=1)]  # and not at a window's border
    found = features_at(Averages(), image, inner, [0, 2])
    assert len(inner) > 10
    # a place that is at the border of a window has its outermost tokens in the mean
    error = np.abs(found[0][:, 0].numpy() - height(inner)) / height([12, 8, 20])
    assert np.median(error) < 0.01
    assert torch.allclose(found[2], 3 * found[0])


def test_one_window_gives_exactly_its_tokens(ramp):
    image = ramp[0][:, :8, :8, :8]
    centres = np.array([[0.5, 2.5, 4.5], [6.5, 0.5, 2.5]])
    found = features_at(Averages(), image, centres, [0])[0][:, 0]
    assert found.numpy() == pytest.approx(ramp[1](centres), rel=1e-5)


def test_every_voxel_of_a_volume_gets_a_feature(ramp):
    image, _ = ramp
    every = np.stack(np.indices(image.shape[1:]), axis=-1).reshape(-1, 3)
    for places in (every, np.array([[-0.4, -0.4, -0.4], [11.4, 7.4, 19.4]])):
        assert features_at(Averages(), image, places, [0])[0].isfinite().all()


def test_places_do_not_change_each_other(ramp):
    image, _ = ramp
    network = encoder("tiny", pretrained=False, img_size=16).eval()
    image = torch.nn.functional.pad(image, (0, 0, 4, 4, 2, 2)) / 1000
    places = np.array([[1.0, 2, 3], [9, 8, 15], [15, 15, 19]])
    together = features_at(network, image, places, [3])[3]
    alone = torch.cat([features_at(network, image, place[None], [3])[3] for place in places])
    assert together.shape == (3, 192)
    assert torch.allclose(together, alone, atol=1e-5)


def test_an_image_smaller_than_the_input_is_refused():
    with pytest.raises(ValueError, match="pad it, or call set_input_size"):
        features_at(Averages(), torch.zeros(1, 8, 7, 8), [[0, 0, 0]], [0])


def test_a_grid_of_features_covers_the_volume_and_knows_its_place(rng):
    affine = np.array([[0, -2.0, 0, 9], [1, 0, 0, -4], [0, 0, -1.5, 30], [0, 0, 0, 1]])
    array = rng.normal(size=(11, 5, 9)).astype(np.float32)
    preparation = Preprocessing((2.0, 1.0, 1.5), {"default": "zscore"}, "volume", (8, 8, 8))
    image, geometry = preparation.image(Volume(array, affine))
    maps, to_mm = feature_grid(Averages(), image, geometry, [0, 1])
    assert {block: tuple(m.shape) for block, m in maps.items()} == dict.fromkeys(
        (0, 1), (1, 3, 6, 5)
    )
    corners = np.array([[-0.5, -0.5, -0.5, 1], [2.5, 5.5, 4.5, 1]]) @ to_mm.T
    voxels = np.array([[-0.5, -0.5, -0.5, 1], [10.5, 4.5, 8.5, 1]]) @ affine.T
    assert np.sort(corners, axis=0) == pytest.approx(np.sort(voxels, axis=0))


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
