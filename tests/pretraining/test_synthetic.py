"""Synthetic volumes and their labels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from sammed3d_backbone.pretraining.synthetic import Synthesis, render_labels, synthetic_sample

SEEDS = range(12)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_volume_depends_on_its_seed_only(threads):
    expected = synthetic_sample(5, 40)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    again = synthetic_sample(5, 40)
    torch.set_num_threads(before)
    assert torch.equal(again.image, expected.image)
    assert torch.equal(again.labels, expected.labels)


def test_another_seed_gives_another_volume():
    one, other = synthetic_sample(1, 32), synthetic_sample(2, 32)
    assert not torch.equal(one.image, other.image)
    assert not torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("side_vox", [16, 33])
@pytest.mark.parametrize("seed", SEEDS)
def test_shapes_types_and_values_are_as_promised(seed, side_vox):
    image, labels = synthetic_sample(seed, side_vox, Synthesis(smallest_vox=40))
    assert image.shape == labels.shape == (1, side_vox, side_vox, side_vox)
    assert (image.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert torch.isfinite(image).all()
    assert image.std() > 0.5
    assert image.is_contiguous()
    assert labels.is_contiguous()


@pytest.mark.parametrize("seed", SEEDS)
def test_labels_have_no_gaps_and_none_is_smaller_than_asked(seed):
    how = Synthesis(structures=(4, 9), smallest_vox=300)
    sizes = torch.bincount(synthetic_sample(seed, 40, how).labels.flatten())[1:]
    assert 1 <= len(sizes) <= 9
    assert sizes.min() >= 300


def test_the_number_of_structures_follows_the_knob():
    def counts(how):
        return [int(synthetic_sample(seed, 40, how).labels.max()) for seed in SEEDS]

    assert set(counts(Synthesis(structures=(1, 1), smallest_vox=50))) == {1}
    assert np.mean(counts(Synthesis(structures=(20, 25), smallest_vox=50))) > 12


def test_structures_touch_and_nest():
    touching = nested = False
    for seed in SEEDS:
        labels = synthetic_sample(seed, 40).labels[0].numpy()
        for value in range(1, labels.max() + 1):
            inside = labels == value
            ring = ndimage.binary_dilation(inside) & ~inside
            neighbours = set(np.unique(labels[ring])) - {0}
            touching |= bool(neighbours)
            nested |= len(np.unique(labels[ring])) == 1 and bool(neighbours)
    assert touching
    assert nested


def one_structure(seed, contrast, noise=0.4):
    how = Synthesis(structures=(1, 1), smallest_vox=800, contrast=(contrast,) * 2, noise=noise)
    return synthetic_sample(seed, 40, replace(how, grain=noise))


@pytest.fixture(scope="module")
def plain_seeds():
    """Seeds of volumes with neither air nor shading."""
    seeds = [seed for seed in range(40) if not one_structure(seed, 0.0, noise=0).image.any()]
    assert len(seeds) > 3
    return seeds


def contrast_to_noise(sample):
    """Contrast-to-noise ratio of the only structure, away from its blurred border."""
    image, inside = sample.image[0].numpy(), sample.labels[0].numpy() == 1
    outside = ~ndimage.binary_dilation(inside, iterations=2)
    core = ndimage.binary_erosion(inside, iterations=2, border_value=1)
    return abs(image[core].mean() - image[outside].mean()) / image[outside].std()


def test_structures_are_as_much_brighter_or_darker_as_asked(plain_seeds):
    for seed in plain_seeds:
        low, high = (contrast_to_noise(one_structure(seed, contrast)) for contrast in (1.0, 4.0))
        assert high == pytest.approx(4 * low, rel=0.2)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"structures": (0, 3)}, "give the fewest and the most, both from 1 to 250"),
        ({"structures": (4, 3)}, "give the fewest and the most"),
        ({"smallest_vox": 0}, "give 1 or more"),
        ({"contrast": (2.0, 1.0)}, "give the smallest and the largest"),
        ({"noise": -0.1}, "give 0 or more"),
    ],
)
def test_impossible_knobs_are_refused(changes, remedy):
    with pytest.raises(ValueError, match=remedy):
        Synthesis(**changes)


@pytest.mark.parametrize(("side_vox", "smallest_vox"), [(4, 1), (16, 1000)])
def test_a_cube_without_room_for_a_structure_is_refused(side_vox, smallest_vox):
    with pytest.raises(ValueError, match="structures of at most a twentieth of the cube"):
        synthetic_sample(0, side_vox, Synthesis(smallest_vox=smallest_vox))


def rendered(seed, image, labels):
    return render_labels(np.random.default_rng(seed), image, labels)


def test_a_scan_in_another_contrast_keeps_anatomy_mean_and_deviation():
    sample = synthetic_sample(3, 32)
    image = rendered(0, *sample)
    assert torch.equal(image, rendered(0, *sample))
    assert not torch.equal(image, rendered(1, *sample))
    assert (image.shape, image.dtype) == (sample.image.shape, torch.float32)
    torch.testing.assert_close(image.mean(), sample.image.mean(), rtol=0, atol=1e-3)
    torch.testing.assert_close(image.std(), sample.image.std(), rtol=1e-2, atol=0)


def test_the_brightness_of_a_label_does_not_follow_the_scan():
    sample = synthetic_sample(3, 32)
    inside = sample.labels == 1
    levels = [float(rendered(seed, *sample)[inside].mean()) for seed in range(20)]
    assert min(levels) < float(sample.image.median()) < max(levels)
    within = [float(rendered(seed, *sample)[inside].std()) for seed in range(20)]
    assert np.median(within) < float(sample.image.std())
