"""The numbered stream of training crops."""

import pytest
import torch
from monai.transforms import Compose, RandFlipd, RandGaussianNoised
from torch.utils.data import DataLoader

from sammed3d_backbone.data.crops import CropStream
from sammed3d_backbone.data.datasets import Case
from sammed3d_backbone.data.preparation import PreparedCase
from sammed3d_backbone.data.preprocessing import Preprocessing


@pytest.fixture
def cases(generator):
    made = []
    for i in range(5):
        image = torch.randn(1, 12, 10, 9, generator=generator)
        image[0, 0, 0, 0] = i
        label = torch.zeros(1, 12, 10, 9, dtype=torch.uint8)
        if i:
            label[0, 9:11, 1:3, 4:6] = 1
            label[0, 2, 2, 2] = 2
        made.append(
            PreparedCase(Case(str(i), (), None), image, label, torch.tensor([True, True, i > 2]))
        )
    return made


def preprocessing(side, statistics="volume"):
    return Preprocessing(None, {"default": "zscore"}, statistics, (side, side, side))


def stream(cases, samples=20, side=6, **changes):
    augment = Compose(
        [
            RandFlipd(["image", "label"], prob=0.5, spatial_axis=0),
            RandGaussianNoised("image", prob=0.5),
        ]
    )
    return CropStream(
        cases, preprocessing(side), samples=samples, seed=3, **{"augment": augment, **changes}
    )


def equal(one, other):
    return all(torch.equal(one[key], other[key]) for key in ("image", "label"))


def test_a_sample_depends_on_its_number_only(cases):
    one = stream(cases)
    whole = [one[i] for i in range(20)]
    assert len(one) == 20
    for number in (17, 3, 11):
        assert equal(stream(cases, samples=99)[number], whole[number])


def test_workers_do_not_change_the_samples(cases):
    alone = list(DataLoader(stream(cases, samples=8), batch_size=2))
    shared = list(DataLoader(stream(cases, samples=8), batch_size=2, num_workers=2))
    assert all(equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_another_seed_gives_other_samples(cases):
    one, other = stream(cases), stream(cases)
    other.seed = 4
    assert not equal(one[0], other[0])


def test_every_case_comes_once_per_epoch_in_a_new_order(cases):
    whole = stream(cases, side=9, samples=10, augment=None, on_foreground=0)
    cases[:] = [
        PreparedCase(c.case, torch.full_like(c.image, float(c.case.id)), c.label, c.annotated)
        for c in cases
    ]
    seen = [int(whole[i]["image"].mean()) for i in range(10)]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4]
    assert seen[:5] != seen[5:]


def test_crops_have_the_types_and_the_side_that_a_loss_wants(cases):
    sample = stream(cases)[0]
    assert sample["image"].shape == sample["label"].shape == (1, 6, 6, 6)
    assert (sample["image"].dtype, sample["label"].dtype) == (torch.float32, torch.int64)


def test_image_and_label_are_cut_and_flipped_together(cases):
    for case in cases:
        case.image[0] = case.label[0].float()
    samples = stream(cases, augment=stream(cases).augment.transforms[0])
    assert all(
        torch.equal(s["image"], s["label"].float()) for s in map(samples.__getitem__, range(20))
    )


def test_foreground_crops_hold_every_class_alike(cases):
    held = [
        stream(cases[1:], samples=60, on_foreground=1.0, augment=None)[i]["label"]
        for i in range(60)
    ]
    share = sum(bool((label == 2).any()) for label in held) / 60
    assert all(bool(label.any()) for label in held)
    assert 0.3 < share < 0.75  # class 2 has one voxel, class 1 has eight


def test_a_class_that_few_cases_have_is_centred_on_as_often_as_the_others(cases):
    for case in cases[2:]:
        case.label[case.label == 2] = 0  # only case 1 keeps it
    crops = stream(cases[1:], samples=400, side=1, on_foreground=1.0, augment=None)
    values = [int(crops[i]["label"]) for i in range(400)]
    # by case and class: 1/4 of the crops are of case 1, where class 2 is four times as likely
    assert values.count(2) / 400 == pytest.approx(0.25 * 4 / 5, abs=0.06)


def test_a_case_without_labels_is_cropped_anywhere(cases):
    assert stream(cases[:1], on_foreground=1.0)[0]["label"].sum() == 0


def test_the_cached_cases_are_not_changed(cases):
    before = [case.image.clone() for case in cases]
    for i in range(20):
        stream(cases)[i]["image"].zero_()
    assert all(torch.equal(case.image, image) for case, image in zip(cases, before, strict=True))


def test_samples_are_plain_tensors(cases):
    assert {type(value) for value in stream(cases)[0].values()} == {torch.Tensor}


def test_a_sample_says_which_classes_its_case_was_annotated_for(cases):
    samples = [stream(cases)[i] for i in range(5)]
    assert [s["annotated"].tolist()[:2] for s in samples] == [[True, True]] * 5
    assert sorted(s["annotated"][2].item() for s in samples) == [False, False, False, True, True]


def test_statistics_of_a_crop_are_taken_before_augmentation(cases):
    plain = CropStream(cases, preprocessing(6, "crop"), samples=4, seed=3)
    for number in range(4):
        image = plain[number]["image"]
        assert image.mean().abs() < 1e-5
        assert abs(image.std() - 1) < 1e-4
    whole = CropStream(cases, preprocessing(6, "volume"), samples=4, seed=3)
    assert any(not torch.equal(whole[n]["image"], plain[n]["image"]) for n in range(4))
    assert all(torch.equal(whole[n]["label"], plain[n]["label"]) for n in range(4))
