"""Crops with objects to be clicked: pure functions of their number."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from monai.transforms import RandFlipd
from torch import Tensor

from sammed3d_backbone.data.datasets import Case, DatasetError
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.pretraining.object_crops import (
    Crop,
    Curriculum,
    LabelledScan,
    ObjectStream,
    ScanSource,
    SyntheticSource,
    read_scan,
)


def scan_of_two(spacing_mm=(1.0, 1.0, 2.0)):
    """A large bright and a small brighter box in a dark volume."""
    labels = torch.zeros(1, 40, 36, 20, dtype=torch.uint8)
    labels[0, 6:26, 8:24, 4:12] = 1
    labels[0, 30:34, 28:32, 14:17] = 2
    return LabelledScan(labels.float(), labels, torch.tensor([-5.0]), spacing_mm)


def stream(sources=None, *, smallest_vox=(50, 50), seed=(0, 0), augment=None, shares=None):
    sources = sources or [
        SyntheticSource(),
        ScanSource("boxes", [scan_of_two()], 1.0, zoom=1.5, stretch=1.1),
    ]
    return ObjectStream(
        sources,
        shares or [1.0] * len(sources),
        16,
        Curriculum(smallest_vox, (3, 3), 10),
        objects=3,
        steps=2,
        samples=20,
        seed=seed,
        augment=augment,
    )


def test_a_sample_depends_on_seed_and_number_only():
    first, again, other = stream()[7], stream()[7], stream(seed=(0, 1))[7]
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["draws"], other["draws"])


def test_samples_come_from_all_sources_and_have_their_shapes():
    samples = [stream()[number] for number in range(12)]
    assert {int(sample["source"]) for sample in samples} == {0, 1}
    for sample in samples:
        assert sample["image"].shape == (1, 16, 16, 16)
        assert sample["image"].dtype == torch.float32
        assert sample["objects"].shape == (3, 16, 16, 16)
        assert sample["objects"].flatten(1).any(1).all()
        assert sample["draws"].shape == (2, 3, 3)
        assert all(type(value) is Tensor for value in sample.values())


def test_what_is_asked_for_shrinks_from_first_to_last():
    curriculum = Curriculum((2000, 200), (5, 12), samples=100)
    assert [curriculum.at(n) for n in (0, 50, 100, 900)] == [
        (2000, 5),
        (632, 8),
        (200, 12),
        (200, 12),
    ]
    assert Curriculum((2000, 200), (5, 12), samples=0).at(0) == (200, 12)


def test_small_objects_wait_until_the_curriculum_asks_for_them():
    boxes = [ScanSource("boxes", [scan_of_two()], 1.0)]
    early = [stream(boxes, smallest_vox=(600, 20))[number] for number in (0, 1, 2)]
    assert all(sample["objects"].flatten(1).sum(1).min() > 600 for sample in early)
    late = [stream(boxes, smallest_vox=(600, 20))[number] for number in range(10, 20)]
    assert min(int(sample["objects"].flatten(1).sum(1).min()) for sample in late) < 200


def test_where_nothing_is_large_enough_the_largest_is_asked_for():
    sample = stream([ScanSource("boxes", [scan_of_two()], 1.0)], smallest_vox=(4096, 4096))[0]
    assert sample["objects"].flatten(1).any(1).all()


def test_a_source_without_objects_is_named():
    class Empty:
        name = "void"
        is_real = False

        def draw(self, rng, side_vox, smallest_vox, structures):
            labels = torch.zeros(1, 16, 16, 16, dtype=torch.uint8)
            return Crop(torch.zeros(1, 16, 16, 16), labels, {}, frozenset())

    with pytest.raises(ValueError, match="void"):
        stream([Empty()])[0]


@pytest.mark.parametrize("shares", [[1.0], [1.0, 0.0]])
def test_every_source_needs_a_share(shares):
    with pytest.raises(ValueError, match="shares"):
        stream(shares=shares)


def test_voxels_have_the_numbers_of_their_classes_in_every_augmentation():
    scan = replace(scan_of_two(), classes={2: 1}, known=frozenset({1}))
    flipped = RandFlipd(["image", "label"], prob=1.0, spatial_axis=0)
    for augment in (None, flipped):
        samples = ObjectStream(
            [ScanSource("boxes", [scan], 1.0)],
            [1.0],
            16,
            Curriculum((20, 20), (3, 3), 0),
            objects=1,
            steps=1,
            samples=4,
            seed=(0,),
            augment=augment,
            classes=2,
        )
        for sample in (samples[number] for number in range(4)):
            assert torch.equal(sample["classes"] == 1, sample["labels"] == 2)
            assert sample["known"].tolist() == [True, False]


@pytest.mark.parametrize("spacing_mm", [1.0, 2.0])
def test_a_crop_has_its_spacing_and_lies_around_its_centre(spacing_mm):
    image, labels, *_ = scan_of_two().crop((16, 16, 8), 8, (spacing_mm,) * 3)
    assert image.shape == labels.shape == (1, 8, 8, 8)
    assert (labels == 1).all() == (spacing_mm == 1.0)  # 8 mm fit into the box, 16 x 16 x 16 not
    assert torch.equal(image.round(), labels.float())


def test_outside_of_the_scan_lies_what_a_raw_zero_became():
    image, labels, *_ = scan_of_two().crop((0, 0, 0), 8, (1.0, 1.0, 1.0))
    assert (image[0, 0] == -5).all()
    assert not labels[0, 0].any()


def test_no_crop_is_finer_than_a_third_of_the_scans_spacing():
    scans = ScanSource("boxes", [scan_of_two((4.0, 4.0, 4.0))], 1.0)
    _, labels, *_ = scans.draw(np.random.default_rng(0), 200, 1, 3)
    voxels = 20 * 16 * 8 * 3**3  # not 4 ** 3 of them for each of the scan's
    assert int((labels == 1).sum()) == pytest.approx(voxels, rel=0.05)


def test_a_scan_is_read_with_its_labels_spacing_and_orientation(tmp_path):
    array = np.random.default_rng(0).normal(100, 10, (6, 5, 4)).astype(np.float32)
    labels = np.zeros((6, 5, 4), np.uint8)
    labels[0] = 40
    affine = np.diag([-2.0, 1.0, 3.0, 1.0])
    Volume(array, affine).save(tmp_path / "image.nii.gz")
    Volume(labels, affine).save(tmp_path / "label.nii.gz")
    case = Case("one", (tmp_path / "image.nii.gz",), tmp_path / "label.nii.gz")
    scan = read_scan(case, "zscore_positive")
    assert scan.spacing_mm == (2.0, 1.0, 3.0)
    assert (scan.labels[0, -1] == 40).all()
    assert abs(float(scan.image.mean())) < 1e-5
    Volume(labels, np.eye(4)).save(tmp_path / "label.nii.gz")
    with pytest.raises(DatasetError, match="one cannot be used"):
        read_scan(case, "zscore_positive")


def test_scans_without_an_object_are_left_out():
    healthy = replace(scan_of_two(), labels=torch.zeros(1, 40, 36, 20, dtype=torch.uint8))
    both = [ScanSource("boxes", [healthy, scan_of_two()], 1.0)]
    alone = [ScanSource("boxes", [scan_of_two()], 1.0)]
    assert all(torch.equal(stream(both)[n]["image"], stream(alone)[n]["image"]) for n in range(3))
    with pytest.raises(ValueError, match="boxes"):
        ScanSource("boxes", [healthy], 1.0)
