"""Token maps of a whole volume: their values, their grid, their place."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sammed3d_backbone import encoder
from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.features import token_maps

PLAIN = Preprocessing(None, {"default": "zscore"}, "volume", (8, 8, 8))


class Averages(torch.nn.Module):
    """An encoder whose block b returns the mean of a patch, times b + 1."""

    img_size = (8, 8, 8)
    patch_size = 2
    embed_dim = 1

    def forward_intermediates(self, x, indices=None, *, intermediates_only=False):
        tokens = torch.nn.functional.avg_pool3d(x, self.patch_size)
        return [tokens * (index + 1) for index in indices]


def test_windows_join_to_the_tokens_of_the_whole_volume(rng):
    array = rng.normal(size=(12, 8, 20)).astype(np.float32)
    found = token_maps(Averages(), Volume(array, np.eye(4)), PLAIN, blocks=[0, 2])
    image = (array - array.mean()) / array.std(ddof=1)
    expected = torch.nn.functional.avg_pool3d(torch.from_numpy(image)[None], 2)
    assert torch.allclose(found.maps["block_0"], expected, atol=1e-5)
    assert torch.allclose(found.maps["block_2"], 3 * expected, atol=1e-5)


def test_the_grid_covers_the_volume_and_knows_its_place(rng):
    affine = np.array([[0, -2.0, 0, 9], [1, 0, 0, -4], [0, 0, -1.5, 30], [0, 0, 0, 1]])
    array = rng.normal(size=(11, 5, 9)).astype(np.float32)
    used = replace(PLAIN, spacing_mm=(2.0, 1.0, 1.5))
    found = token_maps(Averages(), Volume(array, affine), used, blocks=[0])
    shape = np.array(found.maps["block_0"].shape[1:])
    ends = np.stack([np.full(3, -0.5), shape - 0.5])
    corners = np.sort(ends @ found.affine[:3, :3].T + found.affine[:3, 3], axis=0)
    own = np.array([[-0.5, -0.5, -0.5], [10.5, 4.5, 8.5]]) @ affine[:3, :3].T + affine[:3, 3]
    low, high = np.sort(own, axis=0)
    token_mm = np.array([4.0, 2.0, 3.0])
    assert (corners[0] <= low).all()
    assert (corners[1] >= high).all()
    assert (low - corners[0] < token_mm).all()
    assert (corners[1] - high < token_mm).all()


@pytest.mark.parametrize("img_size", [16, 24])
def test_a_volume_of_one_window_has_exactly_its_tokens(rng, img_size):
    network = encoder("tiny", pretrained=False, img_size=img_size).eval()
    array = rng.normal(size=(img_size,) * 3).astype(np.float32)
    used = replace(PLAIN, crop_vox=(img_size,) * 3)
    found = token_maps(network, Volume(array, np.eye(4)), used, blocks=[3])
    image, _ = used.image(Volume(array, np.eye(4)))
    with torch.inference_mode():
        neck, (block,) = network.forward_intermediates(image[None], indices=[3])
    assert torch.allclose(found.maps["neck"], neck[0], atol=1e-5)
    assert torch.allclose(found.maps["block_3"], block[0], atol=1e-5)
