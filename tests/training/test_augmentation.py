"""Random changes of crops."""

from typing import get_args

import pytest
import torch

from sammed3d_backbone.training.augmentation import Kind, augmentation


@pytest.fixture
def crop(generator):
    """An image of 24 voxels a side, and labels of three values."""
    label = torch.arange(24).div(8, rounding_mode="floor").expand(1, 24, 24, 24).clone()
    return {"image": label + torch.randn(1, 24, 24, 24, generator=generator), "label": label}


def changed(crop, strong=()):
    """The crop as 30 seeds change it."""
    transform = augmentation((), strong)
    made = []
    for seed in range(30):
        transform.set_random_state(seed)
        made.append(transform({key: value.clone() for key, value in crop.items()}))
    return made


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_strong_kind_changes_some_crops_and_keeps_the_meaning_of_labels(crop, kind):
    pairs = [*zip(changed(crop), changed(crop, [kind]), strict=True)]
    assert 0 < sum(not torch.equal(before["image"], after["image"]) for before, after in pairs) < 30
    moved = any(not torch.equal(before["label"], after["label"]) for before, after in pairs)
    assert moved == (kind in ("rotation", "scaling"))
    for _, after in pairs:
        assert {*after["label"].unique().tolist()} <= {0, 1, 2}
        assert torch.isfinite(after["image"]).all()


def test_the_seed_decides(crop):
    everything = get_args(Kind)
    for one, other in zip(changed(crop, everything), changed(crop, everything), strict=True):
        assert torch.equal(one["image"], other["image"])
