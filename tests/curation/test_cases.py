"""Curation of a case: kept masks, records, refusals."""

import re

import numpy as np
import pytest
from blocks import SHAPE, block

from sammed3d_backbone.curation.cases import curate_case, read_case
from sammed3d_backbone.curation.rules import PRESETS
from sammed3d_backbone.curation.sources import read_raw
from sammed3d_backbone.data.preparation import load_image
from sammed3d_backbone.data.volume import Volume


@pytest.fixture
def curated(raw, tmp_path):
    """Curates a single case; its decisions by class."""

    def curate(names, array, preset="default", **changes):
        (raw_set,) = read_raw(raw(names, one=array, **changes))
        curate_case(raw_set.cases[0], tmp_path / "out", PRESETS[preset])
        record = read_case(raw_set.cases[0], tmp_path / "out")
        return {decision["class"]: decision for decision in record["decisions"]}

    return curate


def mask(tmp_path, decision):
    return Volume.load(tmp_path / "out/one" / decision["mask"])


def test_a_clean_mask_is_kept_on_the_grid_of_its_image(curated, tmp_path):
    affine = np.array([[0, 0, 2.0, 5], [-2.0, 0.1, 0, -7], [0, 2.0, 0, 3], [0, 0, 0, 1]])
    decision = curated({7: "liver"}, block(7), affine=affine)["liver"]
    assert (decision["verdict"], decision["why"]) == ("kept", [])
    assert {step["did"] for step in decision["steps"].values()} == {"kept"}
    written = mask(tmp_path, decision)
    assert np.array_equal(written.array, block())
    image = Volume.load(tmp_path / "raw/set/one.nii.gz")
    assert np.array_equal(written.affine, image.affine)
    copied = (tmp_path / "out/one/image.nii.gz").read_bytes()
    assert copied == (tmp_path / "raw/set/one.nii.gz").read_bytes()


def test_every_mask_has_a_verdict_of_its_own(curated, tmp_path):
    array = block(1) + block(2, start=20, size=3) + block(3, start=26)
    array[39, 23, 23] = 3  # a sixth part, with four others
    array[38, [0, 4, 8, 12], 20] = 3
    found = curated({1: "liver", 2: "cyst", 3: "colon"}, array)
    assert {n: d["verdict"] for n, d in found.items()} == {
        "liver": "kept",
        "cyst": "dropped",
        "colon": "changed",
    }
    assert found["cyst"]["why"] == ["0.216 ml is less than 1 ml"]
    assert found["colon"]["steps"]["islands"] == {
        "did": "changed",
        "parts": 6,
        "beyond": 1,
        "beyond_ml": pytest.approx(0.008),
    }
    names = {path.name for path in (tmp_path / "out/one/masks").iterdir()}
    assert names == {"liver.nii.gz", "colon.nii.gz"}
    assert int(mask(tmp_path, found["colon"]).array.sum()) == 8**3 + 4


def test_a_mask_in_a_mostly_empty_volume_goes_in_the_paper_preset_only(curated, tmp_path):
    array = np.zeros((60, 60, 60), np.uint8)
    array[:10, :10, :10] = 1
    image = array.astype(np.float32)
    assert curated({1: "liver"}, block())["liver"]["verdict"] == "kept"
    Volume(array, np.diag([2.0, 2, 2, 1])).save(tmp_path / "raw/set/one_seg.nii.gz")
    Volume(image, np.diag([2.0, 2, 2, 1])).save(tmp_path / "raw/set/one.nii.gz")
    (raw_set,) = read_raw(tmp_path / "raw")
    for preset, verdict in (("default", "kept"), ("paper", "dropped")):
        curate_case(raw_set.cases[0], tmp_path / preset, PRESETS[preset])
        (decision,) = read_case(raw_set.cases[0], tmp_path / preset)["decisions"]
        assert decision["verdict"] == verdict
        assert decision["extent"]["background"] == pytest.approx(1 - 1000 / 60**3)


@pytest.mark.parametrize(("shift_mm", "did"), [(0.0, "kept"), (0.0004, "changed")])
def test_origins_that_differ_in_the_fourth_decimal_are_repaired(
    curated, tmp_path, write_volume, shift_mm, did
):
    curated({1: "liver"}, block())
    (raw_set,) = read_raw(tmp_path / "raw")
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = shift_mm
    write_volume("raw/set/one_seg.nii.gz", block(), affine=affine)
    curate_case(raw_set.cases[0], tmp_path / "out", PRESETS["default"])
    (decision,) = read_case(raw_set.cases[0], tmp_path / "out")["decisions"]
    assert decision["verdict"] == did
    assert decision["steps"]["grid"] == {"did": did, "shift_mm": pytest.approx(shift_mm)}
    assert np.array_equal(mask(tmp_path, decision).affine, np.diag([2.0, 2.0, 2.0, 1.0]))


def test_a_pair_in_one_mask_becomes_two(curated, tmp_path):
    found = curated({1: "kidneys"}, block(1, start=2) + block(1, start=28, size=9))
    assert {n: d["verdict"] for n, d in found.items()} == {
        "kidneys left": "changed",
        "kidneys right": "changed",
    }
    assert int(mask(tmp_path, found["kidneys right"]).array.sum()) == 9**3
    assert found["kidneys left"]["steps"]["sides"]["is_split"]


def test_a_pair_with_one_part_stays_whole(curated):
    (decision,) = curated({1: "kidneys"}, block()).values()
    assert (decision["class"], decision["verdict"]) == ("kidneys", "kept")
    assert decision["steps"]["sides"] == {"did": "kept", "is_split": False}


@pytest.mark.parametrize(
    ("affine", "names", "verdict"),
    [
        (np.diag([2.0, 2, 2, 1]), {1: "kidney_left", 2: "kidney_right"}, "kept"),
        (np.diag([2.0, 2, 2, 1]), {1: "kidney_right", 2: "kidney_left"}, "dropped"),
        (np.diag([-2.0, -2, 2, 1]), {1: "kidney_right", 2: "kidney_left"}, "kept"),
        (np.diag([-2.0, -2, 2, 1]), {1: "kidney_left", 2: "kidney_right"}, "dropped"),
    ],
)
def test_sides_are_checked_against_the_affine(curated, tmp_path, affine, names, verdict):
    found = curated(names, block(1, start=2) + block(2, start=28), affine=affine)
    assert {decision["verdict"] for decision in found.values()} == {verdict}
    assert (tmp_path / "out/one/image.nii.gz").is_file() == (verdict == "kept")
    if verdict == "dropped":
        (why,) = found["kidney_left"]["why"]
        assert why.startswith("lies 52 mm on the wrong side of 'kidney_right'")
        assert why.endswith("2 of 2 classes with a side here; correct the affine")
        assert not any((tmp_path / "out/one").glob("masks/*"))


def test_one_swapped_pair_among_others_is_a_matter_of_names(curated):
    array = np.zeros(SHAPE, np.uint8)
    for value, (x, y) in enumerate([(2, 2), (28, 2), (2, 14), (28, 14)], start=1):
        array[x : x + 8, y : y + 8, 4:12] = value
    names = {1: "kidney_left", 2: "kidney_right", 3: "lung_right", 4: "lung_left"}
    found = curated(names, array)
    verdicts = [found[name]["verdict"] for name in names.values()]
    assert verdicts == ["kept", "kept", "dropped", "dropped"]
    assert found["lung_left"]["why"][0].endswith(
        "2 of 4 classes with a side here; correct its name"
    )


@pytest.mark.parametrize(
    ("array", "affine", "remedy"),
    [
        (block()[1:], None, r"shape \(39, 24, 24\), but .*; resample one"),
        (block(), np.diag([2.0, 2.0, 2.1, 1.0]), r"lies up to 2\.3 mm away .*; correct one affine"),
        (block(2), None, r"values \[2\] are not declared \(\[0, 1\]\); add or correct them"),
        (block() * 0.5, None, "labels are not whole numbers; save them as integers"),
        (block() * 0, None, "holds background only"),
        (np.stack([block()] * 2), None, "labels have 2 channels; save one integer volume"),
    ],
)
def test_labels_that_cannot_be_used_are_refused_with_a_record(
    curated, tmp_path, write_volume, array, affine, remedy
):
    curated({1: "liver"}, block())
    affine = np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine
    write_volume("raw/set/one_seg.nii.gz", array.astype(np.float32), affine=affine)
    assert re.search(remedy, refusal(tmp_path))


def test_an_image_that_cannot_be_used_is_refused_with_a_record(curated, tmp_path, write_volume):
    curated({1: "liver"}, block())
    image = np.full(SHAPE, np.nan, np.float32)
    write_volume("raw/set/one.nii.gz", image, affine=np.diag([2.0, 2.0, 2.0, 1.0]))
    assert "non-finite" in refusal(tmp_path)
    image = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    write_volume("raw/set/one.nii.gz", image, affine=np.diag([2.0, 2.0, 2.0, 1.0]))
    assert "2 channels" in refusal(tmp_path)
    (tmp_path / "raw/set/one.nii.gz").write_bytes(b"no image")
    assert refusal(tmp_path).endswith("copy or convert it again")


def test_classes_that_would_share_a_file_are_refused(curated, tmp_path):
    curated({1: "a b", 2: "a_b"}, block(1) + block(2, start=20))
    why = refusal(tmp_path)
    assert why.endswith(
        "'a b' and 'a_b' would both be written to masks/a_b.nii.gz; rename one class"
    )


def refusal(tmp_path):
    """The reason why the only case is refused."""
    (raw_set,) = read_raw(tmp_path / "raw")
    curate_case(raw_set.cases[0], tmp_path / "out", PRESETS["default"])
    (decision,) = read_case(raw_set.cases[0], tmp_path / "out")["decisions"]
    assert (decision["class"], decision["mask"], decision["verdict"]) == (None, None, "refused")
    assert {path.name for path in (tmp_path / "out/one").iterdir()} == {"decisions.json"}
    return decision["why"][0]


@pytest.mark.parametrize("error", [RuntimeError("of a library"), RecursionError(), MemoryError()])
def test_whatever_one_case_raises_is_its_own_line(raw, tmp_path, monkeypatch, error):
    (raw_set,) = read_raw(raw({1: "liver"}, one=block(), two=block()))

    def fail(case):
        if case.id == "one":
            raise error
        return load_image(case)

    monkeypatch.setattr("sammed3d_backbone.curation.cases.load_image", fail)
    for case in raw_set.cases:
        curate_case(case, tmp_path / "out", PRESETS["default"])
    records = [read_case(case, tmp_path / "out")["decisions"] for case in raw_set.cases]
    assert [record[0]["verdict"] for record in records] == ["refused", "kept"]
    assert type(error).__name__ in records[0][0]["why"][0]


def test_a_full_disk_is_not_blamed_on_the_case(raw, tmp_path, monkeypatch):
    (raw_set,) = read_raw(raw({1: "liver"}, one=block()))

    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Volume, "save", full)
    with pytest.raises(OSError, match="space"):
        curate_case(raw_set.cases[0], tmp_path / "out", PRESETS["default"])
    assert read_case(raw_set.cases[0], tmp_path / "out") is None
