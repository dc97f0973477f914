"""Normalisation per volume and channel, and what is left where nothing can be normalised."""

import pytest
import torch

from sammed3d_backbone.data.intensity import MODES, normalise


def volume(values):
    return torch.as_tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)


def test_the_released_form_takes_its_statistics_from_voxels_above_zero():
    done = normalise(volume([0, 0, 2, 4]), "zscore_positive")
    # mean 3, unbiased deviation sqrt(2), applied to the zeros as well
    assert done.image.flatten().tolist() == pytest.approx(
        [-2.1213, -2.1213, -0.7071, 0.7071], abs=1e-4
    )
    assert done.zero.tolist() == pytest.approx([-2.1213], abs=1e-4)


def test_zscore_takes_all_voxels():
    done = normalise(volume([-1, 1]), "zscore")
    assert done.image.flatten().tolist() == pytest.approx([-0.7071, 0.7071], abs=1e-4)
    assert done.zero.tolist() == [0]


def test_ct_is_clamped_before_the_statistics():
    done = normalise(volume([-3000, 100, 300, 5000]), "ct")
    same = normalise(volume([-1000, 100, 300, 1000]), "zscore_positive")
    assert torch.equal(done.image, same.image)


def test_mr_is_clipped_at_its_own_percentiles():
    values = torch.arange(1, 1002).float()
    values[-1] = 1e6  # one voxel of an artefact
    done = normalise(volume(values), "mr")
    assert float(done.image.max()) < 2
    assert float(done.image.max()) == float(done.image.flatten()[-6])


@pytest.mark.parametrize("mode", MODES)
def test_the_scale_of_a_volume_does_not_matter(mode, generator):
    if mode == "ct":
        pytest.skip("CT numbers have a unit")
    image = torch.rand(1, 6, 6, 6, generator=generator) + 0.1
    small, large = normalise(image, mode).image, normalise(image * 1e4, mode).image
    assert torch.allclose(small, large, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_channels_do_not_mix(mode, generator):
    image = torch.rand(2, 4, 4, 4, generator=generator)
    image[1] *= 500
    both = normalise(image, mode)
    for channel in (0, 1):
        alone = normalise(image[channel : channel + 1], mode)
        assert torch.equal(both.image[channel], alone.image[0])
        assert torch.equal(both.zero[channel], alone.zero[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.0, 7.0, -7.0, 1.7e6])
def test_a_constant_volume_becomes_zero(mode, value):
    done = normalise(torch.full((1, 3, 3, 3), value), mode)
    assert not done.image.any()
    assert not done.zero.any()


@pytest.mark.parametrize("mode", MODES)
def test_a_single_voxel_above_zero_has_no_spread(mode):
    done = normalise(volume([0, 0, 5]), mode)
    assert bool(done.image.isfinite().all())


def test_large_values_keep_their_digits():
    image = volume([1.7e6 + i for i in range(8)])
    assert float(normalise(image, "zscore_positive").image.std()) == pytest.approx(1.0, abs=1e-3)


def test_an_unknown_mode_names_the_known_ones():
    with pytest.raises(ValueError, match="choose one of zscore_positive, zscore, ct, mr"):
        normalise(torch.ones(1, 2, 2, 2), "minmax")
