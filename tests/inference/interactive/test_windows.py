"""Where windows lie, what the network sees in them, and where a click is in them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sammed3d_backbone.data.geometry import Geometry, interpolate_axis
from sammed3d_backbone.data.intensity import normalise
from sammed3d_backbone.data.preprocessing import SAM_MED3D
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive.windows import Windows

AFFINE = np.array([[0, 0, -2.0, 5], [-0.9, 0, 0, 1], [0, 2.4, 0, 2], [0, 0, 0, 1]])
SPACING_MM = (1.5, 1.5, 1.5)
SMALL = replace(SAM_MED3D, crop_vox=(16, 16, 16))


@pytest.fixture
def volume(rng):
    """A turned, anisotropic volume, larger than a window of 16 along two axes."""
    return Volume(rng.normal(100, 20, (60, 9, 30)).astype(np.float32), AFFINE)


@pytest.fixture
def windows(volume):
    return Windows(volume, SMALL)


@pytest.mark.parametrize("start", [(0, 0, -1), (7, 11, -1), (24, 20, -1), (-9, 30, 1)])
def test_a_window_shows_what_resampling_the_whole_volume_would(volume, windows, start):
    geometry = Geometry.plan(volume.shape, volume.affine, SPACING_MM).boxed(start, (16, 16, 16))
    whole = normalise(geometry.apply(volume.array), "zscore_positive").image
    assert torch.allclose(windows.image(start)[0], whole, atol=2e-4)


def test_nothing_is_resampled_where_the_spacing_is_the_networks(rng):
    array = rng.integers(1, 200, (20, 20, 20)).astype(np.int16)
    windows = Windows(Volume(array, np.diag([1.5, 1.5, 1.5, 1])), SMALL, "ct")
    seen = windows.geometry.resample_box(array, (1, 2, 3), (16, 16, 16))
    assert np.array_equal(seen.numpy(), array[1:17, 2:18, 3:19])


def test_a_window_of_a_stored_integer_volume_leaves_it_alone(rng):
    array = rng.integers(0, 200, (20, 20, 20)).astype(">i2")
    array.setflags(write=False)
    Windows(Volume(array, np.eye(4)), SMALL, "ct").image((0, 0, 0))


def test_grid_points_agree_with_the_affines(volume, windows):
    to_grid = np.linalg.inv(windows.geometry.affine) @ volume.affine
    for point in [(0, 0, 0), (59, 8, 29), (13, 4, 22)]:
        assert np.allclose(windows.grid_point(point), (to_grid @ [*point, 1])[:3])


def test_the_first_window_is_centred_on_the_click_or_on_a_small_volume(windows):
    assert windows.geometry.resampled_shape == (40, 36, 14)
    assert windows.around((20.2, 17.6, 3.0), None) == (12, 10, -1)
    assert windows.around((1.0, 35.0, 13.0), None) == (-7, 27, -1)


def test_other_windows_lie_on_the_lattice_of_the_first(windows):
    anchor = (12, 10, -1)
    assert windows.around((20.0, 17.0, 3.0), anchor) == anchor
    assert windows.around((23.0, 17.0, 3.0), anchor) == anchor
    assert windows.around((24.5, 13.0, 3.0), anchor) == (20, 2, -1)
    assert windows.around((39.0, 0.0, 3.0), anchor) == (28, -6, -1)


def test_neighbours_share_half_a_window_and_end_with_the_volume(windows):
    assert windows.beside((12, 10, -1), 0, 1) == (20, 10, -1)
    assert windows.beside((12, 10, -1), 1, -1) == (12, 2, -1)
    assert windows.beside((24, 10, -1), 0, 1) is None
    assert windows.beside((12, 0, -1), 1, -1) is None
    assert windows.beside((12, 10, -1), 2, 1) is None


def test_cells_in_padding_are_told_from_those_in_the_volume(windows):
    inside = windows.cells_inside((-9, 30, -1), 4)  # cells of four voxels, centres at 1.5
    assert inside.any(axis=(1, 2)).tolist() == [False, False, True, True]
    assert inside.any(axis=(0, 2)).tolist() == [True, False, False, False]
    assert inside.any(axis=(0, 1)).tolist() == [True, True, True, True]


@pytest.mark.parametrize("point", [(0, 0, 0), (59, 8, 29), (13, 4, 22)])
def test_every_voxel_lies_in_the_window_around_it(windows, point):
    grid_point = windows.grid_point(point)
    index = windows.inside(windows.around(grid_point, None), grid_point)
    assert index is not None
    assert windows.inside((100, 100, 100), grid_point) is None


def test_linear_agrees_with_torch(generator):
    x = torch.randn(1, 1, 7, generator=generator)
    expected = torch.nn.functional.interpolate(x, size=12, mode="linear")
    assert torch.allclose(
        interpolate_axis(x, 2, (np.arange(12) + 0.5) * 7 / 12 - 0.5), expected, atol=1e-6
    )


@pytest.mark.parametrize("mode", ["zscore_positive", "zscore", "ct", "mr"])
def test_statistics_of_the_volume_are_those_of_the_resampled_volume_in_one_piece(volume, mode):
    """They are measured in slabs; the windows are cut from the same normalised volume."""
    used = replace(SMALL, statistics="volume", intensity={"default": mode})
    whole, geometry = used.image(volume)
    windows = Windows(volume, used)
    for start in [(0, 0, -1), (7, 11, -1), (24, 20, -1)]:
        box = geometry.boxed(start, (16, 16, 16))
        raw = geometry.resample(volume.array)
        normalised = normalise(raw, mode)
        expected = box.to_box(normalised.image, normalised.zero)
        assert torch.allclose(windows.image(start)[0], expected, atol=2e-4)
    assert float(whole[0, :40, :36, 1:15].mean()) == pytest.approx(0, abs=0.2)
