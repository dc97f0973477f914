"""A folder of scans -> labels of each, resumed, with what failed in the manifest."""

import json

import numpy as np
import pytest
import torch

from sammed3d_backbone.cli import main
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.folder import is_one_scan, scans_in
from sammed3d_backbone.inference.segmenter import Segmenter

AFFINE = np.diag([2.0, 2.0, 2.0, 1])


@pytest.fixture
def scans(tmp_path, rng):
    """A folder of three scans."""
    for name in ("a", "b", "c"):
        array = rng.normal(100, 20, (18, 17, 16)).astype(np.float32)
        Volume(array, AFFINE).save(tmp_path / f"scans/{name}.nii.gz")
    return tmp_path / "scans"


def contents(folder):
    """File name -> bytes, of the label files."""
    return {path.name: path.read_bytes() for path in folder.glob("*.nii.gz")}


def test_each_scan_gets_the_labels_that_it_gets_alone(fine_tuned, scans, tmp_path):
    segmenter = Segmenter.from_pretrained(fine_tuned())
    entries = segmenter.predict_folder(scans, tmp_path / "out", probabilities=True)
    assert [entry["id"] for entry in entries] == ["a", "b", "c"]
    labels = Volume.load(tmp_path / "out/b.nii.gz").array
    assert np.array_equal(labels, segmenter.predict(Volume.load(scans / "b.nii.gz")).array)
    with np.load(tmp_path / "out/b.npz") as file:
        probs = file["probabilities"]
    assert probs.shape == (3, 18, 17, 16)
    assert np.allclose(probs.astype(float).sum(0), 1, atol=2e-3)
    assert (probs.argmax(0) == labels).mean() > 0.99


def test_an_interrupted_run_resumes_to_the_same_files(fine_tuned, scans, tmp_path):
    segmenter = Segmenter.from_pretrained(fine_tuned())
    segmenter.predict_folder(scans, tmp_path / "whole")
    segmenter.predict_folder(scans, tmp_path / "cut")
    manifest = json.loads((tmp_path / "cut/manifest.json").read_text())
    manifest["cases"] = manifest["cases"][:1]
    (tmp_path / "cut/manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "cut/c.nii.gz").unlink()
    first = (tmp_path / "cut/a.nii.gz").stat().st_mtime_ns
    segmenter.predict_folder(scans, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert (tmp_path / "cut/a.nii.gz").stat().st_mtime_ns == first


def test_results_of_other_settings_are_kept_unless_overwritten(fine_tuned, scans, tmp_path):
    segmenter = Segmenter.from_pretrained(fine_tuned())
    segmenter.predict_folder(scans, tmp_path / "out")
    with pytest.raises(FileExistsError, match="--overwrite"):
        segmenter.predict_folder(scans, tmp_path / "out", nearest=True)
    segmenter.predict_folder(scans, tmp_path / "out", nearest=True, overwrite=True)
    (tmp_path / "out/manifest.json").unlink()
    with pytest.raises(FileExistsError, match="--overwrite"):
        segmenter.predict_folder(scans, tmp_path / "out")


def test_results_never_lie_among_the_scans(fine_tuned, scans):
    before = contents(scans)
    for target in (scans, scans / "out"):
        assert main(["predict", fine_tuned(), str(scans), str(target), "--overwrite"]) == 2
    assert contents(scans) == before


def test_a_damaged_scan_is_a_line_of_the_manifest_and_exit_1(fine_tuned, scans, tmp_path, capsys):
    (scans / "b.nii.gz").write_bytes(b"damaged")
    assert main(["predict", fine_tuned(), str(scans), str(tmp_path / "out")]) == 1
    assert "b" in capsys.readouterr().out
    cases = json.loads((tmp_path / "out/manifest.json").read_text())["cases"]
    assert [case["error"] is None for case in cases] == [True, False, True]
    assert sorted(contents(tmp_path / "out")) == ["a.nii.gz", "c.nii.gz"]


def test_channels_in_files_of_their_own_are_one_scan(fine_tuned, scans, tmp_path, rng):
    path = fine_tuned(
        encoder={"variant": "tiny", "in_chans": 2, "img_size": 16}, channels=("T1", "T2")
    )
    both = np.stack([Volume.load(scans / f"{name}.nii.gz").array for name in "ab"])
    for path_of in scans.iterdir():
        path_of.unlink()
    Volume(both, AFFINE).save(scans / "stacked.nii.gz")
    for channel, array in enumerate(both):
        Volume(array, AFFINE).save(scans / f"apart_{channel:04d}.nii.gz")
    assert [scan.id for scan in scans_in(scans)] == ["apart", "stacked"]
    Segmenter.from_pretrained(path).predict_folder(scans, tmp_path / "out")
    apart, stacked = (Volume.load(tmp_path / f"out/{n}.nii.gz") for n in ("apart", "stacked"))
    assert np.array_equal(apart.array, stacked.array)


@pytest.mark.parametrize(
    "names", [("a_0000", "a_0002"), ("a_0000", "a"), ("b_0000", "a_0000", "a_0001", "a_0003")]
)
def test_channels_with_a_gap_or_two_meanings_are_refused(tmp_path, names):
    for name in names:
        (tmp_path / f"{name}.nii.gz").touch()
    with pytest.raises(ValueError, match=r"a has|both be a"):
        scans_in(tmp_path)


def test_an_ending_in_upper_case_is_not_passed_over(scans):
    (scans / "late.NII.GZ").write_bytes(b"")
    with pytest.raises(ValueError, match=r"late\.NII\.GZ"):
        scans_in(scans)


def test_a_series_in_a_folder_of_its_own_is_a_scan(fine_tuned, scans, tmp_path):
    for path in scans.iterdir():
        path.unlink()
    pytest.importorskip("pydicom", reason="needs the extra dicom")
    from dicom_series import write_series

    write_series(scans / "series")
    assert is_one_scan(scans / "series")
    assert not is_one_scan(scans)
    segmenter = Segmenter.from_pretrained(fine_tuned())
    segmenter.predict_folder(scans, tmp_path / "out")
    found, scan = Volume.load(tmp_path / "out/series.nii.gz"), Volume.load(scans / "series")
    assert found.shape == scan.shape
    assert np.allclose(found.affine, scan.affine, atol=1e-4)


def test_folds_are_averaged_and_must_fit(fine_tuned, tmp_path, scans):
    one = Segmenter.from_pretrained(fine_tuned())
    other = Segmenter.from_pretrained(fine_tuned())
    for parameter in other.model.parameters():
        parameter.data.mul_(0.5)
    for number, member in enumerate((one, other)):
        (tmp_path / "folds").mkdir(exist_ok=True)
        member.save(tmp_path / f"folds/fold_{number}.safetensors")
    image = one.card.preprocessing.image(Volume.load(scans / "a.nii.gz"))[0]
    mean = (one.logits(image) + other.logits(image)) / 2
    ensemble = Segmenter.from_pretrained(tmp_path / "folds")
    assert torch.allclose(ensemble.logits(image), mean, atol=1e-5)
    other.card = one.card.__class__(**{**vars(one.card), "channels": ("CT",)})
    other.save(tmp_path / "folds/fold_1.safetensors")
    with pytest.raises(ValueError, match="channels"):
        Segmenter.from_pretrained(tmp_path / "folds")


def test_mirroring_along_an_axis_makes_the_result_mirror_with_the_scan(fine_tuned, scans):
    segmenter = Segmenter.from_pretrained(fine_tuned(training={"config": {"flip_axes": [0]}}))
    image = segmenter.card.preprocessing.image(Volume.load(scans / "a.nii.gz"))[0][:, :16]
    plain, turned = (segmenter.logits(x, mirror=True) for x in (image, image.flip(1)))
    assert torch.allclose(plain, turned.flip(1), atol=1e-4)
    assert not torch.allclose(segmenter.logits(image), plain, atol=1e-4)


def test_a_scan_that_has_changed_since_is_not_taken_for_done(fine_tuned, scans, tmp_path):
    segmenter = Segmenter.from_pretrained(fine_tuned())
    segmenter.predict_folder(scans, tmp_path / "out")
    before = contents(tmp_path / "out")
    image = Volume.load(scans / "b.nii.gz")
    Volume(image.array[::-1].copy(), AFFINE).save(scans / "b.nii.gz")
    with pytest.raises(FileExistsError, match=r"b\.nii\.gz"):
        segmenter.predict_folder(scans, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    segmenter.predict_folder(scans, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out")["b.nii.gz"] != before["b.nii.gz"]


def test_probabilities_that_were_removed_are_written_again(fine_tuned, scans, tmp_path):
    segmenter = Segmenter.from_pretrained(fine_tuned())
    segmenter.predict_folder(scans, tmp_path / "out", probabilities=True)
    (tmp_path / "out/a.npz").unlink()
    segmenter.predict_folder(scans, tmp_path / "out", probabilities=True)
    assert (tmp_path / "out/a.npz").is_file()


def test_channels_of_a_case_whose_name_has_a_space_are_one_scan(scans):
    for path in sorted(scans.iterdir()):
        path.rename(scans / f"case 1_{ord(path.name[0]) - 97:04d}.nii.gz")
    (scan,) = scans_in(scans)
    assert [path.name[-8] for path in scan.paths] == ["0", "1", "2"]
    assert scan.id.startswith("_case_1-")


def test_a_folder_of_results_that_is_a_file_is_refused(fine_tuned, scans, tmp_path):
    (tmp_path / "out").write_text("mine")
    segmenter = Segmenter.from_pretrained(fine_tuned())
    for target in (tmp_path / "out", tmp_path / "out/deeper"):
        with pytest.raises(NotADirectoryError, match="give a folder"):
            segmenter.predict_folder(scans, target)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_of_names_in_capitals_says_so(fine_tuned, scans, tmp_path, capsys):
    for path in sorted(scans.iterdir()):
        path.rename(scans / path.name.upper())
    assert main(["predict", fine_tuned(), str(scans), str(tmp_path / "out")]) == 2
    assert "lower case" in capsys.readouterr().err
