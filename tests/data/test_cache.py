"""Prepared cases that are kept on disk."""

import contextlib
import os

import pytest
import torch

from sammed3d_backbone.data import cache, preparation
from sammed3d_backbone.data.datasets import DatasetError
from sammed3d_backbone.data.folders import read_dataset
from sammed3d_backbone.data.preparation import prepare_cases
from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.files import atomic_path

PLAIN = Preprocessing(None, {"default": "zscore_positive"}, "volume", (8, 8, 8))


@pytest.fixture
def kept(tmp_path):
    """The folder of the cache."""
    return tmp_path / "kept"


@pytest.fixture
def opened(monkeypatch):
    """The files that were opened."""
    seen = []
    load = Volume.load.__func__
    monkeypatch.setattr(Volume, "load", classmethod(lambda cls, p: seen.append(p) or load(cls, p)))
    return seen


def prepared(folder, kept, wanted=PLAIN):
    dataset = read_dataset(folder)
    ids = [case.id for case in dataset.cases]
    return prepare_cases(dataset, ids, wanted, cache=kept, progress=False)


def test_the_second_time_nothing_is_opened_and_the_bits_are_the_same(decathlon, kept, opened):
    folder = decathlon()
    plain = prepared(folder, None)
    first = prepared(folder, kept)
    opened.clear()
    second = prepared(folder, kept)
    assert opened == []
    for cases in (first, second):
        for case, expected in zip(cases, plain, strict=True):
            assert case.case == expected.case
            for name in ("image", "label", "annotated"):
                one, other = getattr(case, name), getattr(expected, name)
                assert one.dtype == other.dtype
                assert torch.equal(one, other)


def test_a_file_that_changed_is_read_again(decathlon, kept, opened, write_volume):
    folder = decathlon()
    prepared(folder, kept)
    opened.clear()
    os.utime(write_volume("imagesTr/case_2.nii.gz", seed=9), ns=(1, 1))
    prepared(folder, kept)
    assert {path.name for path in opened} == {"case_2.nii.gz"}


def test_another_preparation_is_kept_beside_it(decathlon, kept):
    folder = decathlon(cases=2)
    prepared(folder, kept)
    prepared(folder, kept, Preprocessing(None, {"default": "zscore"}, "volume", (8, 8, 8)))
    assert len(list(kept.iterdir())) == 4


def test_a_case_that_is_bad_is_not_kept(decathlon, kept, write_volume, labels):
    folder = decathlon(cases=2)
    write_volume("labelsTr/case_1.nii.gz", labels + 7)
    for _ in range(2):
        with pytest.raises(DatasetError, match="are not declared"):
            prepared(folder, kept)
    assert [path.name[:6] for path in kept.iterdir()] == ["case_0"]


def test_a_file_that_is_not_whole_is_made_anew(decathlon, kept):
    folder = decathlon(cases=1)
    (expected,) = prepared(folder, kept)
    image = expected.image.clone()
    (path,) = kept.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(prepared(folder, kept)[0].image, image)


def test_a_write_that_fails_leaves_nothing(decathlon, kept, monkeypatch):
    @contextlib.contextmanager
    def full(path):
        with atomic_path(path) as draft:
            yield draft
            raise OSError("no space left on device")

    monkeypatch.setattr(cache, "atomic_path", full)
    assert len(prepared(decathlon(), kept)) == 4
    assert list(kept.iterdir()) == []


def test_what_is_kept_is_mapped_and_not_changed_by_use(decathlon, kept):
    folder = decathlon(cases=1)
    (case,) = prepared(folder, kept)
    expected = case.image.clone()
    case.image.zero_()
    assert torch.equal(prepared(folder, kept)[0].image, expected)


def test_cases_are_prepared_as_without_a_cache_where_a_read_fails(decathlon, kept, monkeypatch):
    monkeypatch.setattr(preparation, "read_prepared", lambda _: None)
    assert len(prepared(decathlon(), kept)) == 4
